"""Names of rank files: which file of each rank folder belongs to a save.

    rank_3/llama_rank_3-1_10.safetensors        {prefix}_rank_{r}-{epoch}_{step}
    rank_3/llama_rank_3_2-1_10.safetensors      …_{task}-…: a third job saved here too
    rank_3/llama-1_10.safetensors               {prefix}-{epoch}_{step}, in every folder alike
    rank_3/net.safetensors                      what MindSpore slices
    rank_3/checkpoint_3.ckpt                    {prefix}{r}, what a transform writes

One name alone is ambiguous: in ``rank_1/``, the last number of ``llama-1_1`` may be the step
or the rank. So a name is read in every way it can be, and the reading that most rank folders
share is the right one. Files of one reading are a *save*. The newest save has the largest
numbers, epoch first, and step 10 comes after step 9. This module opens no file.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.layout import Layout, Placement, Spec
from ..core.strategy import Axes
from ..errors import CoverageError, LayoutError, format_list

_RANK_FILE = re.compile(r"rank_(\d{1,7})/([^/]+)\.(safetensors|ckpt)")
_KIND = re.compile(r"(?:^|\.)(ckpt|safetensors)$")
_NUMBERS = re.compile(r"\d{1,18}")
_STEPPED = re.compile(  # how a name ends that has an epoch and a step in it
    r"(?:-network|-trainable_params)?"
    r"-(?P<epoch>\d{1,18})_(?P<step>\d{1,18})(?:_breakpoint)?$"
)
_TASK = re.compile(r"_(\d{1,18})$")
_COUNTED = re.compile(r"(?:^|[-_])(\d{1,18})(?:_(\d{1,18}))?$")
_NAMED = re.compile(r".*rank_(\d{1,7})(?=$|[-_])")
_PREFIX = re.compile(r"[^/\0.][^/\0]*")
_MAX_RANK = 1 << 20  # a folder called rank_9999999 is no rank

_MARKED, _ENDED, _PLAIN = "rank_{r}", "{r}", ""


class Step(NamedTuple):
    """When a file was saved, as its name tells; compared in this order."""

    numbers: tuple[int, ...]  # (epoch, step), as far as there are any
    task: tuple[int, ...]


_NO_STEP = Step((), ())


class Choice(NamedTuple):
    """The file of each rank, the step in their names, and notes on how they were chosen."""

    paths: dict[int, str]
    notes: tuple[str, ...]
    step: Step


class _Reading(NamedTuple):
    """One way to read a file's name: what comes before the rank, and what after it."""

    form: str
    head: str
    tail: str
    extension: str

    @property
    def rankless(self) -> str:
        """The name without the rank, which is the same for all ranks."""
        head = self.head.removesuffix("rank_") if self.form == _MARKED else self.head
        return (head.rstrip("_") + self.tail).strip("-_")


@dataclass(slots=True)
class _Save:
    """The files of one reading, by rank.

    Attributes:
        suffix: what of the name is the step, as a suffix may select it.
    """

    reading: _Reading
    paths: dict[int, str] = field(default_factory=dict)
    step: Step = _NO_STEP
    suffix: str = ""


def is_rank_file(path: str) -> bool:
    """Whether ``path`` is a weight file in a rank's folder."""
    match = _RANK_FILE.fullmatch(path)
    return match is not None and int(match[1]) < _MAX_RANK


def file_path(
    rank: int, prefix: str, step: tuple[int, int] | None, extension: str = "safetensors"
) -> str:
    """Where a rank's file lies, in a name that MindSpore and MindFormers both read.

    MindFormers looks in every rank folder for what follows the rank in rank 0's name, so the
    rank is nowhere else in it. Without a step the name is alike for all ranks, as MindSpore
    slices.

    >>> file_path(3, "llama", (1, 10)), file_path(3, "net", None)
    ('rank_3/llama_rank_3-1_10.safetensors', 'rank_3/net.safetensors')
    """
    name = prefix if step is None else f"{prefix}_rank_{rank}-{step[0]}_{step[1]}"
    return f"rank_{rank}/{name}.{extension}"


def check_prefix(prefix: str) -> str:
    """``prefix`` as names begin with it: what joins it to the rest is left away.

    Raises:
        LayoutError: names would lie elsewhere, be hidden, or begin with nothing.
    """
    bare = prefix.rstrip("-_")
    if not _PREFIX.fullmatch(bare):
        raise LayoutError(
            f"prefix= (--prefix) {prefix!r} cannot begin a file's name. Use letters, digits, '-' "
            "and '_'."
        )
    return bare


def read_step(text: str | None) -> tuple[int, int] | None:
    """The step written ``1_10``; None for ``none``, which is a name without one.

    Raises:
        LayoutError: neither.

    >>> read_step("1_10"), read_step("none")
    ((1, 10), None)
    """
    if text == "none":
        return None
    match = re.fullmatch(r"(\d{1,18})_(\d{1,18})", text or "")
    if match is None:
        raise LayoutError(
            f"step= (--step) {text!r} is neither an epoch and a step in it, such as 1_10, nor none."
        )
    return int(match[1]), int(match[2])


def step_of(paths: Iterable[str]) -> tuple[int, int] | None:
    """The epoch and the step in the names of one save's files; None where they have none."""
    paths = [path for path in paths if is_rank_file(path)]
    numbers = choose(paths).step.numbers if paths else ()
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def choose(files: Iterable[str], suffix: str | None = None) -> Choice:
    """The newest save of which every rank has a file; of those ending in ``suffix`` if given.

    A suffix is what follows the rank (``1_10``, ``_2-1_10``), the end of that, or, where several
    prefixes lie together, the whole name with the rank taken out (``llama-1_10``). It may end in,
    or be, the kind of file that counts (``1_10.ckpt``, ``.safetensors``).

    Raises:
        CoverageError: the names do not tell, kinds of files are mixed, or no step is
            there for all ranks.
    """
    candidates: dict[int, list[str]] = {}
    for path in files:
        if is_rank_file(path):
            candidates.setdefault(int(path[5 : path.index("/")]), []).append(path)
    saves, notes = _saves(candidates)
    found = _suffixed(saves, suffix)
    _refuse_mixed(found)
    whole = [save for save in found if len(save.paths) == len(candidates)] or _alike(
        found, len(candidates)
    )
    if not whole:
        raise _incomplete(candidates, suffix)
    newest = max(save.step for save in whole)
    chosen = _only_one([save for save in whole if save.step == newest])
    notes += _copies(chosen, candidates)
    newer = sorted({rank for save in found if save.step > newest for rank in save.paths})
    if newer:
        notes.append(
            f"rank {format_list(map(str, newer))} has newer files; the newest step that every rank "
            "has is taken."
        )
    return Choice(chosen.paths, tuple(notes), newest)


def _copies(save: _Save, candidates: Collection[int]) -> list[str]:
    """A note where all folders have a file that by its name is one rank's."""
    named = _NAMED.match(save.reading.head) if save.reading.form == _PLAIN else None
    if named is None or len(candidates) < 2 or int(named[1]) not in candidates:
        return []
    return [
        f"{save.reading.head} is in every rank folder, and by its name the file of rank {named[1]};"
        " it is read as a name without a rank. If these are copies of one rank, fetch the others."
    ]


def _incomplete(candidates: Mapping[int, Sequence[str]], suffix: str | None) -> CoverageError:
    found = format_list(f"rank {r}: {format_list(candidates[r], 2)}" for r in sorted(candidates))
    wanted = f" ending in {suffix}" if suffix else ""
    return CoverageError(
        f"no step{wanted} has a file in every one of the {len(candidates)} rank folders ({found}). "
        "Choose one with suffix= (--suffix), or fetch the missing files."
    )


# --- reading names -------------------------------------------------------------------------


def _saves(candidates: Mapping[int, Sequence[str]]) -> tuple[list[_Save], list[str]]:
    """The files of all ranks, save by save; and a note where a name is that of another rank."""
    first = {_stem(path) for path in candidates.get(0, ())}
    readings = {
        (rank, path): tuple(_readings(path, rank, first))
        for rank, paths in candidates.items()
        for path in sorted(paths)
    }
    count: dict[_Reading, int] = defaultdict(int)
    for ways in readings.values():
        for way in ways:
            count[way] += 1
    saves: dict[_Reading, _Save] = {}
    strange: dict[int, list[str]] = {}
    for (rank, path), ways in readings.items():
        reading = max(ways, key=lambda way: _weight(way, count[way]))
        if reading.form == _PLAIN and count[reading] == 1 and _other_rank(path, rank) is not None:
            strange.setdefault(rank, []).append(path)
        saves.setdefault(reading, _Save(reading)).paths[rank] = path
    _find_steps(saves.values())
    return _without_strange(list(saves.values()), strange, candidates)


def _readings(path: str, rank: int, first: Iterable[str]) -> Iterator[_Reading]:
    """The ways to read the name of a file of ``rank``; ``first`` are the names of rank 0."""
    stem, extension = _stem(path), path.rsplit(".", 1)[1]
    yield _Reading(_PLAIN, stem, "", extension)
    named = _NAMED.match(stem)
    if named and int(named[1]) == rank:
        yield _Reading(_MARKED, stem[: named.start(1)], stem[named.end(1) :], extension)
    number = str(rank)
    if not stem.endswith(number):
        return
    head = stem.removesuffix(number)
    stepped = _STEPPED.search(stem)
    # MindSpore counts steps from 1: where rank 0 has a 0 in the place of the step, it is the rank
    if not stepped or (stepped["step"] == number and f"{head}0" in first):
        yield _Reading(_ENDED, head, "", extension)


def _weight(reading: _Reading, num_ranks: int) -> tuple[int, int]:
    """What a reading that ``num_ranks`` folders share is worth; the largest is right."""
    if num_ranks > 1:  # the same name in several folders has no rank in it
        return num_ranks, (_ENDED, _PLAIN, _MARKED).index(reading.form)
    if reading.form == _ENDED and reading.head[-1:].isdigit():
        return num_ranks, -1  # the end of a longer number
    return num_ranks, (_PLAIN, _ENDED, _MARKED).index(reading.form)


def _find_steps(saves: Iterable[_Save]) -> None:
    """Read the step of each save; a number before it is a task only where its prefix has others.

    MindSpore adds ``_{task}`` where files of a prefix are there already. ``llama_2-1_10`` alone
    is of the prefix ``llama_2``; beside ``llama-1_10`` it is of the third job of ``llama``.
    """
    saves = list(saves)
    prefixes = {_prefix(save) for save in saves}
    shared = Counter(_TASK.sub("", prefix) for prefix in prefixes)
    for save in saves:
        prefix, reading = _prefix(save), save.reading
        task = _TASK.search(prefix)
        if task and prefix[: task.start()] not in prefixes and shared[prefix[: task.start()]] == 1:
            task = None
        if reading.form == _ENDED:
            save.suffix = reading.head
        elif reading.form == _MARKED:
            numbers = tuple(map(int, _NUMBERS.findall(reading.tail)))
            save.step, save.suffix = Step(numbers[-2:], numbers[:-2]), reading.tail
        elif stepped := _STEPPED.search(reading.head):
            numbers = int(stepped["epoch"]), int(stepped["step"])
            save.step = Step(numbers, (int(task[1]),) if task else ())
            save.suffix = reading.head[task.start() if task else stepped.start() :]
        else:
            counted = _COUNTED.search(reading.head)
            numbers = tuple(int(n) for n in counted.groups() if n) if counted else ()
            save.step, save.suffix = Step(numbers, ()), reading.head


def _prefix(save: _Save) -> str:
    """What comes before the step in a name without a rank; empty for others."""
    stepped = _STEPPED.search(save.reading.head) if save.reading.form == _PLAIN else None
    return save.reading.head[: stepped.start()] if stepped else ""


def _without_strange(
    saves: list[_Save], strange: Mapping[int, list[str]], candidates: Mapping[int, Sequence[str]]
) -> tuple[list[_Save], list[str]]:
    """``saves`` without files of other ranks, unless a rank has no others."""
    notes = []
    for rank, paths in strange.items():
        left = len(paths) < len(candidates[rank])
        notes.append(
            f"{format_list(paths, 3)}: by its name the file of rank {_other_rank(paths[0], rank)}; "
            + ("it is passed over." if left else f"it is taken for that of rank {rank}.")
        )
        for save in saves if left else ():
            if save.paths.get(rank) in paths:
                del save.paths[rank]
    return [save for save in saves if save.paths], notes


def _other_rank(path: str, rank: int) -> int | None:
    """The rank in a file's name, where it is another than ``rank``."""
    named = _NAMED.match(_stem(path))
    return int(named[1]) if named and int(named[1]) != rank else None


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[1].rsplit(".", 1)[0]


# --- choosing ------------------------------------------------------------------------------


def _suffixed(saves: list[_Save], suffix: str | None) -> list[_Save]:
    """Those of ``saves`` that ``suffix`` means; see ``choose``."""
    if suffix is None:
        return saves
    kind = _KIND.search(suffix)
    if kind is not None:
        suffix = suffix[: kind.start()]
        saves = [s for s in saves if s.reading.extension == kind[1]]
    bare = suffix.lstrip("-_")
    if not bare:
        return saves
    exact = [s for s in saves if s.suffix.lstrip("-_") == bare]
    whole = [s for s in saves if s.reading.rankless == suffix]
    return (
        exact
        or whole
        or [s for s in saves if all(_ends(_stem(p), suffix) for p in s.paths.values())]
    )


def _ends(stem: str, suffix: str) -> bool:
    """Whether ``stem`` ends in ``suffix`` and not in the middle of a number."""
    cut = len(stem) - len(suffix)
    return stem.endswith(suffix) and (
        cut == 0 or not (suffix[:1].isdigit() and stem[cut - 1].isdigit())
    )


def _refuse_mixed(saves: Iterable[_Save]) -> None:
    kinds = {s.reading.extension: next(iter(s.paths.values())) for s in saves}
    if len(kinds) > 1:
        raise CoverageError(
            f"the rank folders have both {' and '.join(kinds.values())}, and nothing says which "
            f"kind counts. Choose with suffix= (--suffix): .{' or .'.join(kinds)}."
        )


def _alike(saves: Iterable[_Save], num_ranks: int) -> list[_Save]:
    """One save of all files, where each rank has one and only their prefixes differ."""
    paths: dict[int, str] = {}
    steps = set()
    for save in saves:
        steps.add(save.step)
        for rank, path in save.paths.items():
            if rank in paths or _other_rank(path, rank) is not None:
                return []
            paths[rank] = path
    if len(steps) != 1 or len(paths) != num_ranks:
        return []
    return [_Save(_Reading(_PLAIN, "", "", ""), paths, steps.pop())]


def _only_one(saves: list[_Save]) -> _Save:
    """The one of ``saves``, which are all of one step.

    Raises:
        CoverageError: there are several.
    """
    if len(saves) > 1:
        rank = min(saves[0].paths)
        one, other = sorted(saves, key=lambda save: save.paths[rank])[:2]
        raise CoverageError(
            f"rank_{rank} has both {one.paths[rank]} and {other.paths[rank]}, and their names do "
            "not tell which is newer. Choose with suffix= (--suffix): "
            f"{one.reading.rankless} or {other.reading.rankless}."
        )
    return saves[0]


# --- Rank redundancy: which of the ranks that hold the same shard keeps it, as MindSpore decides

Holders = tuple[tuple[int, ...], ...]


def keepers(layout: Layout) -> dict[tuple[str, int], int]:
    """For each name and first rank of a placement, the index of the keeper among the holders.

    >>> rows = Placement((("dp", 2), ("mp", 2)), (("mp",),))
    >>> keepers(Layout(4, {"w2": (rows,), "w1": (rows,)}))
    {('w1', 0): 0, ('w2', 0): 1}
    """
    alike: dict[Holders, int] = {}
    groups: dict[tuple[Axes, Spec], tuple[int, int]] = {}  # which of alike, and how many replicas
    turns: dict[tuple[int, int], int] = {}
    found: dict[tuple[str, int], int] = {}
    for name in sorted(layout.placements):
        for placed in layout.placements[name]:
            cut = placed.axes, placed.spec
            if cut not in groups:  # seldom: the holders may be thousands
                holders = _holders(placed)
                groups[cut] = alike.setdefault(holders, len(alike)), len(holders[0])
            group, replicas = groups[cut]
            turn = turns.get((placed.first_rank, group), 0)
            turns[placed.first_rank, group] = turn + 1
            found[name, placed.first_rank] = turn % replicas
    return found


def _holders(placement: Placement) -> Holders:
    """For each shard the ranks that hold it, counted from the first of the placement."""
    shape = tuple(placement.ways(dim) for dim in range(len(placement.spec)))
    return tuple(shard.holders for shard in placement.shards(shape))
