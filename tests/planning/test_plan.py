"""Plans: they say their numbers, can be kept and sent, and cost little for many ranks."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import models
from test_laws import outputs_of, planned

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.core.layout import Layout, Placement
from jaxshard.core.ranges import Grid
from jaxshard.errors import CoverageError, LayoutError
from jaxshard.planning import plan as costs
from jaxshard.planning.copies import check_covered
from jaxshard.planning.outputs import arrange
from jaxshard.planning.plan import make_plan

BF16 = BY_NAME["BF16"]


def whole(name: str, shape: tuple[int, ...], kind: str = "BF16") -> Tensor:
    return Tensor(name, BY_NAME[kind], shape, (StoredShard(0, 64, Box.whole(shape)),))


def catalog_of(*tensors: Tensor) -> Catalog:
    return Catalog("m", "huggingface", (File("f", 10**12),), {t.name: t for t in tensors})


@given(models())
def test_a_plan_is_a_value(model):
    """Equal if made from equals, and the same after a journey through bytes."""
    plan, _ = planned(model, *model.layouts)
    again, _ = planned(model, *model.layouts)
    assert plan == again
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert list(pickle.loads(pickle.dumps(plan)).moves()) == list(plan.moves())


@given(models())
def test_all_ranks_one_by_one_cost_what_they_cost_together(model):
    plan, _ = planned(model, *model.layouts)
    ranks = range(len(plan.outputs.paths))
    alone = [planned(model, *model.layouts, only=frozenset({r}))[0].totals for r in ranks]
    assert sum(t.bytes_written for t in alone) == plan.totals.bytes_written
    assert sum(t.num_files for t in alone) == plan.totals.num_files


def test_columns_are_read_once_for_all_who_share_them():
    mp4 = Layout(4, {"w": (Placement((("mp", 4),), ((), ("mp",))),)})
    source = catalog_of(whole("w", (1024, 1024)))
    totals = make_plan(source, outputs_of(source, mp4)).totals
    assert totals.bytes_needed == totals.bytes_read == totals.bytes_written == 2 << 20
    assert (totals.num_reads, totals.num_writes, totals.num_copies) == (2, 8, 8)


def test_replicas_are_written_to_all_and_read_once():
    dp4 = Layout(4, {"w": (Placement((("dp", 4),)),)})
    source = catalog_of(whole("w", (1024,)))
    totals = make_plan(source, outputs_of(source, dp4)).totals
    assert (totals.bytes_read, totals.bytes_written, totals.num_writes) == (2048, 8192, 4)


def test_a_piece_that_is_missing_is_told_with_its_tensor():
    half = replace(whole("w", (8, 8)), shards=(StoredShard(0, 64, Box((0, 0), (4, 8))),))
    source = catalog_of(half)
    layout = Layout(1, {"w": (Placement(()),)})
    with pytest.raises(CoverageError, match=r"^w: .*64 elements, of which the source holds 32"):
        make_plan(source, outputs_of(source, layout))
    with pytest.raises(CoverageError, match=r"^w: "):
        check_covered(half)


def test_a_cut_through_a_byte_is_told_with_its_tensor():
    source = catalog_of(whole("w", (8, 6), "F4"))
    layout = Layout(2, {"w": (Placement((("mp", 2),), ((), ("mp",))),)})
    with pytest.raises(LayoutError, match=r"^w: a F4 tensor packs 2 elements"):
        make_plan(source, outputs_of(source, layout))


def test_thousands_of_empty_tensors_cost_nothing():
    tensors = [whole(f"t{i}", (0, 16)) for i in range(5000)]
    source = catalog_of(*tensors)
    mp2 = (Placement((("mp", 2),), ((), ("mp",))),)
    layout = Layout(2, {t.name: mp2 for t in tensors})
    plan = make_plan(source, outputs_of(source, layout))
    assert plan.totals.num_tensors == 5000
    assert plan.totals.num_reads == plan.totals.num_writes == plan.totals.bytes_written == 0
    assert all(not move.cells for move in plan.moves())


def test_tensors_of_one_geometry_are_costed_once():
    """Else these ten million shards would take minutes."""
    tensors = [whole(f"t{i}", (2048, 64)) for i in range(5000)]
    source = catalog_of(*tensors)
    place = (Placement((("dp", 256), ("mp", 8)), (("mp",),)),)
    layout = Layout(2048, {t.name: place for t in tensors})
    outputs = arrange(tensors, layout, [f"r{i}" for i in range(2048)])
    assert make_plan(source, outputs).totals.num_writes == 5000 * 2048
    assert outputs.content_of == (0,) * 2048


def test_the_source_of_a_plan_may_hold_replicas_of_another_cut():
    """A tensor stored whole by one file and in halves by others is read once."""
    halves = tuple(StoredShard(i, 0, Box((4 * i,), (4 * i + 4,))) for i in range(2))
    tensor = Tensor("w", BF16, (8,), (*halves, StoredShard(2, 0, Box((0,), (8,)))))
    source = catalog_of(tensor)
    layout = Layout(1, {"w": (Placement(()),)})
    assert make_plan(source, outputs_of(source, layout)).totals.bytes_read == 16


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20), (1 << 6, 1 << 24, 1 << 10)])
@pytest.mark.parametrize("spec", [(), (("mp",),), ((), ("mp",))])
def test_a_plan_costs_by_geometries_and_not_by_bytes(shape, spec, monkeypatch):
    """A tensor of 4 TiB, whole or cut: a handful of blocks is looked at, of four million."""
    seen = []
    count = costs.block_steps
    monkeypatch.setattr(costs, "block_steps", lambda *a: seen.append(a) or count(*a))
    source = replace(catalog_of(whole("w", shape, "F32")), files=(File("f", 1 << 43),))
    layout = Layout(4, {"w": (Placement((("mp", 4),), spec[: len(shape)]),)})
    totals = make_plan(source, outputs_of(source, layout)).totals
    assert totals.bytes_needed == totals.bytes_read == 4 << 40
    assert totals.num_reads >= 4 << 20 >> 1
    assert len(seen) <= 64


@settings(max_examples=150)
@given(models(), st.sampled_from([16, 64, 200, 1024]), st.sampled_from([16, 96, 1024]))
def test_counting_kinds_of_blocks_is_counting_all_of_them(model, block, tile):
    def one_by_one(grid, parts):
        return ((b, 1) for b in grid)

    limits = {"block_bytes": block, "tile_bytes": tile}
    plan, _ = planned(model, *model.layouts, **limits)
    costs._cost.cache_clear()
    costs._whole_cost.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grid, "kinds", one_by_one)
        listed, _ = planned(model, *model.layouts, **limits)
    costs._cost.cache_clear()
    costs._whole_cost.cache_clear()
    assert (plan.totals, plan.reads) == (listed.totals, listed.reads)
