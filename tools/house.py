"""Print measures of the code's structure; with -v, also list what each of them counts.

    python tools/house.py [-v]

``tests/test_house.py`` holds limits for these numbers.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxshard"
PROSE = ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "benchmarks/README")
FORMATS = {"huggingface", "ranks", "ckpt", "unified", "iteration", "orbax"}
#: Words of a private dialect: each has a plainer one in docs/decisions or in the field.
DIALECT = re.compile(
    r"\b(told|tells? of|tell|said|says|say|hears?|heard|nobody|somebody|whoever|whatever|wherever"
    r"|likewise|anew|seldom|journeys?|leavings|lest|beside|is none|is no|are no|meant|wish)\b",
    re.IGNORECASE,
)


@cache
def modules() -> dict[str, tuple[Path, str, ast.Module]]:
    """Path, source and syntax tree of each module, by dotted name without ``jaxshard.``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)
        found[name] = path, path.read_text(), ast.parse(path.read_text())
    return found


@cache
def graph() -> dict[str, set[str]]:
    """The modules that each module imports, inside functions and for type checkers too."""
    return {name: set(_imports(name)) - {name, "__init__"} for name in modules()}


def _imports(module: str) -> Iterator[str]:
    path, _, tree = modules()[module]
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [(f"{stem}.{alias.name}", stem) for alias in node.names]
        else:
            continue
        for pair in names:  # of ``from .layout import Layout`` the second may be a module
            known = [n for n in (p.removeprefix("jaxshard.") for p in pair) if n in modules()]
            yield from known[:1]


def walk(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    """Every node of ``kind`` with its module."""
    for name, (_, _, tree) in modules().items():
        yield from ((name, node) for node in ast.walk(tree) if isinstance(node, kind))


def single_importer() -> list[str]:
    """Modules with one importer."""
    importers = Counter(used for names in graph().values() for used in names)
    return [m for m, (path, *_) in modules().items() if importers[m] == 1 and not _is_package(path)]


def circles() -> list[str]:
    """Groups of modules that import each other, unless they are a package and its modules."""
    reached = {m: _reached(m) for m in graph()}
    groups = {tuple(sorted(n for n in reached[m] if m in reached[n])) for m in graph()}
    return [" ".join(g) for g in groups if len({m.split(".")[0] for m in g}) > 1] + [
        " ".join(g) for g in groups if len(g) > 1 and all("." in m for m in g)
    ]


def _reached(start: str) -> set[str]:
    seen, todo = set[str](), [start]
    while todo:
        for other in graph()[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen


def _is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def _repeated(homes: dict[str, list[str]]) -> list[str]:
    return [f"{name}: {', '.join(sorted(m))}" for name, m in sorted(homes.items()) if len(m) > 1]


def stems_twice() -> list[str]:
    """File names that two packages have."""
    homes = defaultdict(list)
    for name, (path, *_) in modules().items():
        if not _is_package(path):
            homes[path.stem].append(name)
    return _repeated(homes)


def classes_twice() -> list[str]:
    """Class names that two modules have."""
    homes = defaultdict(list)
    for name, (_, _, tree) in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    return _repeated(homes)


def _public_functions(uses_any: Callable[[ast.FunctionDef], bool]) -> list[str]:
    functions = ((m, n) for m, n in walk(ast.FunctionDef) if not n.name.startswith("_"))
    return [f"{m}.{node.name}" for m, node in functions if uses_any(node)]


def any_kwargs() -> list[str]:
    """Public functions with ``**name: Any``."""
    return _public_functions(
        lambda f: f.args.kwarg is not None and _has_any(f.args.kwarg.annotation)
    )


def any_signatures() -> list[str]:
    """Public functions with ``Any`` in their signature."""
    return _public_functions(
        lambda f: (
            _has_any(f.returns)
            or any(_has_any(a.annotation) for a in ast.walk(f.args) if isinstance(a, ast.arg))
        )
    )


def _has_any(annotation: ast.AST | None) -> bool:
    return annotation is not None and bool(re.search(r"\bAny\b", ast.unparse(annotation)))


def _names_formats(node: ast.AST | None) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & FORMATS


def format_lists() -> list[str]:
    """Literals that list three or more formats."""
    literals = (ast.Tuple, ast.List, ast.Set, ast.Dict)
    return [
        f"{m}:{node.lineno}"
        for m, node in walk(literals)
        if len({n.value for n in _items(node) if isinstance(n, ast.Constant)} & FORMATS) > 2
    ]


def _items(node: ast.AST) -> list[ast.AST]:
    return node.keys if isinstance(node, ast.Dict) else node.elts


def format_comparisons() -> list[str]:
    """Comparisons with a format's name outside ``formats/``."""
    return [
        f"{m}:{node.lineno}"
        for m, node in walk((ast.Compare, ast.MatchValue))
        if not m.startswith("formats.") and _names_formats(node)
    ]


def dialect() -> list[str]:
    """Words of the private dialect in strings, comments and documents."""
    found = []
    for path, text, tree in modules().values():
        texts = [
            (n.lineno, n.value)
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " in n.value
        ]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        texts += [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
        place = path.relative_to(ROOT)
        found += [f"{place}:{line}: {w}" for line, t in texts for w in DIALECT.findall(t)]
    pages = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / f"{name}.md" for name in PROSE)]
    for page in pages:
        found += [f"{page.relative_to(ROOT)}: {w}" for w in DIALECT.findall(page.read_text())]
    return found


def without_named_tests() -> list[str]:
    """Modules M of packages P that have neither ``test_M.py`` nor ``test_P_M.py``."""
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests").rglob("test_*.py")}
    found = []
    for name, (path, _, tree) in modules().items():
        package, stem = path.parent.name, path.stem.strip("_")
        names = {package} if _is_package(path) else {stem, f"{package}_{stem}"}
        if len(tree.body) > 1 and not names & tests:  # one statement: the docstring of a package
            found.append(name)
    return found


def measures() -> dict[str, list[str]]:
    """Everything that is counted, by its name in the table."""
    at_top = sorted({name.split(".")[0] for name in modules()} - {"__init__", "__main__"})
    return {
        "lines": [line for _, text, _ in modules().values() for line in text.splitlines()],
        "files": list(modules()),
        "modules with one importer": single_importer(),
        "packages and modules at the top": at_top,
        "modules at the root": [n for n in at_top if modules()[n][0].parent == PACKAGE],
        "circles": circles(),
        "file names in two packages": stems_twice(),
        "class names in two modules": classes_twice(),
        "public functions with **Any": any_kwargs(),
        "public functions with Any": any_signatures(),
        "lists of formats": format_lists(),
        "comparisons with a format's name": format_comparisons(),
        "words of the dialect": dialect(),
        "modules without tests of their name": without_named_tests(),
    }


def main() -> None:
    """Print the table."""
    for name, found in measures().items():
        print(f"{name:40} {len(found):7,}")
        if "-v" in sys.argv and name not in ("lines", "files"):
            print(*(f"    {item}" for item in found), sep="\n")


if __name__ == "__main__":
    main()
