"""Selection of tensors by name, and checks of what a target expects.

Accumulated gradients are worthless once a job has stopped, and nobody asks for them, so
they are left out unless kept on purpose; that, and anything else left out that a person
may not expect, is said in a note.
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
    """The tensors of ``catalog`` that the expressions and prefixes leave, and notes.

    What ``catalog`` holds beside its tensors is refused if it is chosen, unless the caller
    ``may_lack`` it.

    Raises:
        NotFoundError: an expression of ``include`` matches nothing, or nothing is left.
        LayoutError: not a regular expression, or something chosen is not a tensor.
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
        f"no tensor begins with {prefix}: drop_prefix= (--drop-prefix) {prefix} drops nothing."
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
    """Whether the expressions and prefixes leave a name.

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
    """``target`` without the adapters that ``catalog`` had merged into its weights, and a note.

    The job that trained the adapters has them in its strategy, and MindSpore's loader counts
    every name of a strategy, so the strategy of the result must not have them.
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
    """``catalog`` without optimizer states for which ``target`` has the weight only, and a note.

    The strategy files of inference have no states. MindSpore's loader passes such tensors by.
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
        f"{len(left)} optimizer states are left out, for the target's strategy has only their "
        f"weights: {format_list(left, 3)}."
    )
    return replace(catalog, tensors=kept, notes=(*catalog.notes, note))


def refuse_absent(catalog: Catalog, target: Layout, takes: Callable[[str], bool]) -> None:
    """Refuse a target that tells of weights which ``catalog`` lacks: its ranks would lack them too.

    What ``takes`` would leave out is not missed, and optimizer states need not be there.

    Raises:
        CoverageError: weights are in no file.
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
    """Refuse what needs weights that lie only on ranks without files.

    Args:
        catalog: the source.
        takes: whether a name is asked for at all.
        target: who is to hold them; None where everything is one.
        ranks: those of the target that are asked for; None for all.

    Raises:
        CoverageError: with the weights, and the ranks to fetch.
    """
    unknown = catalog.layout.unknown if catalog.layout is not None else ()
    is_own = target is not None and target.unknown == unknown
    if unknown and (not is_own or ranks is None or not set(unknown).isdisjoint(ranks)):
        raise CoverageError(
            f"{catalog.root} has neither files nor strategy files of rank "
            f"{format_list(map(str, unknown), 8)}, so nothing says what these hold. Give the "
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
            f"{len(needed)} weights lie on ranks of which {catalog.root} has no files (rank "
            f"{format_list(map(str, gone), 8)}): {format_list(sorted(needed))}. Fetch one replica "
            "of each."
        )


def _meet(held: range, ranks: Collection[int]) -> bool:
    return any(rank in held for rank in ranks)


def takes_whole(catalog: Catalog, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether all weights of ``catalog`` are asked for.

    None is excluded, and an ``include`` is a choice, even of all.
    """
    taken = chooser((), exclude)
    weights = (n for n in catalog.tensors if n not in catalog.scalars and weight_name(n) == n)
    return not texts(include) and all(map(taken, weights))


def refuse_half(catalog: Catalog) -> None:
    """Refuse rank files that hold a part of the pipeline stages, though no strategy says so.

    Strategy files of one stage alone look like those of a job without stages. Its weights do
    not: layers are missing, or what comes before the first layer or after the last.

    Raises:
        CoverageError: with what is missing.
    """
    if catalog.layout is not None and catalog.layout.unknown:
        return  # stages that are missing for certain: see ``refuse_lost``
    if not format_of(catalog.format).reads_strategy or any(
        TRAINABLE in file.path for file in catalog.files
    ):
        return
    names = [
        name
        for name in (*catalog.tensors, *catalog.lost)
        if name not in catalog.scalars
        and weight_name(name) == name
        and not is_part_of_adapter(name)
    ]
    lack = missing_parts(catalog.model, names)
    if lack:
        raise CoverageError(
            f"{catalog.root} is a part of a model: {lack}. Fetch the ranks of the other pipeline "
            "stages and their strategy files, or take what is here with include= (--include)."
        )


def missed(
    names: object, include: Iterable[str], exclude: Iterable[str], drop_prefixes: Iterable[str] = ()
) -> Callable[[str], bool]:
    """Whether a target's name is missed where there is none; ``names`` is a mapping to others.

    The expressions are about the source's names. Where these become others, nothing tells which
    of the target's names were left out on purpose, so then none is missed.
    """
    if names is not None and any((include, exclude, drop_prefixes)):
        return lambda name: False
    return chooser(include, exclude, drop_prefixes)


def texts(values: Iterable[str]) -> tuple[str, ...]:
    """One text or several, as several."""
    return (values,) if isinstance(values, str) else tuple(values)


def _patterns(expressions: Iterable[str]) -> list[re.Pattern[str]]:
    found = []
    for text in texts(expressions):
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise LayoutError(f"{text!r} is not a regular expression: {error}.") from None
    return found
