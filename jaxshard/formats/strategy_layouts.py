"""Conversions between placements and their stored forms: strategy numbers and layout files.

    dev_matrix [4, 2]      axes   (d1, 4), (d0, 2)      an axis is named by its number in
    tensor_map [0, -1]     spec   (d0,), ()             the tensor map, counted from the right
    opt step 2, size 2     axes   (d1_outer, 2), (d1, 2), (d0, 2)     spec  (d0, d1), ()

The optimizer shard splits dim 0 further over ranks that would hold replicas, from the
innermost axis outward. So every parameter of a strategy file has a placement, and other modules
do not depend on MindSpore's form. The inverse is not unique: it returns the equivalent form that
MindSpore's own tools handle best. Layouts that strategy files cannot express are stored in
``layout.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

from ..core.decoders import FETCH, as_int, as_ints, as_list, as_object, parse_object, refuse
from ..core.layout import Axes, Layout, Placement, shard_dim_over_replicas
from ..core.runtime import cached
from ..errors import FormatError, LayoutError, format_list, quote_name
from .folder import Folder
from .rank_names import LAYOUT_FILE
from .strategy_codec import ParamLayout


@cached(4096)
def placement(param: ParamLayout, stage: int = 0) -> Placement:
    """Convert the layout of a parameter in pipeline stage ``stage`` to a placement.

    Raises:
        LayoutError: the split is uneven, or the optimizer shard does not match the replicas.

    >>> print(placement(ParamLayout((4, 2), ((0, -1),), 2, 2), stage=1))
    [d0+d1,-] over d1_outer2 d12 d02 from rank 8
    """
    if any(param.param_split_shape) or any(param.indices_offset):
        raise LayoutError(
            f"uneven splits are not supported (param_split_shape {param.param_split_shape}). Save "
            "it from MindSpore with an even split."
        )
    last = len(param.dev_matrix) - 1
    axes = tuple((f"d{last - i}", size) for i, size in enumerate(param.dev_matrix))
    maps = param.tensor_maps
    dims = maps if len(maps) > 1 else tuple((v,) for v in maps[0])
    spec = tuple(tuple(f"d{v}" for v in dim if v != -1) for dim in dims)
    plain = Placement(axes, spec, stage * prod(param.dev_matrix))
    if not param.opt_weight_shard_step or not param.opt_weight_shard_size:
        return plain
    return _optimizer_sharded(plain, param)


def _optimizer_sharded(plain: Placement, param: ParamLayout) -> Placement:
    ways = param.opt_weight_shard_size
    try:
        out = shard_dim_over_replicas(plain, ways)
    except LayoutError:  # such as 3 of the 6 replicas on axes [3, 2]: merge adjacent axes
        out = shard_dim_over_replicas(_joined_replicas(plain), ways)
    step = _step(plain, out)
    if step and step != param.opt_weight_shard_step:
        raise LayoutError(
            f"the optimizer shard has step {param.opt_weight_shard_step} (expected {step}, the "
            f"distance of replicas of {plain}). Save it again without optimizer parallelism, or "
            "report how it was written."
        )
    return out


def _step(plain: Placement, sharded: Placement) -> int:
    """Return the rank distance of adjacent optimizer shards; 0 if there is only one."""
    chosen = [a for a in sharded.spec[0] if not plain.spec or a not in plain.spec[0]]
    if not chosen:
        return 0
    names = [a for a, _ in sharded.axes]
    return prod(n for _, n in sharded.axes[names.index(chosen[-1]) + 1 :])


def _joined_replicas(plain: Placement) -> Placement:
    """Merge adjacent axes that split no dim."""
    used = {a for axes in plain.spec for a in axes}
    axes = list[tuple[str, int]]()
    for name, size in plain.axes:
        if axes and name not in used and axes[-1][0] not in used:
            axes[-1] = (name, axes[-1][1] * size)
        else:
            axes.append((name, size))
    return replace(plain, axes=tuple(axes))


def full_shape(placement: Placement, local_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the whole tensor if every rank has a box of ``local_shape``.

    Raises:
        FormatError: the strategy has more dims than the tensor.

    >>> full_shape(Placement((("mp", 2),), (("mp",),)), (16, 32))
    (32, 32)
    """
    if len(placement.spec) > len(local_shape):
        raise FormatError(
            f"the strategy has {len(placement.spec)} dims, but the stored tensor has shape "
            f"{local_shape}. Check that the strategy belongs to this model."
        )
    return tuple(n * placement.ways(d) for d, n in enumerate(local_shape))


def for_dims(placement: Placement, ndim: int) -> Placement:
    """Resolve the ambiguity of tensor maps for a tensor of ``ndim`` dims.

    A tensor map is one list per dim, or one list with a number per dim. So one dim split over
    two axes looks like two dims with an axis each, until the tensor's shape is known.

    >>> two = Placement((("d1", 2), ("d0", 2)), (("d1",), ("d0",)))
    >>> print(for_dims(two, 1))
    [d1+d0] over d12 d02 from rank 0
    """
    if ndim != 1 or len(placement.spec) < 2 or any(len(axes) != 1 for axes in placement.spec):
        return placement
    return replace(placement, spec=(tuple(axes[0] for axes in placement.spec),))


# --- to strategies --------------------------------------------------------------------------------


@cached(4096)
def param_layout(placement: Placement, ndim: int, *, optimizer_shard: bool = False) -> ParamLayout:
    """Convert the placement of a tensor of ``ndim`` dims to MindSpore's numbers.

    Axes that split one dim are merged where possible, because MindSpore loses data when it
    removes replicas of tensors with nested maps.

    Raises:
        LayoutError: a strategy file cannot express the placement.
    """
    size = dict(placement.axes)
    spec = tuple(tuple(a for a in axes if size[a] > 1) for axes in placement.spec)
    spec += ((),) * (ndim - len(spec))
    placement = replace(placement, spec=spec)
    if optimizer_shard and (found := _as_optimizer_shard(placement)):
        return found
    flat = _joined_splits(placement)
    if all(len(axes) <= 1 for axes in flat.spec):
        return _param_layout_of(flat)
    if found := _as_optimizer_shard(placement):
        return found
    if ndim == 1:
        raise LayoutError(
            f"{placement}: strategy files cannot express a one-dim tensor split over axes that are "
            "not adjacent. Reorder the mesh axes."
        )
    return _param_layout_of(placement)


def _param_layout_of(placement: Placement, step: int = 0, ways: int = 0) -> ParamLayout:
    names = [a for a, _ in placement.axes]
    number = {a: len(names) - 1 - i for i, a in enumerate(names)}
    maps = tuple(tuple(number[a] for a in axes) or (-1,) for axes in placement.spec)
    if all(len(dim) == 1 for dim in maps):
        maps = (tuple(v for dim in maps for v in dim),)
    return ParamLayout(tuple(n for _, n in placement.axes), maps, step, ways)


def _joined_splits(placement: Placement) -> Placement:
    """Merge axes that are adjacent both in the mesh and in a dim."""
    follows = {b: a for axes in placement.spec for a, b in pairwise(axes)}
    axes, alias = list[tuple[str, int]](), dict[str, str]()
    for name, size in placement.axes:
        if axes and name in follows and alias.get(follows[name], follows[name]) == axes[-1][0]:
            alias[name] = axes[-1][0]
            axes[-1] = (axes[-1][0], axes[-1][1] * size)
        else:
            axes.append((name, size))
    spec = tuple(tuple(a for a in dim if a not in alias) for dim in placement.spec)
    return replace(placement, axes=tuple(axes), spec=spec)


def _as_optimizer_shard(placement: Placement) -> ParamLayout | None:
    """Express as much of the split of dim 0 as possible as an optimizer shard, or return None.

    MindSpore's offline tools handle such a tensor correctly only if its other splits use the
    innermost axes in the order of the dims; other placements become tensor maps.
    """
    first = placement.spec[0] if placement.spec else ()
    size = dict(placement.axes)
    for kept in range(len(first)):
        ways = prod(size[a] for a in first[kept:])
        plain = replace(placement, spec=(first[:kept], *placement.spec[1:]))
        for base in (_unfactored(plain, first[kept:]), plain):
            try:
                same = shard_dim_over_replicas(base, ways) == placement
            except LayoutError:
                same = False
            step, parts = _step(plain, placement), prod(map(base.ways, range(len(base.spec))))
            if same and step == parts and _in_order(base):
                whole = base.num_ranks // parts == ways
                return _param_layout_of(base, step, -1 if whole else ways)
    return None


def _unfactored(plain: Placement, chosen: Sequence[str]) -> Placement:
    """Merge the two factors of each axis in ``chosen`` again."""
    used = {a for axes in plain.spec for a in axes}
    axes = list[tuple[str, int]]()
    for name, size in plain.axes:
        outer = f"{name}_outer"
        if axes and axes[-1][0] == outer and name in chosen and outer not in used:
            axes[-1] = (name, axes[-1][1] * size)
        else:
            axes.append((name, size))
    return replace(plain, axes=tuple(axes))


def _in_order(placement: Placement) -> bool:
    """Return whether each dim has at most one axis, and earlier dims have slower axes."""
    names = [a for a, _ in placement.axes]
    used = [names.index(a) for axes in placement.spec for a in axes]
    return used == sorted(used) and all(len(axes) <= 1 for axes in placement.spec)


# --- layout files ---------------------------------------------------------------------------------

# Strategy files need stages of equally many ranks, each of which holds a part of every tensor of
# the stage. Experts with names of their own, and custom rules, use a part of a stage. Tensors refer
# to placements by number, because thousands share a few.
#
#   {"jaxshard_layout": 1, "num_ranks": 4, "stage_axes": [["dp", 2], ["mp", 2]],
#    "placements": [{"axes": [["mp", 2]], "spec": [["mp"], []], "first_rank": 2}, …],
#    "tensors": {"model.layers.0.mlp.experts.3.w1.weight": [0], …}}

_MARK = "jaxshard_layout"
_VERSION = 1
_MAX_BYTES = 100_000_000
_MAX_RANKS = 1 << 20
_MAX_DIMS = 64


def find_layout_file(folder: Folder) -> str | None:
    """Return the layout file at the top of ``folder``, or its only file if that is one."""
    files = folder.files()
    path = next(iter(files)) if len(files) == 1 else LAYOUT_FILE
    if path not in files or "/" in path or not path.endswith(".json"):
        return None
    start = folder.read(path, 0, min(64, files[path].num_bytes))
    return path if f'"{_MARK}"'.encode() in start else None


def layout_file_bytes(layout: Layout, names: Iterable[str]) -> bytes:
    """Return the layout file of the tensors ``names``."""
    numbers: dict[Placement, int] = {}
    tensors = {
        name: [numbers.setdefault(p, len(numbers)) for p in layout.placements[name]]
        for name in names
    }
    placements = [{"axes": p.axes, "spec": p.spec, "first_rank": p.first_rank} for p in numbers]
    root = {
        _MARK: _VERSION,
        "num_ranks": layout.num_ranks,
        "stage_axes": layout.stage_axes,
        "placements": placements,
        "tensors": tensors,
    }
    return (json.dumps(root, ensure_ascii=False) + "\n").encode()


def read_layout_file(folder: Folder, path: str) -> Layout:
    """Read the layout file at ``path``.

    Raises:
        FormatError: the file is damaged or not a valid layout.
    """
    size = folder.files()[path].num_bytes
    if size > _MAX_BYTES:
        raise FormatError(f"{path} has {size} bytes (expected at most {_MAX_BYTES}). {FETCH}")
    root = parse_object(folder.read(path, 0, size), path)
    if root.get(_MARK) != _VERSION:
        raise FormatError(
            f"{path}: layout version {quote_name(repr(root.get(_MARK)))} (expected {_VERSION}). "
            "Upgrade jaxshard."
        )
    num_ranks = as_int(root.get("num_ranks"), f"{path}: num_ranks", 1, _MAX_RANKS)
    placements = [
        _json_placement(value, num_ranks, path)
        for value in as_list(root.get("placements"), f"{path}: placements")
    ]
    return Layout(
        num_ranks,
        _json_tensors(root.get("tensors"), placements, path),
        _json_axes(root.get("stage_axes"), num_ranks, path),
    )


def _json_tensors(
    value: object, placements: list[Placement], path: str
) -> Mapping[str, tuple[Placement, ...]]:
    shared: dict[tuple[int, ...], tuple[Placement, ...]] = {}  # thousands of tensors share a few
    found = {}
    for name, numbers in as_object(value, f"{path}: tensors").items():
        subject = f"{path}: {quote_name(name)}"
        key = as_ints(numbers, subject, 0, len(placements) - 1)
        if key not in shared:
            chosen = sorted((placements[n] for n in key), key=lambda p: p.first_rank)
            overlap = any(b.first_rank < a.ranks.stop for a, b in pairwise(chosen))
            if overlap or not chosen:
                refuse(subject, numbers, "placements on disjoint ranks")
            shared[key] = tuple(chosen)
        found[name] = shared[key]
    return found


def _json_placement(value: object, num_ranks: int, path: str) -> Placement:
    fields = as_object(value, f"{path}: a placement")
    axes = _json_axes(fields.get("axes"), num_ranks, path)
    names = {a for a, _ in axes}
    subject = f"{path}: spec"
    spec = [as_list(dim, subject) for dim in as_list(fields.get("spec"), subject, _MAX_DIMS)]
    used = [axis for dim in spec for axis in dim]
    if not all(isinstance(a, str) and a in names for a in used) or len(used) != len(set(used)):
        refuse(subject, fields.get("spec"), f"each of {format_list(names)} at most once")
    ranks = prod(n for _, n in axes)
    first = as_int(fields.get("first_rank"), f"{path}: first_rank", 0, num_ranks - ranks)
    return Placement(axes, tuple(map(tuple, spec)), first)


def _json_axes(value: object, num_ranks: int, path: str) -> Axes:
    axes = []
    for pair in as_list(value, f"{path}: axes"):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            refuse(f"{path}: an axis", pair, "[name, size]")
        name, size = pair
        axes.append((name, as_int(size, f"{path}: axis {quote_name(name)}", 1, num_ranks)))
    if len(dict(axes)) != len(axes) or prod(n for _, n in axes) > num_ranks:
        refuse(f"{path}: axes", value, f"distinct names and at most {num_ranks} ranks")
    return tuple(axes)
