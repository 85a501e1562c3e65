"""Kills at every publishing call: the old result or the new one, and the same command again ends.

Run as a program: for each scenario a forked child runs the command once and counts its calls that
change the file system (rename, renameat2, link, unlink, mkdir, fsync, open for writing …). Then,
for each of these calls and for both moments, before it and after it, a child is killed there.
Afterwards the destination must hold the old result or the new one, whole, and the same command
again must complete, or say truly that the result exists or how to go on; nothing is left behind.

    python tests/support/publishing_kills.py DIR [--only SCENARIO …] [--every N] [--twice N]

``--every`` takes each N-th call only; ``--twice`` kills N runs that recover from a kill as well.
A fork costs milliseconds: no device is awake, and a conversion does not even import JAX.
"""

from __future__ import annotations

import argparse
import builtins
import fcntl
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import checkpoints
import jax
import numpy as np
from golden_files import golden

import jaxshard as js
from jaxshard.cli import main as command_line
from jaxshard.conversion.decrypt import decrypt
from jaxshard.distributed.processes import Processes
from jaxshard.errors import JaxshardError
from jaxshard.storage import fs, staging, transaction

CALLS = (
    *("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir"),
    *("fsync", "ftruncate", "truncate", "pwrite", "pwritev", "sendfile", "setxattr"),
)
RESUME, EXISTS = "Go on with resume=True", " exists. Choose"


@dataclass(frozen=True)
class World:
    """The folder of one trial."""

    root: Path
    source: Path
    name: str

    @property
    def out(self) -> Path:
        return self.root / self.name


Run = Callable[[World, dict[str, bool]], None]


@dataclass(frozen=True)
class Scenario:
    """A command, with what lies at its destination before."""

    run: Run
    out: str = "out"
    flags: dict[str, bool] = field(default_factory=dict)
    again: Run | None = None  # if another order
    is_old_kernel: bool = False  # neither exchange nor renames that refuse

    @property
    def replaces(self) -> bool:
        return self.flags.get("overwrite", False)


# --- the commands -------------------------------------------------------------------------


def converted(*to: str, **how: object) -> Run:
    def run(world: World, flags: dict[str, bool]) -> None:
        js.convert(world.source, world.out, *to, workers=1, **flags, **how)

    return run


def in_parts(*order: int) -> Run:
    def run(world: World, flags: dict[str, bool]) -> None:
        for index in order:
            options = {"workers": 1, "process_index": index, "process_count": 2, **flags}
            js.convert(world.source, world.out, "mp2", **options)

    return run


def saved(format: str) -> Run:
    def run(world: World, flags: dict[str, bool]) -> None:
        seed = int(world.source.name == "llama")
        arrays = {f"x{i}": np.full((4, 4), seed + i, np.float32) for i in range(2)}
        js.save(arrays, world.out, format=format, workers=1, **flags)

    return run


def saved_by_several(*, shared: bool) -> Run:
    """A save as process 0 of a job makes it; the others' meetings are left out."""

    def run(world: World, flags: dict[str, bool]) -> None:
        Processes.are_several = property(lambda self: True)
        seed = int(world.source.name == "llama")
        arrays = {"x": jax.numpy.full((4, 4), seed, "float32")}
        js.save(arrays, world.out, format="ranks", shared_filesystem=shared, workers=1, **flags)

    return run


def decrypted(world: World, flags: dict[str, bool]) -> None:
    name = "enc_AES-GCM.ckpt" if world.source.name == "llama" else "enc_AES-CBC.ckpt"
    decrypt(golden("ckpt_formats", name), world.out, b"0123456789ABCDEF", **flags)


def strategies(*words: str) -> Run:
    def run(world: World, flags: dict[str, bool]) -> None:
        to = "mp2" if world.source.name == "llama" else "mp4"
        arguments = ["strategy", "make", str(world.source), str(world.out), "--to", to, *words]
        flag = ["--overwrite"] if flags.get("overwrite") else []
        errors, sys.stderr = sys.stderr, io.StringIO()
        try:
            if command_line([*arguments, "--quiet", *flag]):
                raise JaxshardError(sys.stderr.getvalue())
        finally:
            sys.stderr = errors

    return run


SHARDS = {"max_shard_size": 4096}
_KINDS: dict[str, tuple[str, Run]] = {
    "ranks": ("out", converted("mp2")),
    "ranks ckpt": ("out", converted("mp2", format="ckpt", crc=True)),
    "huggingface": ("out", converted("full", **SHARDS)),
    "iteration": ("out", converted("mp2", format="iteration")),
    "unified": ("out", converted("full", format="unified")),
    "one safetensors": ("out.safetensors", converted()),
    "one ckpt": ("out.ckpt", converted()),
    "convert orbax": ("out", converted("full", format="orbax")),
    "save huggingface": ("out", saved("huggingface")),
    "save ranks": ("out", saved("ranks")),
    "save ckpt": ("out", saved("ckpt")),
    "save orbax": ("out", saved("orbax")),
    "save by several": ("out", saved_by_several(shared=True)),
    "save by several apart": ("out", saved_by_several(shared=False)),
    "decrypt": ("out.ckpt", decrypted),
    "strategy folder": ("out", strategies()),
    "strategy file": ("out.ckpt", strategies("--merged")),
}


def scenarios() -> dict[str, Scenario]:
    """All of them by name."""
    found = {}
    for kind, (out, run) in _KINDS.items():
        if kind == "decrypt" and not find_spec("cryptography"):
            continue
        found[kind] = Scenario(run, out)
        found[f"{kind}, overwrite"] = Scenario(run, out, {"overwrite": True})
    for kind in ("ranks", "one safetensors"):
        out, run = _KINDS[kind]
        found[f"{kind}, resume"] = Scenario(run, out, {"resume": True})
        both = {"resume": True, "overwrite": True}
        found[f"{kind}, overwrite and resume"] = Scenario(run, out, both)
        found[f"{kind}, old kernel"] = Scenario(run, out, both, is_old_kernel=True)
    for name, again in (("in order", (0, 1)), ("the other way", (1, 0)), ("the last", (1,))):
        for flags in ({}, {"overwrite": True}):
            full = f"parts, again {name}{', overwrite' if flags else ''}"
            first = in_parts(1) if len(again) == 1 else in_parts(0, 1)
            found[full] = Scenario(first, flags=flags, again=in_parts(*again))
    return found


def prepare(scenario: str, made: Scenario, world: World, old: Path | None) -> None:
    """Have the old result there, and what parts that ended before left."""
    if old is not None:
        copy(old, world.out)
    if "the last" in scenario:
        in_parts(0)(world, made.flags)


# --- children that are killed ---------------------------------------------------------------


class Counting:
    """Counts the calls below ``root``, and kills the process at one of them."""

    def __init__(self, root: Path, at: int = -1, when: str = "before") -> None:
        self.root, self.at, self.when = str(root), at, when
        self.names: list[str] = []
        self._lock = threading.Lock()

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.around(name, getattr(os, name)))
        fcntl.flock = self.around("flock", fcntl.flock)
        builtins.open = io.open = self.opening(io.open)
        os.open = self.opening(os.open)
        function = fs._function

        def called(name: str) -> object:
            call = function(name)
            return call if call is None else self.around(name, call)

        fs._function = called

    def opening(self, call: Callable) -> Callable:
        counted = self.around("open", call)

        def opened(path: object, mode: object = "r", *args: object, **how: object) -> object:
            writes = set("wax+") & set(mode) if isinstance(mode, str) else mode & os.O_CREAT
            return (counted if writes else call)(path, mode, *args, **how)

        return opened

    def around(self, name: str, call: Callable) -> Callable:
        def called(*args: object, **how: object) -> object:
            paths = [os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike)]
            if paths and paths[0][:1] == "/" and not paths[0].startswith(self.root):
                return call(*args, **how)
            with self._lock:
                number = len(self.names)
                self.names.append(name + " " + " ".join(os.path.basename(p) for p in paths))
            if number == self.at and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **how)
            finally:
                if number == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)

        return called


def forked(work: Callable[[], object]) -> tuple[int, dict]:
    """What ``work`` gave in a child of its own, and how the child ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            answer = {"value": work()}
        except JaxshardError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        except BaseException as error:
            answer = {"error": f"TRACEBACK {error!r}"}
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    return os.waitpid(pid, 0)[1], json.loads(text or b"{}")


def command(scenario: Scenario, world: World, counting: Counting | None, **more: bool) -> dict:
    """Run the command in a child; its answer, {} if it was killed."""

    def work() -> object:
        if scenario.is_old_kernel:
            fs.rename_new = lambda a, b: False
            transaction.exchange = lambda a, b: False
        if counting:
            counting.install()
        run = scenario.run if counting or not scenario.again else scenario.again
        run(world, {**scenario.flags, **more})
        return counting.names if counting else None

    return forked(work)[1]


# --- trials --------------------------------------------------------------------------------


def copy(source: Path, place: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, place)
    else:
        shutil.copytree(source, place)


def content(place: Path) -> object:
    """What lies at ``place``, to be compared; Orbax writes times and random names."""
    if not os.path.lexists(place):
        return None
    if place.is_file():
        return place.read_bytes()
    files = checkpoints.files_of(place)
    if any(name.endswith("_METADATA") for name in files):
        return forked(lambda: tensors(place))[1].get("value", "no checkpoint")
    if "elsewhere.json" in files:  # its contents without the random identity of the save
        record = json.loads((place / "elsewhere.json").read_text())
        files["elsewhere.json"] = json.dumps({**record, "save": "", "is": bool(record["save"])})
    return files


def tensors(place: Path) -> dict[str, str]:
    """The bytes of all tensors, as text."""
    return {name: array.tobytes().hex() for name, array in js.load_rank(place, "full").items()}


@dataclass
class Trials:
    """All kills of one scenario."""

    name: str
    scenario: Scenario
    base: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept = self.base / "kept"
        self.new, self.old = self._made(kept / "new", "llama"), None
        if self.scenario.replaces:
            self.old = self._made(kept / "old", "other")
        self.contents = {"new": content(self.new), "old": content(self.old) if self.old else None}

    def _made(self, root: Path, source: str) -> Path:
        root.mkdir(parents=True)
        world = World(root, self.base.parent / source, self.scenario.out)
        run = in_parts(0, 1) if self.scenario.again else self.scenario.run
        if self.name.startswith(("save", "convert orbax")):  # threads do not survive a fork
            answer = forked(lambda: run(world, {}))[1]
            assert "value" in answer, answer
        else:  # here, so that the children find everything imported
            run(world, {})
        return world.out

    def world(self) -> World:
        root = self.base / "trial"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        world = World(root, self.base.parent / "llama", self.scenario.out)
        prepare(self.name, self.scenario, world, self.old)
        return world

    def calls(self) -> list[str]:
        world = self.world()
        answer = command(self.scenario, world, Counting(world.root))
        self._check("undisturbed", world, {"new"})
        return answer["value"]

    def kill(self, at: int, when: str, again_at: int = -1) -> None:
        """Kill at one call, perhaps the recovery at another, and look."""
        world, label = self.world(), f"{when} call {at}"
        if command(self.scenario, world, Counting(world.root, at, when)):
            self.outcomes["not reached"] += 1
            return
        self.outcomes["kills"] += 1
        found = self._found(world)
        if (
            found is None
            and self.scenario.is_old_kernel
            and staging.staging_folder(world.out).exists()
        ):
            found = "old"  # between the two renames: not at its place, and not lost
        self.outcomes[f"then {found}"] += 1
        self._expect(found in ("new", "old"), label, f"the destination holds {found}")
        if again_at >= 0:
            label += f", again at {again_at}"
            if command(self.scenario, world, Counting(world.root, again_at, when)) == {}:
                self.outcomes["kills of recoveries"] += 1
        self._again(label, world)

    def _again(self, label: str, world: World) -> None:
        there, base = self._found(world), staging.staging_folder(world.out)
        is_over = not base.exists() or self.name.startswith(("save", "decrypt", "strategy"))
        answer = command(self.scenario, world, None)
        error = answer.get("error", "")
        if RESUME in error and not self.scenario.flags:
            self.outcomes["again: go on with resume"] += 1
            answer = command(self.scenario, world, None, resume=True)
        elif EXISTS in error and there == "new" and is_over and not self.scenario.replaces:
            self.outcomes["again: it exists"] += 1
            answer = {"value": None}
        else:
            self.outcomes["again: completes"] += 1
        self._expect("value" in answer, label, f"again: {answer.get('error')}")
        self._check(label, world, {"new"})

    def _found(self, world: World) -> str | None:
        at = content(world.out)
        if at is None:
            return None if self.old else "old"
        return next((name for name in ("new", "old") if at == self.contents[name]), "a mixture")

    def _check(self, label: str, world: World, wanted: set[str]) -> None:
        found = self._found(world)
        self._expect(found in wanted, label, f"in the end it holds {found}")
        left = sorted(p.name for p in world.root.iterdir() if p != world.out)
        self._expect(not left, label, f"left behind: {left}")

    def _expect(self, holds: bool, label: str, what: str) -> None:
        if not holds:
            self.wrong.append(f"{self.name}: {label}: {what}")


def moments(calls: int, every: int) -> Iterator[tuple[int, str]]:
    for at in range(0, calls, every):
        yield at, "before"
        yield at, "after"


def sources(base: Path) -> None:
    """The checkpoint that is converted, and the one that old results are of."""
    for name, seed in (("llama", 0), ("other", 1)):
        checkpoints.write_llama(base / name, layers=1, num_files=2, seed=seed)


def tried(name: str, base: Path, *, every: int = 1, twice: int = 0) -> Trials:
    """Kill the scenario at each ``every``-th call."""
    place = base / name.replace(" ", "_").replace(",", "")
    trials = Trials(name, scenarios()[name], place)
    calls = trials.calls()
    for at, when in moments(len(calls), every):
        trials.kill(at, when)
    chosen = random.Random(name)
    for _ in range(twice):
        trials.kill(chosen.randrange(len(calls)), "after", chosen.randrange(len(calls)))
    trials.outcomes["calls"] = len(calls)
    return trials


def break_it() -> None:
    """Take the old result away before the new one is there, which is what must not be done."""

    def swap(base: Path, new: Path, place: Path, kind: object) -> None:
        fs.delete(place)
        os.rename(new, place)

    transaction._swap = swap


def main() -> int:
    logging.disable()
    warnings.simplefilter("ignore")  # a fork beside JAX is warned of; no device is awake here
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="*", choices=scenarios(), metavar="SCENARIO")
    parser.add_argument("--broken", action="store_true", help="publish in steps: must be found")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--twice", type=int, default=0)
    options = parser.parse_args()
    if options.broken:
        break_it()
    sources(options.directory)
    total: Counter[str] = Counter()
    wrong: list[str] = []
    for name in options.only or scenarios():
        trials = tried(name, options.directory, every=options.every, twice=options.twice)
        total += trials.outcomes
        wrong += trials.wrong
        print(name, json.dumps(trials.outcomes), *trials.wrong[:5], sep="\n  ", flush=True)
        shutil.rmtree(trials.base)
    print(json.dumps({"total": total, "wrong": len(wrong)}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
