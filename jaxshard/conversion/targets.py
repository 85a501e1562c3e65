"""Targets: from ``to=`` (a strategy, strategy files, "full", "same") to output files.

    full            a complete checkpoint, by default in the Hugging Face format
    dp2mp4pp2       one file per rank, cut by the rules of the model's family
    DIR or FILE     one file per rank, cut as in those strategy files
    same            the layout of the source

Only strategy files are read here, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout, MeshAxes, Placement, Strategy
from ..errors import LayoutError, NotFoundError, format_list
from ..formats.output_files import Request, Result
from ..formats.registry import FORMATS, Format, find_format, names_where
from ..rules import Policy, Rules, Unmatched, table_for
from ..rules import layout as lay_out
from ..rules.tensor_dims import Factors
from ..storage.remote import is_remote
from .open import PathLike, open_strategy

__all__ = [
    "FULL",
    "SAME",
    "Target",
    "check_factors",
    "check_request",
    "lay_out_for",
    "make_result",
    "parse_target",
    "same_layout",
    "step_of_numbers",
]

FULL, SAME = "full", "same"  # a complete checkpoint; the layout of the source

Target = str | PathLike | Strategy | Layout


def parse_target(target: Target, words: Collection[str] = (FULL, SAME)) -> Strategy | Layout | str:
    """Parse a target: one of ``words``, a strategy, or the path of strategy files.

    A text that is a strategy is never a path, so a folder called ``mp2`` in the working directory
    does not change the meaning of ``"mp2"``; ``"./mp2"`` is that folder.

    Args:
        target: as the caller typed it; a strategy or a layout is returned as it is.
        words: the words that the verb accepts, which are returned as they are.

    Raises:
        LayoutError: none of these.
        FormatError, CoverageError: the strategy files are damaged or incomplete.
    """
    if isinstance(target, Strategy | Layout):
        return target
    text = os.fspath(target)
    if text in words:
        return text
    try:
        return Strategy.parse(text)
    except LayoutError as error:
        if is_remote(text) or os.path.exists(text):
            return open_strategy(text)
        other = f"neither {', '.join(words)}, nor" if words else "not"
        raise LayoutError(
            f"the target is {other} an existing strategy file or folder; {error}"
        ) from None


def lay_out_for(
    source: Catalog,
    strategy: Strategy | MeshAxes,
    rules: Rules | None = None,
    *,
    unmatched: Unmatched = "error",
    uneven: Policy = "error",
    computes: bool = False,
) -> Layout:
    """Return the layout of ``source``'s tensors under ``strategy``, by its family's rules.

    ``rules`` precede those of the family, or are the only ones if the family is unknown. Names
    without a rule and dims that do not divide are errors, or replicated with ``"replicate"``.
    Mapped tensors get the layout of their source tensors; if these have no rule, that of their
    own names. If the ranks compute with their parts (``computes``), these have whole heads.

    Raises:
        LayoutError: names without a rule, dims that do not divide, or fewer kv heads than ranks
            where kv and q heads are fused, or the ranks compute.
    """
    if source.origin is not None and rules is None:
        before = source.origin.catalog
        try:
            layout = _lay_out_parts(source, before, strategy, unmatched, uneven)
            carried = source.origin.place(layout)
        except (LayoutError, NotFoundError) as error:
            try:
                layout = _by_rules(source, strategy, None, unmatched, uneven, computes)
            except (LayoutError, NotFoundError):
                raise error from None  # it describes the problem of the mapping
            _check_groups(source, layout)
            return layout
        kept = {n: p for n, p in carried.placements.items() if n in source.tensors}
        return replace(carried, placements=kept)
    return _by_rules(source, strategy, rules, unmatched, uneven, computes)


def check_factors(source: Catalog, layout: Layout) -> None:
    """Check that every part of a quantized weight keeps its scale factors.

    Raises:
        LayoutError: a part does not; with the numbers that fit.
    """
    shapes = {n: source.tensors[n].shape for n in layout.placements if n in source.tensors}
    Factors(shapes, source.model.config).check(layout.placements)


def _check_groups(source: Catalog, layout: Layout) -> None:
    """Check that no rank holds a part of a kv head, which rules do not exclude."""
    for name, placements in layout.placements.items():
        for placement in placements:
            source.tensors[name].check_groups(placement)


def _lay_out_parts(
    source: Catalog,
    before: Catalog,
    strategy: Strategy | MeshAxes,
    unmatched: Unmatched,
    uneven: Policy,
) -> Layout:
    """Return the layout of the source tensors; factors are replicated, as they are consumed."""
    views = (p.view for t in source.tensors.values() for p in t.shards if p.view)
    factors = {t.name for view in views for t in view.operands} & before.tensors.keys()
    weights = {n: t for n, t in before.tensors.items() if n not in factors}
    layout = lay_out_for(
        replace(before, tensors=weights), strategy, unmatched=unmatched, uneven=uneven
    )
    everywhere = (Placement((("all", strategy.num_ranks),)),)
    return replace(layout, placements={**layout.placements, **dict.fromkeys(factors, everywhere)})


def _by_rules(
    source: Catalog,
    strategy: Strategy | MeshAxes,
    rules: Rules | None,
    unmatched: Unmatched,
    uneven: Policy,
    computes: bool,
) -> Layout:
    lost = () if source.origin else tuple(source.lost)
    names = [*(name for name in source.tensors if name not in source.scalars), *lost]
    table = table_for(source.model, names, strategy, rules, unmatched)
    shapes = {t.name: t.shape for t in source.tensors.values()}
    how = (source.model, source.scalars, unmatched, uneven, lost)
    return lay_out(shapes, strategy, table, *how, computes=computes)


def same_layout(source: Catalog) -> Layout | None:
    """Return the layout of ``source``, under its mapped names; None if it is complete.

    Raises:
        LayoutError: a rank's shards are not a whole part of a mapped tensor.
    """
    if source.layout is not None or source.origin is None:
        return source.layout
    before = source.origin.catalog
    return source.origin.place(before.layout) if before.layout is not None else None


def make_result(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """Plan the files that hold ``tensors`` of ``source`` as ``request`` specifies.

    Raises:
        LayoutError: the layout does not fit the tensors, or the format the layout or a dtype.
    """
    is_complete = request.to is None
    format = find_format(request.format, is_complete=is_complete)
    if not (format.is_complete if is_complete else format.is_by_rank):
        able = names_where("is_complete" if is_complete else "is_by_rank")
        raise LayoutError(
            f"format {format.name!r} does not support "
            f"{'complete checkpoints' if is_complete else 'files by rank'} (expected one of "
            f"{', '.join(able)}). Give {'a layout' if is_complete else 'full'} with to= (--to)."
        )
    if not format.own_library:
        _refuse_unwritable(tensors)
    return replace(format.plan_files(source, tensors, request), checksums=request.checksums)


def _refuse_unwritable(tensors: Sequence[Tensor]) -> None:
    """Check that weight files have the dtypes of ``tensors``; Orbax stores more."""
    unknown = [f"{t.name} ({t.dtype})" for t in tensors if not t.dtype.is_in_files]
    if unknown:
        raise LayoutError(
            f"{len(unknown)} tensors have dtypes that weight files do not have: "
            f"{format_list(unknown)}. Leave them out with exclude= (--exclude), or write format= "
            "(--format) orbax."
        )


def step_of_numbers(numbers: Mapping[str, Any]) -> tuple[int, int]:
    """Return the epoch and step for rank files' names from training scalars; else (1, 1)."""
    step = numbers.get("global_step", numbers.get("step_num"))
    return (1, int(step)) if step and step > 0 else (1, 1)


def check_request(request: Request, step: str | None = None) -> None:
    """Check that every option of ``request`` has an effect for its target.

    Raises:
        LayoutError: an option would be ignored.
    """
    is_whole = request.to is None
    format = find_format(request.format, is_complete=is_whole)
    if request.remove_redundancy and is_whole:
        raise LayoutError(
            "remove_redundancy= (--remove-redundancy) is for files by rank; a complete checkpoint "
            "stores nothing twice. Leave it out, or give a layout with to= (--to)."
        )
    if request.max_shard_bytes is not None and not (is_whole and format.in_shards):
        raise LayoutError(
            "max_shard_size= (--max-shard-size) is for complete checkpoints in several files "
            f"({', '.join(names_where('in_shards'))}), and the target is "
            f"{'one file' if is_whole else 'a file a rank'}. Leave it out."
        )
    if request.crc and not format.has_crc:
        able = names_where("has_crc")
        raise LayoutError(
            f"crc= (--crc) is for the formats {', '.join(able)}, and the format is {format.name}. "
            f'Leave it out, or give format="{able[0]}" (--format {able[0]}).'
        )
    if request.checksums and (request.one_file or format.own_library):
        raise LayoutError(
            "checksums= (--checksums) adds a file to a directory, and the target "
            + (
                "is one file. Name a folder."
                if request.one_file
                else f"is {format.title}, whose files have checksums of their own. Leave it out."
            )
        )
    if step is not None and (is_whole or not format.steps_in_names):
        raise LayoutError(
            f"step= (--step) {step} is for the names of rank files, and the target has none. Leave "
            "it out."
        )
    if is_whole and not format.prefix_if_complete and request.prefix != Request.prefix:
        raise LayoutError(
            f"prefix= (--prefix) {request.prefix} is for files by rank, and the target is a "
            "complete checkpoint, whose files are named by its format. Leave it out."
        )


def refuse_on_stores(format: Format, *, checksums: bool) -> None:
    """Refuse results that are not written to an object store.

    Raises:
        LayoutError: the format is written by a library of its own, or has ``checksums.json``.
    """
    if format.own_library or checksums:
        what = (
            f"format {format.name!r} is" if format.own_library else "checksums= (--checksums) are"
        )
        raise LayoutError(
            f"{what} written to local paths only. Write to a disk, and upload the folder with the "
            "tools of the store."
        )


# --- Destinations that are one weight file (``out.safetensors``, ``out.ckpt``)

_NO_LIMIT = 1 << 62


def is_file_name(destination: PathLike | None) -> bool:
    """Return whether ``destination`` names one weight file, and not an existing directory."""
    return destination is not None and _kind(destination) in _formats()


def refuse_file_name(destination: PathLike) -> None:
    """Check that ``destination`` does not name a weight file, for verbs that write directories.

    Raises:
        LayoutError: it does.
    """
    if is_file_name(destination):
        raise LayoutError(
            f"{destination} names one file, and save writes a directory. Leave out "
            f"{_kind(destination)!r}; jaxshard merge makes one file of the directory."
        )


def with_file_format(request: Request, destination: PathLike | None) -> Request:
    """Return ``request`` with the format that the suffix of ``destination`` implies."""
    if destination is None or request.to is not None or not is_file_name(destination):
        return request
    name = request.format or _formats()[_kind(destination)]
    limit = request.max_shard_bytes
    if limit is None and name in FORMATS and FORMATS[name].in_shards and FORMATS[name].file_suffix:
        limit = _NO_LIMIT
    return replace(request, format=name, max_shard_bytes=limit, one_file=True)


def single_file(result: Result, destination: PathLike | None) -> str | None:
    """Return the file of ``result`` that becomes ``destination``; None if that is a directory.

    Raises:
        LayoutError: ``destination`` is one file, and the result is several, or of another format.
    """
    if destination is None or not is_file_name(destination):
        return None
    paths, kind = result.outputs.paths, _kind(destination)
    if len(paths) > 1 or "/" in paths[0]:
        raise LayoutError(
            f"{destination} names one file, but the result is {format_list(paths, 3)}. Name a "
            "directory."
        )
    if not paths[0].endswith(kind):
        raise LayoutError(
            f"{destination} ends in {kind}, but the result is {paths[0]}. Give another name, or "
            f'format="{_formats()[kind]}" (--format {_formats()[kind]}).'
        )
    return paths[0]


def notes_on_left_out(source: Catalog, result: Result, only: str | None) -> tuple[str, ...]:
    """Return a note on extras and side files, which a result of one file leaves out."""
    left = [*source.extras, *result.side_files] if only else []
    if not left:
        return ()
    return (
        f"{format_list(left)} not carried along: the result is one file. Name a directory to "
        "keep them.",
    )


def _formats() -> dict[str, str]:
    """Return the format of each file suffix."""
    return {f.file_suffix: f.name for f in FORMATS.values() if f.file_suffix}


def _kind(destination: PathLike) -> str:
    path = Path(destination)
    return "" if path.is_dir() else path.suffix
