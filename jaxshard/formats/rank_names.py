"""Rank files by name: which file of each rank folder is meant.

    rank_3/llama_rank_3-1_10.safetensors        {prefix}_rank_{r}-{epoch}_{step}
    rank_3/llama_rank_3_2-1_10.safetensors      …_{task}-…: a third job saved here too
    rank_3/checkpoint_3.ckpt                    {prefix}{r}, what a transform writes

The newest is the one with the largest numbers, epoch first: step 10 is after step 9,
whatever the alphabet says. This module opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import CoverageError, some

_RANK_FILE = re.compile(r"rank_(\d{1,7})/([^/]+)\.(safetensors|ckpt)")
_KIND = re.compile(r"(?:^|\.)(ckpt|safetensors)$")
_NUMBERS = re.compile(r"\d{1,18}")
_MAX_RANK = 1 << 20  # a folder called rank_9999999 is no rank


class Step(NamedTuple):
    """When a file was saved, as its name tells; compared in this order."""

    numbers: tuple[int, ...]  # (epoch, step), as far as there are any
    task: tuple[int, ...]


class Choice(NamedTuple):
    """The file of each rank, and what should be said of how they were chosen."""

    paths: dict[int, str]
    notes: tuple[str, ...]


def is_rank_file(path: str) -> bool:
    """Whether ``path`` is a weight file in a rank's folder."""
    match = _RANK_FILE.fullmatch(path)
    return match is not None and int(match[1]) < _MAX_RANK


def choose(files: Iterable[str], suffix: str | None = None) -> Choice:
    """The newest step of which every rank has a file; of those ending in ``suffix`` if given.

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
    found = {rank: _suffixed(rank, paths, suffix) for rank, paths in candidates.items()}
    _refuse_mixed(found)
    steps = {rank: _by_step(rank, paths) for rank, paths in found.items()}
    common = set.intersection(*(set(by_step) for by_step in steps.values()))
    if not common:
        told = some(f"rank {r}: {some(candidates[r], 2)}" for r in sorted(candidates))
        wanted = f" ending in {suffix}" if suffix else ""
        raise CoverageError(
            f"no step{wanted} has a file in every one of the {len(steps)} rank folders ({told}). "
            "Choose one with suffix= (--suffix), or fetch the missing files."
        )
    step = max(common)
    newer = sorted(rank for rank, by_step in steps.items() if max(by_step) > step)
    notes = [
        f"rank {some(map(str, newer))} has newer files; the newest step that every rank has is "
        "taken."
    ]
    paths = {rank: by_step[step] for rank, by_step in steps.items()}
    return Choice(paths, tuple(notes if newer else ()))


def _suffixed(rank: int, paths: list[str], suffix: str | None) -> list[str]:
    """Those of one rank's files that ``suffix`` means; see ``choose``."""
    if suffix is None:
        return paths
    kind = _KIND.search(suffix)
    if kind is not None:
        suffix = suffix[: kind.start()]
        paths = [p for p in paths if p.endswith(f".{kind[1]}")]
    bare = suffix.lstrip("-_")
    if not bare:
        return paths
    exact = [p for p in paths if _tail(_stem(p), rank).lstrip("-_") == bare]
    whole = [p for p in paths if _rankless(p, rank) == suffix]
    return exact or whole or [p for p in paths if _ends_with(_stem(p), suffix)]


def _rankless(path: str, rank: int) -> str:
    """A file's name without its rank, which is the same for all ranks.

    >>> _rankless("rank_3/llama_rank_3_2-1_10.ckpt", 3), _rankless("rank_3/checkpoint_3.ckpt", 3)
    ('llama_2-1_10', 'checkpoint')
    """
    stem = _stem(path)
    tail = _tail(stem, rank)
    named = re.fullmatch(rf"(.*?)_?rank_{rank}", stem[: len(stem) - len(tail)])
    return (named[1] + tail if named else tail).strip("-_")


def _refuse_mixed(found: dict[int, list[str]]) -> None:
    kinds: dict[str, str] = {}
    for paths in found.values():
        for path in paths:
            kinds.setdefault(path.rsplit(".", 1)[1], path)
    if len(kinds) > 1:
        raise CoverageError(
            f"the rank folders have both {' and '.join(kinds.values())}, and nothing says which "
            f"kind counts. Choose with suffix= (--suffix): .{' or .'.join(kinds)}."
        )


def _by_step(rank: int, paths: list[str]) -> dict[Step, str]:
    """The files of one rank by the step their names tell."""
    found: dict[Step, str] = {}
    for path in sorted(paths):
        step = step_of(_stem(path), rank)
        if step in found:
            one, other = (_rankless(p, rank) for p in (found[step], path))
            raise CoverageError(
                f"rank_{rank} has both {found[step]} and {path}, and their names do not tell which "
                f"is newer. Choose with suffix= (--suffix): {one} or {other}."
            )
        found[step] = path
    return found


def step_of(stem: str, rank: int) -> Step:
    """The step that a file's name tells, its rank aside.

    >>> step_of("net_rank_3-1_10", 3).numbers, step_of("checkpoint_3", 3).numbers
    ((1, 10), ())
    >>> step_of("llama2_7b_rank_0_2-1_10", 0)
    Step(numbers=(1, 10), task=(2,))
    """
    numbers = tuple(int(n) for n in _NUMBERS.findall(_tail(stem, rank)))
    return Step(numbers[-2:], numbers[:-2])


def _tail(stem: str, rank: int) -> str:
    """What follows the rank in a file's name; all of it where the rank is not in it."""
    named = re.match(rf".*rank_{rank}(?=$|[-_])", stem)
    if named:
        return stem[named.end() :]
    return re.sub(rf"(?:(?<=_)|^){rank}$", "", stem)


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[1].rsplit(".", 1)[0]


def _ends_with(stem: str, suffix: str) -> bool:
    """Whether ``stem`` ends in ``suffix`` and not in the middle of a number."""
    cut = len(stem) - len(suffix)
    return stem.endswith(suffix) and (
        cut == 0 or not (suffix[:1].isdigit() and stem[cut - 1].isdigit())
    )
