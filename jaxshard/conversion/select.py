"""Selection of tensors by name, and checks of what a target expects.

Accumulated gradients have no use after a job has stopped, so they are left out by default. A note
reports this, and everything else that is left out without a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout
from ..errors import CoverageError, LayoutError, NotFoundError, did_you_mean, format_list
from ..formats.registry import format_of
from ..rules import missing_parts
from ..rules.match import is_part_of_adapter, weight_name

ACCUMULATED = "accu_grads."
TRAINABLE = "-trainable_params-"  # in the names of files that never hold a whole model


def select(
    catalog: Catalog,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    drop_prefixes: Iterable[str] = (),
    *,
    keep_accu_grads: bool = True,
    may_lack: bool = False,
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Select the tensors of ``catalog`` by expressions and prefixes; also return notes.

    Selected contents that are not tensors are an error, unless the caller ``may_lack`` them.

    Raises:
        NotFoundError: an expression of ``include`` matches nothing, or nothing is left.
        LayoutError: not a regular expression, or a selected entry is not a tensor.
    """
    include, prefixes = texts(include), texts(drop_prefixes)
    wanted, taken = _patterns(include), chooser(include, exclude, prefixes)
    names = list(catalog.tensors)
    for pattern in wanted:
        if not any(map(pattern.search, names)):
            raise NotFoundError(
                f"include= (--include) {pattern.pattern} matches none of the {len(names)} tensors "
                f"of {catalog.root}.{did_you_mean(pattern.pattern, names)}"
            )
    if not may_lack:
        _refuse_left_out(catalog, taken)
    left = [t for t in catalog.tensors.values() if taken(t.name)]
    notes = [
        f"no tensor starts with {prefix}: drop_prefix= (--drop-prefix) {prefix} has no effect."
        for prefix in prefixes
        if not any(n.startswith(prefix) for n in names)
    ]
    gradients = [t.name for t in left if t.name.startswith(ACCUMULATED)]
    if gradients and not keep_accu_grads and not wanted:
        left = [t for t in left if not t.name.startswith(ACCUMULATED)]
        notes.append(
            f"{len(gradients)} accumulated gradients ({format_list(gradients, 2)}) are left out; "
            "they are kept with keep_accu_grads=True (--keep-accu-grads)."
        )
    if not left:
        why = "all of them are excluded." if names else "it holds none."
        raise NotFoundError(f"no tensor of {catalog.root} is left: {why}")
    return left, tuple(notes)


def _refuse_left_out(catalog: Catalog, taken: Callable[[str], bool]) -> None:
    lost = {name: what for name, what in catalog.left_out.items() if taken(name)}
    if lost:
        raise LayoutError(
            f"{len(lost)} of what {catalog.root} holds cannot be a tensor: "
            f"{format_list(f'{name} ({what})' for name, what in lost.items())}. Leave "
            f"{'it' if len(lost) == 1 else 'them'} out with exclude= (--exclude)."
        )


def chooser(
    include: Iterable[str] = (), exclude: Iterable[str] = (), drop_prefixes: Iterable[str] = ()
) -> Callable[[str], bool]:
    """Return a predicate for the names that the expressions and prefixes select.

    Raises:
        LayoutError: not a regular expression.
    """
    wanted, unwanted = _patterns(include), _patterns(exclude)
    prefixes = texts(drop_prefixes)

    def takes(name: str) -> bool:
        return (
            (not wanted or any(p.search(name) for p in wanted))
            and not any(p.search(name) for p in unwanted)
            and not name.startswith(prefixes or ("\0",))
        )

    return takes


def without_merged(catalog: Catalog, target: Layout) -> Layout:
    """Return ``target`` without the adapters that were merged into weights, and with a note.

    The strategy of the job that trained the adapters lists them, and MindSpore's loader counts
    every name of a strategy, so the strategy of the result must not list them.
    """
    if not catalog.has_merged_adapters:
        return target
    kept, absent = (
        {
            name: placed
            for name, placed in names.items()
            if name in catalog.tensors or not is_part_of_adapter(name)
        }
        for names in (target.placements, target.absent)
    )
    left = len(target.placements) + len(target.absent) - len(kept) - len(absent)
    if not left:
        return target
    note = (
        f"{left} names of adapters in the target's strategy are left out of the result's: the "
        "adapters were merged into their weights."
    )
    return replace(target, placements=kept, absent=absent, notes=(*target.notes, note))


def without_unplaced_states(catalog: Catalog, target: Layout) -> Catalog:
    """Return ``catalog`` without optimizer states whose weight only ``target`` has, and a note.

    The strategy files of inference have no states. MindSpore's loader ignores such tensors.
    """
    told = target.placements.keys() | target.absent.keys()
    left = [
        name
        for name in catalog.tensors
        if name not in told and name not in catalog.scalars
        if (weight := weight_name(name)) != name and weight in told
    ]
    if not left:
        return catalog
    gone = set(left)
    kept = {name: tensor for name, tensor in catalog.tensors.items() if name not in gone}
    note = (
        f"{len(left)} optimizer states are left out, because the target's strategy has only their "
        f"weights: {format_list(left, 3)}."
    )
    return replace(catalog, tensors=kept, notes=(*catalog.notes, note))


def refuse_absent(catalog: Catalog, target: Layout, takes: Callable[[str], bool]) -> None:
    """Check that ``catalog`` has the weights of ``target``, because its ranks need them.

    Names that ``takes`` leaves out, and optimizer states, are not required.

    Raises:
        CoverageError: no file has some weights.
    """
    absent = [
        name
        for name in target.placements
        if name not in catalog.tensors and name not in catalog.lost
        if weight_name(name) == name and takes(name)
    ]
    if absent:
        raise CoverageError(
            f"{len(absent)} weights of the target's strategy are not in {catalog.root}: "
            f"{format_list(sorted(absent))}.{did_you_mean(absent[0], catalog.tensors)} Give the "
            "strategy of this model, map the names with names= (--names), or leave them out with "
            "exclude= (--exclude)."
        )


def refuse_lost(
    catalog: Catalog,
    takes: Callable[[str], bool] = lambda name: True,
    target: Layout | None = None,
    ranks: Collection[int] | None = None,
) -> None:
    """Check that no requested weight is stored only on ranks without files.

    Args:
        catalog: the source.
        takes: predicate for the requested names.
        target: the target's layout; None if it is complete.
        ranks: the requested ranks of the target; None for all.

    Raises:
        CoverageError: weights are missing; with the ranks to fetch.
    """
    unknown = catalog.layout.unknown if catalog.layout is not None else ()
    is_own = target is not None and target.unknown == unknown
    if unknown and (not is_own or ranks is None or not set(unknown).isdisjoint(ranks)):
        raise CoverageError(
            f"{catalog.root} has neither files nor strategy files of rank "
            f"{format_list(map(str, unknown), 8)}, so their tensors are unknown. Give the "
            "folder with the strategy files of all ranks."
        )
    needed = {}
    for name, holders in catalog.lost.items():
        placed = () if target is None else target.placements.get(name) or target.absent.get(name)
        apart = ranks is not None and placed and not any(_meet(p.ranks, ranks) for p in placed)
        if takes(name) and not apart:
            needed[name] = holders
    if needed:
        gone = sorted({rank for holders in needed.values() for rank in holders})
        raise CoverageError(
            f"{len(needed)} weights are stored on ranks of which {catalog.root} has no files (rank "
            f"{format_list(map(str, gone), 8)}): {format_list(sorted(needed))}. Fetch one replica "
            "of each."
        )


def _meet(held: range, ranks: Collection[int]) -> bool:
    return any(rank in held for rank in ranks)


def takes_whole(catalog: Catalog, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return whether all weights of ``catalog`` are requested.

    That is, none is excluded and there is no ``include``, which is a choice even of all.
    """
    taken = chooser((), exclude)
    weights = (n for n in catalog.tensors if n not in catalog.scalars and weight_name(n) == n)
    return not texts(include) and all(map(taken, weights))


def weights_of(catalog: Catalog) -> list[str]:
    """Return the names of the model's weights: no scalars, optimizer states or adapters."""
    return [
        name
        for name in (*catalog.tensors, *catalog.lost)
        if name not in catalog.scalars
        and weight_name(name) == name
        and not is_part_of_adapter(name)
    ]


def refuse_half(catalog: Catalog) -> None:
    """Check that rank files have all pipeline stages, even if no strategy lists the others.

    Strategy files of one stage look like those of a job without stages. The weights do not: some
    layers are missing, or the tensors before the first layer or after the last.

    Raises:
        CoverageError: stages are missing.
    """
    if catalog.layout is not None and catalog.layout.unknown:
        return  # stages that are missing for certain: see ``refuse_lost``
    if not format_of(catalog.format).reads_strategy or any(
        TRAINABLE in file.path for file in catalog.files
    ):
        return
    lack = missing_parts(catalog.model, weights_of(catalog))
    if lack:
        raise CoverageError(
            f"{catalog.root} is a part of a model: {lack}. Fetch the ranks of the other pipeline "
            "stages and their strategy files, or take what is here with include= (--include)."
        )


def missed(
    names: object, include: Iterable[str], exclude: Iterable[str], drop_prefixes: Iterable[str] = ()
) -> Callable[[str], bool]:
    """Return a predicate for the target's names that the source must have.

    The expressions are for the source's names. If a mapping ``names`` renames these, the names
    that were left out on purpose are unknown, so no name is required.
    """
    if names is not None and any((include, exclude, drop_prefixes)):
        return lambda name: False
    return chooser(include, exclude, drop_prefixes)


def texts(values: Iterable[str]) -> tuple[str, ...]:
    """Return one text, or several, as a tuple."""
    return (values,) if isinstance(values, str) else tuple(values)


def _patterns(expressions: Iterable[str]) -> list[re.Pattern[str]]:
    found = []
    for text in texts(expressions):
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise LayoutError(f"{text!r} is not a regular expression: {error}.") from None
    return found
