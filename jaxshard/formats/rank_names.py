"""File names of rank folders: parsing them and choosing the newest complete save.

    rank_3/llama_rank_3-1_10.safetensors        {prefix}_rank_{r}-{epoch}_{step}
    rank_3/llama_rank_3_2-1_10.safetensors      …_{task}-…: the third job that saves here
    rank_3/llama-1_10.safetensors               {prefix}-{epoch}_{step}, the same in every folder
    rank_3/net.safetensors                      written by MindSpore's slicing
    rank_3/checkpoint_3.ckpt                    {prefix}{r}, written by MindSpore's transform
    strategy/ckpt_strategy_rank_3.ckpt          the strategy file of a rank

A single name is ambiguous: in ``rank_1/``, the last number of ``llama-1_1`` may be the step
or the rank. So every possible reading of each name is listed, and the reading that most rank
folders share wins. The files of one reading are a *save*. The newest save has the largest
numbers, epoch first (step 10 is newer than step 9). This module opens no file.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import CoverageError, LayoutError, format_list

LAYOUT_FILE = "layout.json"  # in strategy/, where strategy files cannot express the layout

_RANK = r"rank_(\d{1,7})"
_RANK_FOLDER = re.compile(rf"{_RANK}(?=/|$)")
_RANK_FILE = re.compile(rf"{_RANK}/([^/]+)\.(safetensors|ckpt)")
_STRATEGY_FILE = re.compile(rf"ckpt_strategy_{_RANK}\.ckpt")
_KIND = re.compile(r"(?:^|\.)(ckpt|safetensors)$")
_NUMBERS = re.compile(r"\d{1,18}")
_STEPPED = re.compile(  # the end of a name with an epoch and a step
    r"(?:-network|-trainable_params)?"
    r"-(?P<epoch>\d{1,18})_(?P<step>\d{1,18})(?:_breakpoint)?$"
)
_TASK = re.compile(r"_(\d{1,18})$")
_COUNTED = re.compile(r"(?:^|[-_])(\d{1,18})(?:_(\d{1,18}))?$")
_NAMED = re.compile(rf".*{_RANK}(?=$|[-_])")
_PREFIX = re.compile(r"[^/\0.][^/\0]*")
_MAX_RANK = 1 << 20  # a folder named rank_9999999 is not a rank's

_MARKED, _ENDED, _PLAIN = "rank_{r}", "{r}", ""


class Step(NamedTuple):
    """Training step in a file's name; tuples compare in the order of saving."""

    numbers: tuple[int, ...]  # (epoch, step), or fewer
    task: tuple[int, ...]


_NO_STEP = Step((), ())


class Choice(NamedTuple):
    """Chosen file of each rank, notes on the choice, and the step in the names."""

    paths: dict[int, str]
    notes: tuple[str, ...]
    step: Step


class _Reading(NamedTuple):
    """One reading of a file name: the text before the rank and the text after it."""

    form: str
    head: str
    tail: str
    extension: str

    @property
    def rankless(self) -> str:
        """The name without the rank; the same for all ranks."""
        head = self.head.removesuffix("rank_") if self.form == _MARKED else self.head
        return (head.rstrip("_") + self.tail).strip("-_")


@dataclass(slots=True)
class _Save:
    """Files of one reading, by rank.

    Attributes:
        suffix: the part of the name with the step, by which ``suffix=`` selects a save.
    """

    reading: _Reading
    paths: dict[int, str] = field(default_factory=dict)
    step: Step = _NO_STEP
    suffix: str = ""


def rank_of_folder(path: str) -> int | None:
    """Return the rank whose folder is the first part of ``path``, or None.

    >>> rank_of_folder("rank_3"), rank_of_folder("rank_12/a.ckpt"), rank_of_folder("llama_rank_3")
    (3, 12, None)
    """
    match = _RANK_FOLDER.match(path)
    return int(match[1]) if match else None


def rank_of_strategy_file(name: str) -> int | None:
    """Return the rank of the strategy file called ``name``; None for any other name.

    >>> rank_of_strategy_file(strategy_file(12)), rank_of_strategy_file("merged_strategy.ckpt")
    (12, None)
    """
    match = _STRATEGY_FILE.fullmatch(name)
    return int(match[1]) if match else None


def strategy_file(rank: int) -> str:
    """Return MindSpore's name of the strategy file of ``rank``."""
    return f"ckpt_strategy_rank_{rank}.ckpt"


def without_rank(stem: str) -> str:
    """Return the part of a rank file's stem after the rank; ``k`` stands for any rank.

    >>> without_rank("llama_rank_3-1_10"), without_rank("llama_rank_k-1_10")
    ('-1_10', '-1_10')
    """
    return re.sub(r".*rank_(\d+|k)(?=[-_])", "", stem)


def is_rank_file(path: str) -> bool:
    """Return whether ``path`` is a weight file in a rank's folder."""
    match = _RANK_FILE.fullmatch(path)
    return match is not None and int(match[1]) < _MAX_RANK


def file_path(
    rank: int, prefix: str, step: tuple[int, int] | None, extension: str = "safetensors"
) -> str:
    """Return the path of a rank's file, named so that MindSpore and MindFormers read it.

    MindFormers searches every rank folder for the text after the rank in rank 0's name, so the
    rank occurs nowhere else in the name. Without a step all ranks have the same file name, as
    in MindSpore's slicing.

    >>> file_path(3, "llama", (1, 10)), file_path(3, "net", None)
    ('rank_3/llama_rank_3-1_10.safetensors', 'rank_3/net.safetensors')
    """
    name = prefix if step is None else f"{prefix}_rank_{rank}-{step[0]}_{step[1]}"
    return f"rank_{rank}/{name}.{extension}"


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` without trailing ``-`` and ``_``, which file names add themselves.

    Raises:
        LayoutError: the prefix is empty, hidden, or contains a path separator.
    """
    bare = prefix.rstrip("-_")
    if not _PREFIX.fullmatch(bare):
        raise LayoutError(
            f"prefix= (--prefix) {prefix!r} cannot begin a file's name. Use letters, digits, '-' "
            "and '_'."
        )
    return bare


def read_step(text: str | None) -> tuple[int, int] | None:
    """Parse a step such as ``1_10``; return None for ``none``, a name without a step.

    Raises:
        LayoutError: ``text`` is neither.

    >>> read_step("1_10"), read_step("none")
    ((1, 10), None)
    """
    if text == "none":
        return None
    match = re.fullmatch(r"(\d{1,18})_(\d{1,18})", text or "")
    if match is None:
        raise LayoutError(
            f"step= (--step) {text!r} is invalid: expected epoch_step, such as 1_10, or none."
        )
    return int(match[1]), int(match[2])


def step_of(paths: Iterable[str]) -> tuple[int, int] | None:
    """Return the epoch and step in the file names of one save; None without them."""
    paths = [path for path in paths if is_rank_file(path)]
    numbers = choose(paths).step.numbers if paths else ()
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def choose(files: Iterable[str], suffix: str | None = None) -> Choice:
    """Choose the newest save of which every rank has a file, optionally ending in ``suffix``.

    A suffix is the part of the name after the rank (``1_10``, ``_2-1_10``), the end of that
    part, or, if several prefixes share the folders, the whole name without the rank
    (``llama-1_10``). It may end with, or be, a file extension (``1_10.ckpt``, ``.safetensors``).

    Raises:
        CoverageError: the names are ambiguous, file types are mixed, or no step is complete.
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
            "has is read."
        )
    return Choice(chosen.paths, tuple(notes), newest)


def _copies(save: _Save, candidates: Collection[int]) -> list[str]:
    """Return a note if every folder holds a file named after the same rank."""
    named = _NAMED.match(save.reading.head) if save.reading.form == _PLAIN else None
    if named is None or len(candidates) < 2 or int(named[1]) not in candidates:
        return []
    return [
        f"{save.reading.head} is in every rank folder, though its name is that of rank {named[1]}; "
        "it is read as a name without a rank. If these are copies of one rank, fetch the others."
    ]


def _incomplete(candidates: Mapping[int, Sequence[str]], suffix: str | None) -> CoverageError:
    found = format_list(f"rank {r}: {format_list(candidates[r], 2)}" for r in sorted(candidates))
    wanted = f" ending in {suffix}" if suffix else ""
    return CoverageError(
        f"no step{wanted} has a file in every one of the {len(candidates)} rank folders ({found}). "
        "Choose one with suffix= (--suffix), or fetch the missing files."
    )


# --- parsing names --------------------------------------------------------------------------------


def _saves(candidates: Mapping[int, Sequence[str]]) -> tuple[list[_Save], list[str]]:
    """Group the files of all ranks into saves, with notes on names of other ranks."""
    first = {_stem(path) for path in candidates.get(0, ())}
    readings = {
        (rank, path): tuple(_readings(path, rank, first))
        for rank, paths in candidates.items()
        for path in sorted(paths)
    }
    count: dict[_Reading, int] = defaultdict(int)
    for possible in readings.values():
        for reading in possible:
            count[reading] += 1
    saves: dict[_Reading, _Save] = {}
    misplaced: dict[int, list[str]] = {}
    for (rank, path), possible in readings.items():
        reading = max(possible, key=lambda reading: _weight(reading, count[reading]))
        if reading.form == _PLAIN and count[reading] == 1 and _other_rank(path, rank) is not None:
            misplaced.setdefault(rank, []).append(path)
        saves.setdefault(reading, _Save(reading)).paths[rank] = path
    _find_steps(saves.values())
    return _without_misplaced(list(saves.values()), misplaced, candidates)


def _readings(path: str, rank: int, first: Iterable[str]) -> Iterator[_Reading]:
    """Yield the possible readings of a file name of ``rank``; ``first`` are rank 0's names."""
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
    # MindSpore counts steps from 1, so if rank 0's name has a 0 there, the number is the rank
    if not stepped or (stepped["step"] == number and f"{head}0" in first):
        yield _Reading(_ENDED, head, "", extension)


def _weight(reading: _Reading, num_ranks: int) -> tuple[int, int]:
    """Return the weight of a reading shared by ``num_ranks`` folders; the largest wins."""
    if num_ranks > 1:  # a name that several folders share does not contain the rank
        return num_ranks, (_ENDED, _PLAIN, _MARKED).index(reading.form)
    if reading.form == _ENDED and reading.head[-1:].isdigit():
        return num_ranks, -1  # the rank would be the end of a longer number
    return num_ranks, (_PLAIN, _ENDED, _MARKED).index(reading.form)


def _find_steps(saves: Iterable[_Save]) -> None:
    """Set the step of each save.

    MindSpore adds ``_{task}`` if files of the same prefix exist already. So ``llama_2-1_10``
    alone has the prefix ``llama_2``, but next to ``llama-1_10`` it is the third job of ``llama``.
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
    """Return the part before the step of a name without a rank; empty for other names."""
    stepped = _STEPPED.search(save.reading.head) if save.reading.form == _PLAIN else None
    return save.reading.head[: stepped.start()] if stepped else ""


def _without_misplaced(
    saves: list[_Save], misplaced: Mapping[int, list[str]], candidates: Mapping[int, Sequence[str]]
) -> tuple[list[_Save], list[str]]:
    """Remove files of other ranks from ``saves``, unless a rank has no other files."""
    notes = []
    for rank, paths in misplaced.items():
        left = len(paths) < len(candidates[rank])
        notes.append(
            f"{format_list(paths, 3)} is named after rank {_other_rank(paths[0], rank)}; "
            + ("it is skipped." if left else f"it is read as the file of rank {rank}.")
        )
        for save in saves if left else ():
            if save.paths.get(rank) in paths:
                del save.paths[rank]
    return [save for save in saves if save.paths], notes


def _other_rank(path: str, rank: int) -> int | None:
    """Return the rank in a file's name if it differs from ``rank``."""
    named = _NAMED.match(_stem(path))
    return int(named[1]) if named and int(named[1]) != rank else None


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[1].rsplit(".", 1)[0]


# --- choosing -------------------------------------------------------------------------------------


def _suffixed(saves: list[_Save], suffix: str | None) -> list[_Save]:
    """Return the saves that ``suffix`` selects (see ``choose``)."""
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
    """Return whether ``stem`` ends in ``suffix``, starting outside a number."""
    cut = len(stem) - len(suffix)
    return stem.endswith(suffix) and (
        cut == 0 or not (suffix[:1].isdigit() and stem[cut - 1].isdigit())
    )


def _refuse_mixed(saves: Iterable[_Save]) -> None:
    kinds = {s.reading.extension: next(iter(s.paths.values())) for s in saves}
    if len(kinds) > 1:
        raise CoverageError(
            f"the rank folders have both {' and '.join(kinds.values())}: expected one file type. "
            f"Choose with suffix= (--suffix): .{' or .'.join(kinds)}."
        )


def _alike(saves: Iterable[_Save], num_ranks: int) -> list[_Save]:
    """Return all files as one save if each rank has one and only the prefixes differ."""
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
    """Return the only element of ``saves``, all of one step.

    Raises:
        CoverageError: there are several saves.
    """
    if len(saves) > 1:
        rank = min(saves[0].paths)
        one, other = sorted(saves, key=lambda save: save.paths[rank])[:2]
        raise CoverageError(
            f"rank_{rank} has both {one.paths[rank]} and {other.paths[rank]}, of the same step. "
            "Choose with suffix= (--suffix): "
            f"{one.reading.rankless} or {other.reading.rankless}."
        )
    return saves[0]
