"""Device matrices as placements, against a plain reading of MindSpore's rule, rank by rank."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.core.box import Box
from jaxshard.core.layout import Placement, shard_dim_over_replicas
from jaxshard.errors import LayoutError
from jaxshard.formats import strategy_codec as messages
from jaxshard.formats import strategy_files as sf
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.strategy_codec import Operator, ParamLayout, StrategyFile
from jaxshard.formats.strategy_layouts import full_shape, param_layout
from jaxshard.formats.strategy_layouts import placement as placement_of


def plain_boxes(param: ParamLayout, shape: tuple[int, ...]) -> list[Box]:
    """MindSpore's rule read literally, rank by rank, without axes being factored."""
    dev, n = param.dev_matrix, len(param.dev_matrix)
    maps = param.tensor_maps if len(param.tensor_maps) > 1 else [(v,) for v in param.tensor_maps[0]]
    used = {v for dim in maps for v in dim if v != -1}
    out = []
    for rank in range(prod(dev)):
        c, rest = [0] * n, rank
        for i in reversed(range(n)):
            rest, c[i] = divmod(rest, dev[i])
        start, stop = [], []
        for length, dim in zip(shape, maps, strict=True):
            index, parts = 0, 1
            for v in dim:
                if v != -1:
                    index, parts = index * dev[n - 1 - v] + c[n - 1 - v], parts * dev[n - 1 - v]
            start.append(index * (length // parts))
            stop.append((index + 1) * (length // parts))
        left = param.opt_weight_shard_size
        free = [i for i in range(n) if n - 1 - i not in used and dev[i] > 1]
        if left == -1:
            left = prod(dev[i] for i in free)
        index, weight = 0, 1
        for i in reversed(free):  # innermost first: its digit is the low one
            take = min(dev[i], left)
            index += c[i] % take * weight
            weight, left = weight * take, left // take
            if left <= 1:
                break
        part = (stop[0] - start[0]) // weight
        start[0] += index * part
        stop[0] = start[0] + part
        out.append(Box(tuple(start), tuple(stop)))
    return out


@st.composite
def param_layouts(draw: st.DrawFn) -> tuple[ParamLayout, int]:
    """Any layout with an optimizer shard that fits, and the tensor's dims."""
    dev = tuple(draw(st.lists(st.sampled_from([1, 2, 2, 4, 3]), min_size=1, max_size=4)))
    ndim = draw(st.integers(1, 3))
    axes = draw(st.permutations(range(len(dev))))
    dims: list[list[int]] = [[] for _ in range(ndim)]
    for axis in axes[: draw(st.integers(0, len(dev)))]:
        dims[draw(st.integers(0, ndim - 1))].append(axis)
    if ndim == 1:
        dims = [dims[0][:1]]
    nested = ndim > 1 and any(len(d) > 1 for d in dims)
    maps = tuple(tuple(d) or (-1,) for d in dims)
    if not nested:
        maps = (tuple(v for d in maps for v in d),)
    used = {v for d in dims for v in d}
    free = [i for i in range(len(dev)) if len(dev) - 1 - i not in used and dev[i] > 1]
    ways, step, sizes = 1, 0, []
    for i in reversed(free):  # what the rule can use: whole axes, then a divisor of the next
        sizes += [ways * f for f in range(2, dev[i] + 1) if dev[i] % f == 0]
        step = step or prod(dev[i + 1 :])
        ways *= dev[i]
    size = draw(st.sampled_from([0, *sizes, -1])) if sizes else 0
    return ParamLayout(dev, maps, step if size else 0, size), ndim


@given(param_layouts())
def test_placements_are_the_boxes_of_mindspores_rule(case: tuple[ParamLayout, int]) -> None:
    param, ndim = case
    shape = (288,) * ndim
    wanted = plain_boxes(
        replace(param, opt_weight_shard_size=param.opt_weight_shard_size or 1), shape
    )
    placement = placement_of(param, stage=2)
    assert list(placement.boxes(shape)) == wanted
    assert placement.first_rank == 2 * prod(param.dev_matrix)
    assert full_shape(placement, wanted[0].shape) == shape


@given(param_layouts(), st.booleans())
def test_a_placement_survives_being_written(
    case: tuple[ParamLayout, int], optimizer_shard: bool
) -> None:
    param, ndim = case
    shape = (288,) * ndim
    placement = placement_of(param)
    try:
        back = param_layout(placement, ndim, optimizer_shard=optimizer_shard)
    except LayoutError:
        assert ndim == 1  # the one thing that cannot be said
        assert len(placement.spec[0]) > 1
        return
    assert placement_of(back).boxes(shape) == placement.boxes(shape)
    data = messages.to_bytes(StrategyFile("f", {0: {"w-1": back}}, (Operator("op", 0),), True, 1))
    assert sf.read_file(MemoryFolder({"f": data}), "f").stages[0]["w-1"] == back


def test_the_worked_example_of_an_optimizer_shard() -> None:
    wq = placement_of(ParamLayout((4, 2), ((0, -1),), 2, 2))
    norm = placement_of(ParamLayout((4, 2), ((-1,),), 1, 2))
    boxes = wq.boxes((32, 32))
    assert boxes[5] == boxes[1] == Box((16, 0), (24, 32))
    assert boxes[3] == boxes[7] == Box((24, 0), (32, 32))
    assert norm.boxes((32,))[5] == Box((16,), (32,))


def test_three_ways_over_neighbouring_replica_axes_are_consecutive_ranks() -> None:
    with pytest.raises(LayoutError):  # the axes alone do not factor
        shard_dim_over_replicas(Placement((("a", 3), ("b", 2)), ((),)), 3)
    boxes = placement_of(ParamLayout((3, 2), ((-1,),), 1, 3)).boxes((6,))
    assert [b.start[0] for b in boxes] == [0, 2, 4, 0, 2, 4]


@pytest.mark.parametrize(
    ("placement", "ndim", "wanted"),
    [
        # one axis a dim: a flat map, also if it could be an optimizer shard
        (Placement((("dp", 2), ("mp", 4)), (("mp",),)), 2, ParamLayout((2, 4), ((0, -1),))),
        # neighbouring axes are joined
        (
            Placement((("dp", 2), ("cp", 2), ("mp", 2)), ((), ("cp", "mp"))),
            2,
            ParamLayout((2, 4), ((-1, 0),)),
        ),
        # dim 0 over mp, then over data ranks: an optimizer shard
        (
            Placement((("dp", 4), ("mp", 2)), (("mp", "dp"),)),
            2,
            ParamLayout((4, 2), ((0, -1),), 2, -1),
        ),
        # its factored axis is made one again
        (
            Placement((("dp_outer", 2), ("dp", 2), ("mp", 2)), (("mp", "dp"),)),
            1,
            ParamLayout((4, 2), ((0,),), 2, 2),
        ),
        # any other split over several axes: nested maps
        (
            Placement((("a", 2), ("b", 2), ("c", 2)), ((), ("a", "c"))),
            2,
            ParamLayout((2, 2, 2), ((-1,), (2, 0))),
        ),
        # MindSpore's tools get an optimizer shard wrong if the dims are split in other order
        (
            Placement((("a", 2), ("b", 2), ("c", 2)), (("c", "a"), ("b",))),
            2,
            ParamLayout((2, 2, 2), ((0, 2), (1,))),
        ),
        (Placement((("mp", 2),)), 0, ParamLayout((2,), ((),))),
    ],
)
def test_placements_are_said_in_the_form_mindspore_reads_right(
    placement: Placement, ndim: int, wanted: ParamLayout
) -> None:
    assert param_layout(placement, ndim) == wanted


def test_the_only_dim_over_distant_axes_cannot_be_said() -> None:
    distant = Placement((("a", 2), ("b", 2), ("c", 2)), (("a", "c"),))
    with pytest.raises(LayoutError, match="cannot express a one-dim tensor"):
        param_layout(distant, 1)
