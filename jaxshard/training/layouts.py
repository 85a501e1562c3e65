"""Which files a step is made of, by format.

    ranks         checkpoint/rank_{r}/{prefix}_rank_{r}-1_10.safetensors, and who holds what
    iteration     checkpoint/iteration_00000010/
    huggingface   checkpoint/{prefix}-1_10/model*.safetensors, the rest in training_state/
    network       checkpoint_network/…: the weights again, alone; likewise trainable

Every format is laid out by the same code as a conversion's result, and put under the names
that MindFormers uses. This module decides, and touches no disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..catalog import Catalog, Tensor
from ..layout import Layout
from ..targets import make_result
from ..targets.ranks import STRATEGY_FOLDER
from ..targets.results import Request, Result
from . import naming
from .naming import StepName
from .opening_steps import STATE_FOLDER


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be saved, apart from the arrays.

    Attributes:
        layout: who holds what, for formats that are cut into ranks.
        numbers: the job's numbers, for formats that keep them in JSON.
        config: what the model is, for ``config.json``.
    """

    prefix: str
    step: StepName
    global_step: int
    layout: Layout
    remove_redundancy: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
    config: bytes | None = None


@dataclass(frozen=True)
class Part:
    """Files made at one go, from some of the tensors.

    Attributes:
        result: the files, with paths relative to the run's directory.
        catalog: the tensors.
        units: what of it is put in place at once.
        strategy: the strategy files by name, if it has any: they are kept by content.
    """

    result: Result
    catalog: Catalog
    units: tuple[str, ...]
    strategy: Mapping[str, bytes] = field(default_factory=dict)


def parts_of(kind: str, catalog: Catalog, weights: frozenset[str], wish: Wish) -> list[Part]:
    """The files of a step in format ``kind``.

    Raises:
        LayoutError: the layout does not fit the tensors.
    """
    return {"ranks": _ranks, "iteration": _iteration, "huggingface": _complete}[kind](
        catalog, weights, wish
    )


def copies_of(
    kind: str, catalog: Catalog, names: Iterable[str], wish: Wish, folder: str
) -> list[Part]:
    """The tensors ``names`` again in ``folder``: by rank where the step is, else complete.

    Raises:
        LayoutError: the layout does not fit the tensors.
    """
    chosen = _only(catalog, names)
    if kind in ("ranks", "iteration"):
        # the job's numbers are no weights here either, though the layout has them
        return [_rank_part(replace(chosen, hyper=catalog.hyper), wish, folder)]
    suffix = folder.removeprefix(f"{naming.CHECKPOINT}_")
    return [_complete_part(chosen, wish, f"{folder}/{wish.prefix}-{suffix}-{wish.step}")]


def _ranks(catalog: Catalog, weights: frozenset[str], wish: Wish) -> list[Part]:
    return [_rank_part(catalog, wish, naming.CHECKPOINT)]


def _rank_part(catalog: Catalog, wish: Wish, folder: str) -> Part:
    request = Request(wish.layout, remove_redundancy=wish.remove_redundancy, format="ranks")
    result = make_result(catalog, list(catalog.tensors.values()), request)
    paths = [
        f"{folder}/{naming.rank_file(wish.prefix, rank, wish.step, folder)}"
        for rank in range(wish.layout.num_ranks)
    ]
    head = f"{STRATEGY_FOLDER}/"
    strategy = {
        path.removeprefix(head): data
        for path, data in result.side_files.items()
        if path.startswith(head)
    }
    outputs = replace(result.outputs, paths=tuple(paths))
    return Part(replace(result, outputs=outputs, side_files={}), catalog, tuple(paths), strategy)


def _iteration(catalog: Catalog, weights: frozenset[str], wish: Wish) -> list[Part]:
    request = Request(
        wish.layout,
        prefix=wish.prefix,
        remove_redundancy=wish.remove_redundancy,
        format="iteration",
        numbers=wish.numbers,
    )
    result = make_result(catalog, list(catalog.tensors.values()), request)
    result = _below(result, naming.CHECKPOINT, but=naming.TRACKER)
    return [
        Part(result, catalog, (f"{naming.CHECKPOINT}/{naming.iteration_folder(wish.global_step)}",))
    ]


def _complete(catalog: Catalog, weights: frozenset[str], wish: Wish) -> list[Part]:
    folder = f"{naming.CHECKPOINT}/{naming.step_folder(wish.prefix, wish.step)}"
    found = []
    if weights:
        found.append(_complete_part(_only(catalog, weights), wish, folder))
    rest = _only(catalog, [n for n in catalog.tensors if n not in weights])
    if rest.tensors:
        inner = replace(wish, config=None)
        found.append(_complete_part(rest, inner, f"{folder}/{STATE_FOLDER}"))
    return [replace(part, units=(folder,)) for part in found]


def _complete_part(catalog: Catalog, wish: Wish, folder: str) -> Part:
    every = replace(catalog, hyper=frozenset())  # one kind of file, whatever is in it
    result = make_result(every, list(catalog.tensors.values()), Request(format="huggingface"))
    if wish.config is not None:
        result = replace(result, side_files={**result.side_files, "config.json": wish.config})
    return Part(_below(result, folder), every, (folder,))


def _below(result: Result, folder: str, but: str = "") -> Result:
    """``result`` with its paths below ``folder``, and without the side file ``but``."""
    outputs = replace(result.outputs, paths=tuple(f"{folder}/{p}" for p in result.outputs.paths))
    side = {f"{folder}/{p}": data for p, data in result.side_files.items() if p != but}
    return replace(result, outputs=outputs, side_files=side)


def _only(catalog: Catalog, names: Iterable[str]) -> Catalog:
    wanted = set(names)
    # in the catalog's order: that of a set differs between processes, and so would the files
    tensors: dict[str, Tensor] = {n: t for n, t in catalog.tensors.items() if n in wanted}
    return replace(catalog, tensors=tensors, hyper=catalog.hyper & tensors.keys())
