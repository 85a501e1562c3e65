"""The rings hold: modules import from earlier rings only, and JAX is never woken needlessly."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import safetensors.numpy

from jaxshard import mapping, training

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxshard"

#: The six rings, from the inside out: packages and modules at the root.
RINGS: tuple[tuple[str, ...], ...] = (
    ("errors", "core", "native"),
    ("models", "rules", "mapping", "planning", "formats"),
    ("storage", "distributed"),
    ("conversion", "lora"),
    ("devices", "resharding", "loader", "saver"),
    ("training", "mindformers", "api", "cli", "__init__", "__main__"),
)
DEVICE_RINGS = (4,)
APPS = 5
#: May import JAX when called, and only then.
INSIDE_FUNCTIONS = {"cli.demo", "mapping.arrays", "distributed.processes"}
#: Import JAX, and so are themselves imported only when such a checkpoint is met.
DEVICE_FORMATS = {"formats.orbax", "storage.orbax_source"}
WITH_ORBAX = ("formats.orbax", "storage.orbax_source")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, ``jaxshard.`` left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(
    source: str, module: str, is_package: bool = False, only_at_import: bool = False
) -> set[str]:
    """What ``source`` imports, in functions too: dotted names, our own without ``jaxshard.``."""
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in _nodes(ast.parse(source), only_at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # of ``from .layout import Layout`` the second may be a module or what is in one
            found |= {f"{stem}.{a.name}".lstrip(".") for a in node.names} | {stem}
    return {name.removeprefix("jaxshard.") for name in found}


def _nodes(node: ast.AST, only_at_import: bool) -> Iterator[ast.AST]:
    """All nodes but those for type checkers only, and if asked those inside functions."""
    for child in ast.iter_child_nodes(node):
        yield child
        guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        later = only_at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if not guarded and not later:
            yield from _nodes(child, only_at_import)


def ring_of(module: str) -> int | None:
    """The number of the ring in which ``module`` is."""
    while module:
        for number, ring in enumerate(RINGS):
            if module in ring:
                return number
        module = module.rpartition(".")[0]
    return None


def outward(known: dict[str, set[str]]) -> list[str]:
    """Imports that point from a ring to a later one."""
    return [
        f"{module} imports {other}"
        for module, used in known.items()
        for other in sorted(used)
        if other in known and (ring_of(other) or 0) > (ring_of(module) or 0)
    ]


@cache
def graph(only_at_import: bool = False) -> dict[str, set[str]]:
    return {
        name: imports(
            path.read_text(),
            name,
            path.name == "__init__.py" and name != "__init__",
            only_at_import,
        )
        for name, path in modules().items()
    }


def test_every_module_has_a_ring():
    assert [m for m in modules() if ring_of(m) is None] == []


def test_modules_import_from_earlier_rings_only():
    assert outward(graph()) == []


def added(known: dict[str, set[str]]) -> set[str]:
    """Outward imports of ``known`` that are not in the package as it is."""
    return set(outward(known)) - set(outward(graph()))


@pytest.mark.parametrize(
    "line",
    [
        "from ..conversion.execute import execute",
        "from .. import conversion",
        "import jaxshard.conversion",
        "def f():\n    from jaxshard.conversion.execute import execute",
    ],
)
def test_an_outward_import_would_be_noticed(line):
    """The twin: however it is spelled, and wherever it stands."""
    known = dict(graph())
    known["core.layout"] = imports(line, "core.layout")
    assert added(known) & {
        "core.layout imports conversion",
        "core.layout imports conversion.execute",
    }


def test_an_outward_import_of_a_sub_package_would_be_noticed():
    known = dict(graph())
    known["formats.safetensors"] = imports(
        "from ..storage.local import Handles", "formats.safetensors"
    )
    assert added(known) == {"formats.safetensors imports storage.local"}
    known["formats.safetensors"] = imports("from ..storage import local", "formats.safetensors")
    assert "formats.safetensors imports storage.local" in added(known)


def users_of(library: str, only_at_import: bool = False) -> set[str]:
    """Modules that import ``library``."""
    known = graph(only_at_import)
    return {m for m, used in known.items() if any(u.split(".")[0] == library for u in used)}


def test_only_the_device_modules_import_jax():
    users = users_of("jax") | users_of("jaxlib")
    allowed = {m for m in users if (ring_of(m) or 0) in (*DEVICE_RINGS, APPS)} | DEVICE_FORMATS
    assert users - allowed <= INSIDE_FUNCTIONS
    assert not (users_of("jax", only_at_import=True) & INSIDE_FUNCTIONS)
    assert users & allowed, "the check sees nothing"


def test_nothing_that_moves_files_imports_a_device_module():
    """The rings before devices import none; the applications may, inside their functions."""
    device = {m for m in graph() if ring_of(m) in DEVICE_RINGS}
    for module, used in graph().items():
        if (ring_of(module) or 0) < DEVICE_RINGS[0]:
            assert not used & device, module
    doors = {m for m in graph() if m.split(".")[0] in ("api", "cli", "mindformers", "__init__")}
    for module in doors:
        assert not graph(only_at_import=True)[module] & (device | DEVICE_FORMATS), module


def circles(known: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other; a package and its own modules are none."""
    reached = {m: _reached(known, m) for m in known}
    groups = {frozenset(n for n in reached[m] if m in reached[n]) for m in known}
    return [
        set(g) for g in groups if len({".".join(m.split(".")[:2]) for m in g}) > 1 and not _one(g)
    ]


def _reached(known: dict[str, set[str]], start: str) -> set[str]:
    seen, todo = set[str](), [start]
    while todo:
        for other in known[todo.pop()] & known.keys() - seen:
            seen.add(other)
            todo.append(other)
    return seen


def _one(group: frozenset[str]) -> bool:
    """Whether these are a package's ``__init__`` and modules of it, and nothing else."""
    return len({m.split(".")[0] for m in group}) == 1 and any("." not in m for m in group)


def test_no_modules_import_each_other():
    assert circles(graph()) == []


def test_a_circle_would_be_noticed():
    known = {m: set(used) for m, used in graph().items()}
    known["core.box"] = known["core.box"] | {"core.layout"}
    assert circles(known)


def test_only_its_format_imports_orbax():
    assert [m for m in users_of("orbax") if not m.startswith(WITH_ORBAX)] == []


def test_pure_modules_touch_no_disk_and_no_clock():
    effects = {"os", "pathlib", "shutil", "time", "io", "tempfile", "socket", "subprocess"}
    pure = [m for m in modules() if (ring_of(m) or 0) < (ring_of("storage") or 0)]
    found = {m: graph()[m] & effects for m in pure}
    found.pop("native", None)  # looks for its compiled half, which lies beside it
    found.pop("mapping.tables", None)  # asks whether what it is given is a file of the user's
    for module in DEVICE_FORMATS:  # that library opens its files itself, by their paths
        found.pop(module, None)
    assert {m: used for m, used in found.items() if used} == {}
    assert graph()["storage.local"] & effects  # the twin: the check sees what does


@pytest.mark.parametrize("package", [mapping, training])
def test_type_checkers_see_the_names_that_a_package_imports_lazily(package):
    tree = ast.parse(Path(package.__file__).read_text())
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == package._HOME
    assert sorted(seen) == sorted(package.__all__)
    assert all(hasattr(package, name) for name in seen)
    assert not hasattr(package, "nothing")


# --- what is loaded when ---------------------------------------------------------------

WATCH = """
import sys
{work}
heavy = [m for m in ("jax", "jaxlib", "orbax", "torch", "rich", {also}) if m in sys.modules]
print("HEAVY", *heavy)
"""


def heavy_after(work: str, *also: str) -> list[str]:
    """Which heavy libraries a fresh Python has loaded after ``work``."""
    script = WATCH.format(work=work, also="".join(f"{m!r}, " for m in also))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1].split()[1:]


def test_importing_jaxshard_imports_neither_jax_nor_numpy():
    assert heavy_after("import jaxshard", "numpy") == []


def test_help_imports_not_even_numpy():
    work = "from jaxshard.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass"
    assert heavy_after(work, "numpy") == []


def test_no_file_to_file_command_imports_jax(tmp_path):
    folder = tmp_path / "llama"
    checkpoints.write_llama(folder)
    cut, recut, merged = (tmp_path / n for n in ("cut", "recut", "merged"))
    adapter = write_adapter(tmp_path / "adapter")
    commands = [
        ["inspect", folder],
        ["inspect", folder, "--json"],
        ["plan", folder, "--to", "dp2mp2"],
        ["slice", folder, cut, "--to", "dp2mp2"],
        ["convert", cut, recut, "--to", "mp2pp2", "--dry-run"],
        ["convert", cut, recut, "--to", "mp2pp2"],
        ["inspect", recut],
        ["merge", recut, merged],
        ["verify", merged, "--against", folder],
        ["merge", recut, tmp_path / "one.safetensors", "--check-replicas"],
        ["convert", folder, tmp_path / "named", "--names", "llama-hf:llama-mindformers"],
        *[
            ["convert", folder, tmp_path / f"{kind}{to}", "--format", kind, "--to", to]
            for kind in ("ckpt", "iteration", "unified")
            for to in (("full",) if kind == "unified" else ("full", "mp2"))
        ],
        ["verify", tmp_path / "iterationmp2", "--against", folder],
        ["lora", folder, tmp_path / "merged_lora", "--adapter", adapter],
        ["strategy", "make", folder, tmp_path / "made", "--to", "dp2mp2"],
        ["strategy", "show", tmp_path / "made"],
        ["strategy", "merge", tmp_path / "made", tmp_path / "all.ckpt"],
    ]
    lines = ["from jaxshard.cli import main"]
    lines += [f"assert main({[str(a) for a in c]!r}) == 0" for c in commands]
    assert heavy_after("\n".join(lines)) == []


def write_adapter(folder: Path) -> Path:
    """One of PEFT's, for the first layer of the small Llama."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    arrays = {f"{stem}A.weight": np.ones((2, 16), np.float32)}
    arrays[f"{stem}B.weight"] = np.ones((16, 2), np.float32)
    folder.mkdir()
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"lora_alpha": 4, "r": 2}')
    return folder


def test_a_loaded_jax_would_be_noticed():
    """The twin."""
    assert "jaxlib" in heavy_after("import jaxlib")


def test_the_dependencies_are_those_named():
    """What the file-to-file code imports is in the standard library or in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {d.split(">")[0].split("=")[0].replace("-", "_") for d in project["dependencies"]}
    own = {m.split(".")[0] for m in modules()} | {"jaxshard", "", "__future__", "__version__"}
    outside = {m for m in graph() if not m.startswith("training")}  # flax … are the user's own
    used = {u.split(".")[0] for m in outside for u in graph(only_at_import=True)[m]}
    foreign = used - own - set(sys.stdlib_module_names)
    foreign = {"orbax_checkpoint" if m == "orbax" else m for m in foreign}
    optional = {"yaml"}  # the extra of that name: imported where a YAML file is read
    assert foreign - optional <= named
    assert not [m for m in optional if users_of(m, only_at_import=True)]
