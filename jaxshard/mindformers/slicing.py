"""Slicing of a configured job: the files' own, or that of its strategy.

    auto_trans_ckpt: False      rank 3 has what rank_3's file has, where there is a file a rank
    otherwise                   what parallel_config says, whatever the files are

And whether the checkpoint is all of the model that the job has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..conversion.open import strategy_place
from ..conversion.select import TRAINABLE
from ..conversion.targets import lay_out_for
from ..core.box import Box
from ..core.catalog import Catalog
from ..core.layout import Layout
from ..core.strategy import Strategy
from ..errors import CoverageError, JaxshardError, LayoutError, NotFoundError, format_list
from ..formats import rank_names
from ..rules import missing_layers, rules_for
from ..rules.match import is_part_of_adapter, weight_name
from ..storage.local import LocalFolder


def keeps_slicing(switch: bool | None, strategy: Strategy, catalog: Catalog) -> bool:
    """Whether each rank of the job is to have what its own file has.

    MindFormers calls that the original slicing. Checkpoint 2.0 knows no such switch.
    """
    return switch is False and _own(strategy, catalog) is not None


def _own(strategy: Strategy, catalog: Catalog) -> Layout | None:
    """The layout of rank files, if there is one for each rank of the job."""
    layout = catalog.layout if catalog.format == "ranks" else None
    return layout if layout is not None and layout.num_ranks == strategy.num_ranks else None


def other_slicing(switch: bool | None, strategy: Strategy, catalog: Catalog) -> list[str]:
    """A note on weights that the ranks' files cut otherwise than ``strategy`` does."""
    own = _own(strategy, catalog)
    if switch or own is None:
        return []
    try:
        wanted = lay_out_for(catalog, strategy)
    except JaxshardError as error:
        unsaid = f"parallel_config is not compared with the ranks' own parts: {error}"
        return [unsaid] if switch is False else []
    names = [n for n in catalog.tensors if n not in catalog.hyper and weight_name(n) == n]
    differ = _cut_otherwise(catalog, names, own, wanted)
    if not differ:
        return []
    instead = (
        "each rank has what its own file has, as auto_trans_ckpt is False"
        if switch is False
        else "parallel_config counts; auto_trans_ckpt: False keeps what each rank has"
    )
    return [
        f"{len(differ)} of {len(names)} weights lie otherwise by the strategy files of the "
        f"checkpoint than by parallel_config ({strategy}): {format_list(differ, 3)}; {instead}."
    ]


def _cut_otherwise(
    catalog: Catalog, names: Iterable[str], first: Layout, second: Layout
) -> list[str]:
    """Those of ``names`` of which a rank holds another box by ``second`` than by ``first``."""
    same: dict[tuple[object, ...], bool] = {}  # by kind: there are a few hundred
    differ = []
    for name in names:
        shape = catalog.tensors[name].shape
        key = (shape, *(layout.placements.get(name, ()) for layout in (first, second)))
        if key not in same:
            same[key] = _held(first, name, shape) == _held(second, name, shape)
        if not same[key]:
            differ.append(name)
    return differ


def _held(layout: Layout, name: str, shape: tuple[int, ...]) -> dict[int, Box]:
    """The box that each rank holds of a tensor."""
    placements = layout.placements.get(name, ())
    return {r: box for p in placements for r, box in zip(p.ranks, p.boxes(shape), strict=True)}


def own_file(path: Path, rank: int, num_ranks: int, suffix: str | None) -> Path | None:
    """The file of ``rank``, where no strategy says what the files of all ranks hold.

    What a rank's own part is needs none, and MindFormers asks for none.
    """
    for place in (path, path / "checkpoint"):
        if not place.is_dir() or strategy_place(place) is not None:
            continue
        folder = LocalFolder(place)
        try:
            files = folder.files()
        finally:
            folder.close()
        if any(map(rank_names.is_rank_file, files)):
            found = rank_names.choose(files, suffix).paths
            return place / found[rank] if found.keys() == set(range(num_ranks)) else None
    return None


def maybe_part(strategy: Strategy, catalog: Catalog) -> str:
    """What suggests that rank files are of some pipeline stages of the job only; or nothing.

    Strategy files of the first stage alone look like those of a job without stages. The names
    of a known family tell which it is, when they are loaded; of others, the configuration's
    number of ranks is all there is.
    """
    layout = catalog.layout if catalog.format == "ranks" else None
    ranks, stage = strategy.num_ranks, strategy.stage_ranks
    if layout is None or layout.num_ranks >= ranks or layout.num_ranks % stage:
        return ""
    if _is_of_known_family(catalog):
        return ""
    have = layout.num_ranks // stage
    return (
        f"the strategy files are of {layout.num_ranks} ranks, as many as {have} of the "
        f"{strategy.pp} pipeline stages that parallel_config ({strategy}, {ranks} ranks) has"
    )


def refuse_part(switch: bool | None, strategy: Strategy, catalog: Catalog) -> None:
    """Refuse what may be some pipeline stages only, unless a transformation is asked for.

    Raises:
        CoverageError: with the numbers.
    """
    text = "" if switch else maybe_part(strategy, catalog)
    if text:
        raise CoverageError(
            f"{catalog.root}: {text}. Fetch the ranks and the strategy files of all stages; or, if "
            "the checkpoint is of a job with fewer, set auto_trans_ckpt: True."
        )


def _is_of_known_family(catalog: Catalog) -> bool:
    try:
        rules_for(catalog.model, [n for n in catalog.tensors if n not in catalog.hyper])
    except (LayoutError, NotFoundError):
        return False
    return True


def with_layers(catalog: Catalog, num_layers: int | None) -> tuple[Catalog, list[str]]:
    """``catalog`` with the configuration's number of layers where it has none; and notes."""
    own = catalog.model.num_layers
    if num_layers is None or own == num_layers:
        return catalog, []
    if own is not None:
        return catalog, [
            f"the configuration's model has {num_layers} layers, but {own} by the config.json of "
            "the checkpoint, which counts."
        ]
    return replace(catalog, model=replace(catalog.model, num_layers=num_layers)), []


def refuse_missing_layers(catalog: Catalog) -> None:
    """Refuse a checkpoint that lacks layers of its model, whatever its format.

    Raises:
        CoverageError: with their numbers.
    """
    if any(TRAINABLE in file.path for file in catalog.files):
        return  # which layers were trained, nothing says
    if catalog.layout is not None and catalog.layout.unknown:
        return  # stages that are missing for certain are refused where they are needed
    weights = [
        name
        for name in (*catalog.tensors, *catalog.lost)
        if name not in catalog.hyper and weight_name(name) == name and not is_part_of_adapter(name)
    ]
    gone = missing_layers(catalog.model, weights)
    if gone:
        raise CoverageError(
            f"{catalog.root} is a part of a model: {gone}. Give the whole of it, or take what is "
            "there with include=."
        )
