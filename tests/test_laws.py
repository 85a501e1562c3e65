"""Laws: what must be true of any journey between any two layouts, by random examples."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapping_worlds import Memory
from random_layouts import Model, in_memory, models, read_by_hand, write_whole
from test_mapping import FUSED
from test_mapping import model as mapped_model

import jaxshard as js
from jaxshard.core.catalog import Tensor
from jaxshard.core.dtypes import in_units
from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import CoverageError, LayoutError
from jaxshard.planning.outputs import Outputs, arrange
from jaxshard.planning.plan import Plan, make_plan
from jaxshard.storage import engine, file_to_file
from jaxshard.storage.io import Sink, Source
from jaxshard.storage.resources import Budget, Counts

COUNTED = tuple(f.name for f in fields(Counts))
FEW, MANY = settings(max_examples=50), settings(max_examples=250)
MB = 1 << 20
ONE_THREAD = Budget(1, MB)
QUICK = {"fsync": False, "workers": 2}


class Carried(Source, Sink):
    """A plan carried out in memory: what every rank got, and how often each byte was written."""

    def __init__(
        self,
        plan: Plan,
        files: list[bytes],
        budget: Budget = ONE_THREAD,
        order: Callable[[list], None] = lambda moves: None,
        by: ModuleType = engine,
    ) -> None:
        self.got: dict[tuple[int, str], bytearray] = {}
        self.times: dict[tuple[int, str], np.ndarray] = {}
        self.files = files
        self.reads = [0] * len(plan.source.files)
        outputs = plan.outputs
        for rank in range(len(outputs.paths)) if plan.only is None else plan.only:
            for entry in outputs.contents[outputs.content_of[rank]]:
                self.got[rank, entry.tensor.name] = bytearray(b"\xee" * entry.num_bytes)
                self.times[rank, entry.tensor.name] = np.zeros(entry.num_bytes, int)
        moves = list(plan.journeys())
        order(moves)
        self.counts: Counts = by.run(moves, self, self, budget=budget)

    def read(self, piece, offset, buffer):
        self.reads[piece.file] += 1
        self._fill(piece, offset, buffer)

    def _fill(self, piece, offset, buffer):
        assert piece.offset <= offset
        assert offset + len(buffer) <= len(self.files[piece.file])
        buffer[:] = self.files[piece.file][offset : offset + len(buffer)]

    def read_views(self, piece, offset, views):
        self.reads[piece.file] += 1
        for view in views:
            self._fill(piece, offset, view)
            offset += len(view)

    def read_rows(self, piece, offsets, buffer):
        share = len(buffer) // len(offsets)
        for n, offset in enumerate(offsets):
            self.read(piece, offset, buffer[n * share : (n + 1) * share])

    def write(self, move, target, offset, buffer):
        for rank in move.targets[target].ranks:
            self.got[rank, move.name][offset : offset + len(buffer)] = buffer
            self.times[rank, move.name][offset : offset + len(buffer)] += 1
        return len(move.targets[target].ranks)

    def write_bundle(self, bundle, buffer):
        for rank in bundle.ranks:
            for name, start, length in zip(
                bundle.names, bundle.starts, bundle.lengths, strict=True
            ):
                assert length == len(self.got[rank, name])
                self.got[rank, name][:] = buffer[start : start + length]
                self.times[rank, name] += 1
        return len(bundle.ranks)

    def write_views(self, move, target, offset, views, num_bytes):
        assert num_bytes == sum(map(len, views))
        return self.write(move, target, offset, b"".join(views))


@pytest.fixture(autouse=True, scope="module")
def even_short_rows_are_scattered():
    """The streams leave rows as short as these to the engine, were they not told otherwise."""
    before, file_to_file._LEAST_RUN = file_to_file._LEAST_RUN, 1
    file_to_file._striped_cells.cache_clear()
    yield
    file_to_file._LEAST_RUN = before
    file_to_file._striped_cells.cache_clear()


ways = st.sampled_from([engine, file_to_file])


def planned(
    model: Model, source: Layout, target: Layout, *, drop: float = 0.0, lean: bool = False, **how
) -> tuple[Plan, list[bytes]]:
    catalog, files = in_memory(model, source, drop)
    return make_plan(catalog, outputs_of(catalog, target, lean), **how), files


def outputs_of(catalog: js.Catalog, target: Layout, lean: bool = False) -> Outputs:
    paths = [f"rank_{r}" for r in range(target.num_ranks)]
    return arrange(list(catalog.tensors.values()), target, paths, remove_redundancy=lean)


subsets = st.lists(st.integers(0, 7), min_size=1, max_size=4)


@MANY
@given(models(), st.floats(0, 0.9), st.booleans(), st.none() | subsets, ways)
def test_every_rank_gets_what_numpy_says_and_every_byte_once(model, drop, lean, ranks, by):
    source, target = model.layouts
    only = None if ranks is None else frozenset(r % target.num_ranks for r in ranks)
    plan, files = planned(model, source, target, drop=drop, lean=lean, only=only)
    carried = Carried(plan, files, by=by)
    for (rank, name), data in carried.got.items():
        assert bytes(data) == model.rank_bytes(target, rank)[name][1]
    assert all((times == 1).all() for times in carried.times.values())


@MANY
@given(
    models(),
    st.floats(0, 0.9),
    st.booleans(),
    st.none() | subsets,
    st.sampled_from([64, 1024, MB]),
    ways,
)
def test_the_plan_knows_the_numbers_of_the_run(model, drop, lean, ranks, block, by):
    source, target = model.layouts
    only = None if ranks is None else frozenset(r % target.num_ranks for r in ranks)
    plan, files = planned(model, source, target, drop=drop, lean=lean, only=only, block_bytes=block)
    carried = Carried(plan, files, Budget(1, block), by=by)
    assert astuple(carried.counts) == tuple(getattr(plan.totals, name) for name in COUNTED)
    assert tuple(carried.reads) == plan.reads
    assert plan.totals.bytes_needed == distinct_bytes(model, plan)


@MANY
@given(
    models(),
    st.floats(0, 0.9),
    st.booleans(),
    st.none() | subsets,
    st.sampled_from([16, 64, MB]),
    ways,
)
def test_what_is_bundled_gets_where_it_should_and_is_counted(model, drop, lean, ranks, block, by):
    source, target = model.layouts
    only = None if ranks is None else frozenset(r % target.num_ranks for r in ranks)
    how = {"drop": drop, "lean": lean, "only": only, "block_bytes": block}
    plan, files = planned(model, source, target, is_bundled=True, **how)
    carried = Carried(plan, files, Budget(1, block), by=by)
    for (rank, name), data in carried.got.items():
        assert bytes(data) == model.rank_bytes(target, rank)[name][1]
    assert all((times == 1).all() for times in carried.times.values())
    assert astuple(carried.counts) == tuple(getattr(plan.totals, name) for name in COUNTED)
    assert tuple(carried.reads) == plan.reads
    alone, _ = planned(model, source, target, **how)
    assert plan.totals.bytes_needed == alone.totals.bytes_needed
    assert plan.totals.num_reads <= alone.totals.num_reads
    assert plan.totals.num_writes <= alone.totals.num_writes


@settings(max_examples=80)
@given(
    dtype=st.sampled_from(["uint8", "float16", "int32", "float64"]),
    ways=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    dim=st.integers(0, 2),
    block=st.sampled_from([64, 1024, MB]),
    tile=st.sampled_from([64, 96, 512, 8 * MB]),
    seed=st.integers(0, 9),
    by=st.sampled_from([engine, file_to_file]),
)
def test_the_plan_knows_the_numbers_of_a_mapped_run(dtype, ways, dim, block, tile, seed, by):
    """Fused, transposed and stacked: what is read in tiles is counted in the same tiles."""
    arrays = mapped_model(dtype=dtype, seed=seed)
    memory = Memory(arrays, {n: ways for n, x in arrays.items() if x.ndim == 2})
    catalog = FUSED.apply(memory.catalog)
    target = Layout(2, {t.name: (halved(t, dim),) for t in catalog.tensors.values()})
    plan = make_plan(catalog, outputs_of(catalog, target), block_bytes=block, tile_bytes=tile)
    carried = Carried(plan, [memory.data], Budget(1, block, tile), by=by)
    assert astuple(carried.counts) == tuple(getattr(plan.totals, name) for name in COUNTED)
    assert tuple(carried.reads) == plan.reads
    assert all((times == 1).all() for times in carried.times.values())


def halved(tensor: Tensor, dim: int) -> Placement:
    """Two ranks with a half each along ``dim``, or with all of it where that does not go."""
    spec = (*[()] * min(dim, len(tensor.shape) - 1), ("mp",))
    half = Placement((("mp", 2),), spec)
    try:
        tensor.check_groups(half)
        for shard in half.shards(tensor.shape):
            tensor.fine(shard.box)
    except LayoutError:
        return Placement((("mp", 2),))
    return half


def distinct_bytes(model: Model, plan: Plan) -> int:
    """Bytes of the source that some file of the plan holds, each counted once, by a mask."""
    found = 0
    for tensor in model.tensors:
        held = np.zeros(in_units(tensor.shape, (), tensor.dtype)[0], bool)
        for rank in range(len(plan.outputs.paths)) if plan.only is None else plan.only:
            content = plan.outputs.contents[plan.outputs.content_of[rank]]
            if any(e.tensor.name == tensor.name for e in content):
                box = plan.outputs.layout.box_of(tensor.name, tensor.shape, rank)
                _, (inside,) = in_units(tensor.shape, (box,), tensor.dtype)
                held[inside.slices] = True
        found += int(held.sum()) * tensor.dtype.unit_bytes
    return found


@FEW
@given(models())
def test_bytes_written_twice_would_be_noticed(model):
    """The twin: the counter counts."""
    plan, files = planned(model, *model.layouts)
    carried = Carried(plan, files, order=lambda moves: moves.extend(moves))
    assert all((times == 2).all() for times in carried.times.values())


@MANY
@given(models(), st.integers(0, 99), st.integers(1, 4), st.sampled_from([64, 256, 4096]), ways)
def test_neither_order_nor_threads_nor_block_size_matter(model, seed, workers, block, by):
    plan, files = planned(model, *model.layouts)
    plain = Carried(plan, files).got
    shuffle = random.Random(seed).shuffle
    assert Carried(plan, files, Budget(workers, block), shuffle, by).got == plain


@MANY
@given(models(), st.booleans())
def test_redundancy_removed_stores_every_shard_once(model, lean):
    plan, files = planned(model, *model.layouts, lean=True)
    target, held = plan.outputs.layout, Carried(plan, files).got
    for tensor in model.tensors:
        for placement in target.placements[tensor.name]:
            for shard in placement.shards(tensor.shape):
                ranks = [placement.first_rank + r for r in shard.holders]
                assert sum((r, tensor.name) in held for r in ranks) == 1


@MANY
@given(models(), st.data())
def test_a_lost_shard_is_missed_when_planning(model, data):
    """The twin of the laws above: bytes that are nowhere are not made up."""
    source, target = model.layouts
    catalog, _ = in_memory(model, source)
    candidates = [t for t in catalog.tensors.values() if t.num_bytes]
    if not candidates:
        return
    tensor = data.draw(st.sampled_from(candidates))
    lost = data.draw(st.sampled_from([p.box for p in tensor.shards]))
    pieces = tuple(p for p in tensor.shards if not p.box.intersect(lost) and p.box != lost)
    broken = {**catalog.tensors, tensor.name: replace(tensor, shards=pieces)}
    with pytest.raises(CoverageError, match=tensor.name):
        make_plan(replace(catalog, tensors=broken), outputs_of(catalog, target))


# --- through files ---------------------------------------------------------------------


def held_by(folder: Path) -> dict[int, dict[str, tuple[tuple[int, ...], bytes]]]:
    """What each rank's file holds."""
    found = {}
    for path in folder.glob("rank_*/*.safetensors"):
        found[int(path.parent.name.removeprefix("rank_"))] = read_by_hand(path)
    return found


def expected(model: Model, layout: Layout) -> dict[int, dict[str, tuple[tuple[int, ...], bytes]]]:
    return {rank: model.rank_bytes(layout, rank) for rank in range(layout.num_ranks)}


def whole(model: Model) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {t.name: (t.shape, model.units(t).tobytes()) for t in model.tensors}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Makes a new folder for each example."""
    base = tmp_path_factory.mktemp("laws")
    return lambda: Path(tempfile.mkdtemp(dir=base))


@FEW
@given(model=models())
def test_merge_undoes_slice(place, model):
    base, (layout, other) = place(), model.layouts
    write_whole(model, base / "whole")
    js.slice(base / "whole", base / "cut", layout, **QUICK)
    assert held_by(base / "cut") == expected(model, layout)
    js.convert(base / "cut", base / "recut", other, **QUICK)
    assert held_by(base / "recut") == expected(model, other)
    js.merge(base / "recut", base / "again", **QUICK)
    assert read_by_hand(base / "again" / "model.safetensors") == whole(model)


@FEW
@given(model=models())
def test_there_and_back_is_identity(place, model):
    base, (layout, other) = place(), model.layouts
    write_whole(model, base / "whole")
    js.slice(base / "whole", base / "cut", layout, **QUICK)
    js.convert(base / "cut", base / "there", other, **QUICK)
    js.convert(base / "there", base / "back", layout, **QUICK)
    assert held_by(base / "back") == held_by(base / "cut") == expected(model, layout)


@FEW
@given(model=models(num_layouts=3))
def test_two_journeys_are_one(place, model):
    base, (first, second, third) = place(), model.layouts
    write_whole(model, base / "whole")
    js.slice(base / "whole", base / "a", first, **QUICK)
    js.convert(base / "a", base / "b", second, **QUICK)
    js.convert(base / "b", base / "c", third, **QUICK)
    js.convert(base / "a", base / "c at once", third, **QUICK)
    assert held_by(base / "c") == held_by(base / "c at once") == expected(model, third)


@FEW
@given(model=models(), seed=st.integers(0, 99), lean=st.booleans())
def test_replicas_are_interchangeable(place, model, seed, lean):
    """Whichever ranks' files are left, as long as every shard is: the same comes out."""
    base, (layout, _) = place(), model.layouts
    write_whole(model, base / "whole")
    js.slice(base / "whole", base / "cut", layout, **QUICK, remove_redundancy=lean)
    held = held_by(base / "cut")
    ranks = list(held)
    random.Random(seed).shuffle(ranks)
    for rank in ranks:
        others = [r for r in held if r != rank]
        if others and all_there(model, layout, {r: held[r] for r in others}):
            del held[rank]
            (base / "cut" / f"rank_{rank}" / f"checkpoint_rank_{rank}-1_1.safetensors").unlink()
    js.merge(base / "cut", base / "again", **QUICK)
    assert read_by_hand(base / "again" / "model.safetensors") == whole(model)


def all_there(model: Model, layout: Layout, held: dict[int, dict]) -> bool:
    for tensor in model.tensors:
        mask = np.zeros(tensor.shape, bool)
        holders = [r for r, content in held.items() if tensor.name in content]
        for rank in holders:
            mask[layout.box_of(tensor.name, tensor.shape, rank).slices] = True
        if not holders or not mask.all():
            return False
    return True


@FEW
@given(
    model=models(),
    ranks=st.none() | subsets,
    lean=st.booleans(),
    host_bytes=st.sampled_from([1 << 19, 1 << 22, None]),
)
def test_a_dry_run_says_what_a_run_does(place, model, ranks, lean, host_bytes):
    base, (layout, other) = place(), model.layouts
    write_whole(model, base / "whole")
    js.slice(base / "whole", base / "cut", layout, **QUICK, remove_redundancy=lean)
    only = None if ranks is None else [r % other.num_ranks for r in ranks]
    how = {"rank": only, "remove_redundancy": lean}
    options = {"fsync": False, "workers": 3, "host_bytes": host_bytes}
    totals = js.plan(base / "cut", other, **options, **how).totals
    report = js.convert(base / "cut", base / "recut", other, **options, **how)
    assert tuple(getattr(totals, name) for name in COUNTED) == astuple(report.counts)
    assert report.num_files == totals.num_files == len(held_by(base / "recut"))
