"""Outputs: which file holds what, in few descriptions however many ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import models

from jaxshard.core.catalog import Tensor
from jaxshard.core.dtypes import BY_NAME, num_bytes
from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import LayoutError
from jaxshard.planning.outputs import arrange

BF16 = BY_NAME["BF16"]


def paths(layout: Layout) -> list[str]:
    return [f"rank_{r}" for r in range(layout.num_ranks)]


@given(models(num_layouts=1), st.booleans())
def test_ranks_hold_what_the_layout_says_or_one_of_the_replicas_does(model, lean):
    (layout,) = model.layouts
    outputs = arrange(model.tensors, layout, paths(layout), remove_redundancy=lean)
    held = [{e.tensor.name: e for e in outputs.contents[c]} for c in outputs.content_of]
    for tensor in model.tensors:
        for placement in layout.placements[tensor.name]:
            for shard in placement.shards(tensor.shape):
                ranks = [placement.first_rank + r for r in shard.holders]
                having = [r for r in ranks if tensor.name in held[r]]
                assert len(having) == (1 if lean else len(ranks))
                assert tuple(having) == outputs.holders(tensor.name, placement, shard)
                assert all(held[r][tensor.name].shape == shard.box.shape for r in having)
    sizes = [sum(num_bytes(e.shape, e.tensor.dtype) for e in h.values()) for h in held]
    assert outputs.rank_bytes() == sizes


@given(models(num_layouts=1))
def test_tensors_keep_their_order_in_every_file(model):
    (layout,) = model.layouts
    order = {t.name: i for i, t in enumerate(model.tensors)}
    for content in arrange(model.tensors, layout, paths(layout)).contents:
        assert all(order[a.tensor.name] < order[b.tensor.name] for a, b in pairwise(content))


def test_replicas_take_turns_so_that_files_are_about_as_large():
    placement = Placement((("dp", 4), ("mp", 2)), (("mp",),))
    tensors = [Tensor(f"t{i}", BF16, (64 + 2 * i, 8), ()) for i in range(40)]
    layout = Layout(8, {t.name: (placement,) for t in tensors})
    sizes = arrange(tensors, layout, paths(layout), remove_redundancy=True).rank_bytes()
    assert sum(sizes) == sum(t.num_bytes for t in tensors)
    assert max(sizes) - min(sizes) <= tensors[-1].num_bytes // 2


def test_thousands_of_ranks_share_a_description():
    placement = Placement((("dp", 512), ("mp", 4)), (("mp",),))
    tensors = [Tensor(f"t{i}", BF16, (8, 8), ()) for i in range(100)]
    layout = Layout(2048, {t.name: (placement,) for t in tensors})
    assert len(arrange(tensors, layout, paths(layout)).contents) == 1


def test_a_rank_may_hold_nothing():
    tensor = Tensor("t", BF16, (8,), ())
    layout = Layout(4, {"t": (Placement((("dp", 4),)),)})
    outputs = arrange([tensor], layout, paths(layout), remove_redundancy=True)
    assert sorted(outputs.rank_bytes()) == [0, 0, 0, 16]


def test_a_tensor_without_a_place_is_refused():
    layout = Layout(1, {})
    with pytest.raises(LayoutError, match="t is placed on no rank"):
        arrange([Tensor("t", BF16, (8,), ())], layout, ["a"])
    with pytest.raises(LayoutError, match="1 ranks need as many files, not 2"):
        arrange([], layout, ["a", "b"])
