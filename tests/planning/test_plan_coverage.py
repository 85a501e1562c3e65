"""Coverage: what is missing is told at once, and whose files would bring it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from random_layouts import in_memory, models
from test_laws import outputs_of

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import CoverageError
from jaxshard.mapping import Mapping, Transpose
from jaxshard.planning.plan import make_plan, remedy

F32 = BY_NAME["F32"]
MP, DP_MP = Placement((("mp", 4),), (("mp",),)), Placement((("dp", 2), ("mp", 4)), (("mp",),))


def stored(placement: Placement, *ranks: int, num: int = 2) -> Catalog:
    """``num`` tensors of eight rows on ``ranks`` of those that ``placement`` has."""
    boxes = placement.boxes((8, 4))
    pieces = tuple(StoredShard(r, 0, boxes[r - placement.first_rank]) for r in ranks)
    tensors = {f"t{i}": Tensor(f"t{i}", F32, (8, 4), pieces) for i in range(num)}
    layout = Layout(placement.ranks.stop, dict.fromkeys(tensors, (placement,)))
    files = tuple(File(f"rank_{r}/f.safetensors", 64) for r in range(layout.num_ranks))
    return Catalog("cut", "ranks", files, tensors, layout)


@pytest.mark.parametrize(
    ("placement", "ranks", "told"),
    [
        (MP, (0, 1, 3), "Fetch rank_2."),
        (MP, (0,), "Fetch rank_1; rank_2; rank_3."),
        (DP_MP, (0, 1, 3, 4, 5, 7), "Fetch rank_2 or rank_6."),
        (DP_MP, (4, 5), "Fetch rank_2 or rank_6; rank_3 or rank_7."),
        (replace(MP, first_rank=8), (8, 9, 10), "Fetch rank_11."),
        (Placement((("dp", 8),)), (), "Fetch rank_0 or rank_1 or rank_2 or rank_3 or …."),
        (Placement((("mp", 8),), (("mp",),)), (), "Fetch rank_0; rank_1; rank_2; rank_3; rank_4; "),
    ],
)
def test_one_holder_of_each_lost_shard_is_asked_for(placement, ranks, told):
    assert remedy(stored(placement, *ranks)).startswith(told)


def test_many_lost_shards_are_counted():
    catalog = stored(Placement((("mp", 4), ("ep", 4)), (("mp",), ("ep",))), 0)
    assert remedy(catalog).endswith("; rank_8; and 7 more.")


def test_a_shard_that_files_of_another_cut_hold_is_not_lost():
    catalog = stored(MP, 0)
    whole = StoredShard(0, 0, Box.whole((8, 4)))
    tensors = {n: replace(t, shards=(whole,)) for n, t in catalog.tensors.items()}
    assert remedy(replace(catalog, tensors=tensors)) == "Fetch the missing files."


def test_all_tensors_are_told_of_at_once():
    catalog = stored(MP, 0, 1, 3, num=9)
    target = Layout(1, {n: (Placement(()),) for n in catalog.tensors})
    with pytest.raises(CoverageError) as caught:
        make_plan(catalog, outputs_of(catalog, target))
    assert str(caught.value) == (
        "t0: box [0:8, 0:4] has 32 elements, of which the source holds 24 in 3 shards. 8 more "
        "tensors are incomplete: t1, t2, t3 and 5 more. Fetch rank_2."
    )


def test_of_a_mapped_checkpoint_the_ranks_of_its_own_are_told():
    catalog = stored(MP, 0, 1, 3)
    mapped = Mapping((Transpose(("t{i}",)),)).apply(catalog)
    target = Layout(1, {n: (Placement(()),) for n in mapped.tensors})
    with pytest.raises(CoverageError, match=r"Fetch rank_2\.$"):
        make_plan(mapped, outputs_of(mapped, target))


@given(models(num_layouts=1), st.data())
def test_what_is_asked_for_is_what_was_lost(model, data):
    """Take all files of a shard away: the ranks that are named are those that held it."""
    (layout,) = model.layouts
    catalog, _ = in_memory(model, layout)
    tensor = data.draw(st.sampled_from(list(catalog.tensors.values())))
    assume(tensor.num_bytes)
    placement = data.draw(st.sampled_from(layout.placements[tensor.name]))
    shard = data.draw(st.sampled_from(placement.shards(tensor.shape)))
    left = tuple(p for p in tensor.shards if not p.box.intersect(shard.box) and p.box != shard.box)
    broken = replace(catalog, tensors={tensor.name: replace(tensor, shards=left)})
    told = remedy(broken)
    for rank in placement.ranks:
        box = layout.box_of(tensor.name, tensor.shape, rank)
        if box == shard.box and rank < 4:
            assert f"rank_{rank}" in told
