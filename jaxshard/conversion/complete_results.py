"""Output files of complete checkpoints: every tensor whole, in one file or several.

    huggingface   model-00001-of-00002.safetensors, model.safetensors.index.json
    unified       part0.safetensors, param_name_map.json        as MindSpore unifies
    ckpt          model.ckpt
    orbax         what Orbax's own library writes, of a flat {name: array}

The job's numbers (``global_step`` …) are no weights: where there may be several files
they have one of their own. This module touches no disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout, Placement
from ..errors import LayoutError, format_list
from ..formats import huggingface as huggingface_files
from ..formats import weight_files
from ..formats.huggingface import MINDSPORE_HYPER, MINDSPORE_INDEX
from ..planning.outputs import Outputs, arrange
from .results import Request, Result, as_ckpt, as_safetensors

ORBAX_ITEM = "orbax item"
_HUGGINGFACE_BYTES = 5 * 10**9  # what transformers puts in one file
_UNIFIED_BYTES = 3 << 30  # what MindSpore does


def huggingface(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """A folder that transformers loads."""
    groups = _groups(source, tensors, request.max_shard_bytes or _HUGGINGFACE_BYTES)
    paths = huggingface_files.file_names(len(groups))
    if request.one_file and len(groups) == 1:
        groups = [[t.name for t in tensors]]
    outputs, weight_map = _arranged(tensors, groups, paths)
    side = {}
    if len(groups) > 1:
        total = sum(t.num_bytes for t in tensors)
        side["model.safetensors.index.json"] = huggingface_files.index_json(weight_map, total, {})
    metadata = {"format": "pt", **source.metadata}
    if metadata["format"] == "ms":
        metadata["format"] = "pt"  # transformers loads no file that says otherwise
    return Result("huggingface", outputs, as_safetensors(metadata), side)


def unified(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """A folder as ``mindspore.unified_safetensors`` makes it, for MindSpore to slice."""
    groups = _groups(source, tensors, request.max_shard_bytes or _UNIFIED_BYTES)
    paths = [f"part{i}.safetensors" for i in range(len(groups))]
    outputs, weight_map = _arranged(tensors, groups, paths)
    weights = {n: p for n, p in weight_map.items() if p != MINDSPORE_HYPER}
    total = sum(t.num_bytes for t in tensors if t.name in weights)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    side = {MINDSPORE_INDEX: json.dumps(index, indent=4).encode()}
    metadata = {**source.metadata, "format": "ms", "remove_redundancy": "False"}
    return Result("unified", outputs, as_safetensors(metadata), side)


def ckpt(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """One ``.ckpt`` file with everything in it: MindSpore has no index for several."""
    placements = dict.fromkeys((t.name for t in tensors), (Placement(()),))
    outputs = arrange(tensors, Layout(1, placements), [weight_files.NAME])
    lay_file, seal = as_ckpt(source.metadata, crc=request.crc)
    return Result("ckpt", outputs, lay_file, {}, seal)


def orbax(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """An Orbax item. Where bytes lie in its files is Orbax's to know; here it is one file.

    Raises:
        LayoutError: a tensor is empty, which Orbax does not store.
    """
    refuse_empty({t.name: t.shape for t in tensors})
    placements = dict.fromkeys((t.name for t in tensors), (Placement(()),))
    outputs = arrange(tensors, Layout(1, placements), [ORBAX_ITEM])
    return Result("orbax", outputs, as_safetensors({}), {})


def refuse_empty(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what Orbax does not store.

    Raises:
        LayoutError: tensors without an element.
    """
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise LayoutError(
            f"{format_list(empty)} of shape {shapes[empty[0]]}: Orbax stores no arrays without "
            "elements. Leave them out, or write another format."
        )


def check_config(config: object) -> None:
    """Refuse what cannot be ``config.json``, before anything is written."""
    try:
        if config is None or (isinstance(config, Mapping) and json.dumps(dict(config))):
            return
        why = f"a {type(config).__name__} is none"
    except (TypeError, ValueError) as error:
        why = str(error)
    raise LayoutError(f"config= becomes config.json, an object of names and values; {why}.")


def _groups(source: Catalog, tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[str]]:
    weights = [(t.name, t.num_bytes) for t in tensors if t.name not in source.hyper]
    return huggingface_files.plan_files(weights, max_shard_bytes)


def _arranged(
    tensors: Sequence[Tensor], groups: list[list[str]], paths: list[str]
) -> tuple[Outputs, dict[str, str]]:
    """The outputs, and which file serves a name; what is in no group has a file of its own."""
    grouped = {name for group in groups for name in group}
    hyper = [t for t in tensors if t.name not in grouped]
    weights = [t for t in tensors if t.name in grouped]
    if hyper:
        groups, paths = [*groups, [t.name for t in hyper]], [*paths, MINDSPORE_HYPER]
    alone = [(Placement((), first_rank=i),) for i in range(len(groups))]
    placements = {name: alone[i] for i, group in enumerate(groups) for name in group}
    outputs = arrange([*weights, *hyper], Layout(len(groups), placements), paths)
    weight_map = {name: paths[p[0].first_rank] for name, p in placements.items()}
    return outputs, weight_map
