"""Bundles: small neighbours take a few steps together, and end bit for bit where they should."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, fields
from pathlib import Path

import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_arrays import array, same, write

import jaxshard as js
from jaxshard.core.box import Box
from jaxshard.core.catalog import StoredShard, Tensor
from jaxshard.core.dtypes import dtype
from jaxshard.planning.bundles import Bundle, bundled
from jaxshard.storage.local import Handles
from jaxshard.storage.resources import Counts

QUICK = {"fsync": False, "workers": 1}
COUNTED = tuple(field.name for field in fields(Counts))
DTYPES = ("float32", "bfloat16", "uint8", "int64", "float16")


@pytest.fixture
def thousand(tmp_path) -> Path:
    """A thousand neighbours of 12 bytes in one file."""
    path = tmp_path / "model.safetensors"
    write(path, {f"block.{i}.w": array("float32", (3,), i) for i in range(1000)})
    return path


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often files are read and written at a place."""
    found: Counter[str] = Counter()

    def counting(name):
        method = getattr(Handles, name)

        def counted(self, *args):
            found[name] += 1
            return method(self, *args)

        return counted

    for name in ("read_views", "read_rows", "write_views"):
        monkeypatch.setattr(Handles, name, counting(name))
    return found


@pytest.mark.parametrize(("to", "writes"), [("full", 1), ("dp2", 2), ("dp2mp2", 4)], ids=str)
def test_a_thousand_tiny_neighbours_are_one_read_and_a_write_for_each_file(
    thousand, tmp_path, calls, to, writes
):
    how = {} if to == "full" else {"rules": js.Rules("all", (("*", "-"),))}
    totals = js.plan(thousand, to, **how).totals
    assert (totals.num_reads, totals.num_writes) == (1, writes)
    calls.clear()
    counts = js.convert(thousand, tmp_path / "out", to, **QUICK, **how).counts
    assert (counts.num_reads, counts.num_writes) == (1, writes)
    assert counts.bytes_written == 12_000 * writes
    assert calls["read_views"] <= 4  # a header is two reads
    assert calls["write_views"] == 2 * writes  # the tensors, and a header
    some = sorted((tmp_path / "out").rglob("*.safetensors"))[-1]
    assert same(safetensors.numpy.load_file(some), safetensors.numpy.load_file(thousand))


def test_tensors_between_which_a_large_one_lies_are_not_read_with_it(tmp_path):
    tensors = {
        f"{i}.{k}": array("uint8", (n,), i) for i in range(4) for k, n in (("a", 20), ("b", 70_000))
    }
    write(tmp_path / "model.safetensors", tensors)
    totals = js.plan(tmp_path / "model.safetensors").totals
    assert totals.bytes_read == totals.bytes_needed
    assert totals.num_reads == 8


sizes = st.sampled_from([0, 1, 3, 16, 64, 300, 5000, 20_000])
tensor = st.tuples(st.sampled_from(DTYPES), sizes, st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(tensor, min_size=1, max_size=40),
    st.integers(1, 3),
    st.sampled_from(["huggingface", "ckpt", "unified"]),
    st.sampled_from([512 << 10, 4 << 20, 256 << 20]),
)
def test_small_tensors_of_any_kind_and_order_are_converted_bit_for_bit(
    tmp_path_factory, tensors, num_files, form, host_bytes
):
    """Interleaved dtypes have another order in the result; numbers are those of the plan."""
    place = tmp_path_factory.mktemp("mixed")
    wanted = {}
    for i, (kind, size, is_flat) in enumerate(tensors):
        if size or form != "ckpt":  # MindSpore has no tensor of shape (0,)
            wanted[f"t{i}"] = array(kind, (size,) if is_flat or size % 2 else (2, size // 2), i)
    wanted["last"] = array("float32", (), 99)
    (place / "in").mkdir()
    for k in range(num_files):
        some = {n: a for i, (n, a) in enumerate(wanted.items()) if i % num_files == k}
        write(place / "in" / f"part{k}.safetensors", some)
    options = {"fsync": False, "workers": 2, "host_bytes": host_bytes}
    how = {"format": form, **options}
    totals = js.plan(place / "in", **how).totals
    report = js.convert(place / "in", place / "out", **how)
    numbers = astuple(report.counts)
    assert numbers == tuple(getattr(totals, f) for f in COUNTED)
    back = js.load_rank(place / "out", "full")
    assert same(back, wanted)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 300), st.integers(0, 2)),
        max_size=30,
    ),
    st.sampled_from([16, 64, 1 << 20]),
)
def test_bundles_hold_every_small_tensor_once_and_read_no_more_than_small_gaps(items, most):
    tensors, ranks, at = [], {}, Counter[int]()
    for i, (file, size, gap, goes_to) in enumerate(items):
        at[file] += gap
        box = Box.whole((size,))
        piece = StoredShard(file, at[file], box)
        tensors.append(Tensor(f"t{i}", dtype("U8"), (size,), (piece,)))
        ranks[f"t{i}"] = (goes_to,) if goes_to else None
        at[file] += size
    made = list(bundled(tensors, lambda t: ranks[t.name], most))
    names = [n for x in made for n in (x.names if isinstance(x, Bundle) else (x.name,))]
    assert sorted(names) == sorted(t.name for t in tensors)
    by_name = {t.name: t for t in tensors}
    for bundle in (x for x in made if isinstance(x, Bundle)):
        assert bundle.num_bytes == sum(span.num_bytes for span in bundle.reads) <= most
        assert len(bundle.names) > 1
        assert bundle.num_bytes - bundle.data_bytes <= 256 * (len(bundle.names) - 1)
        filled = {}  # what each byte of the buffer is: a byte of a file
        for piece, offset, start, num_bytes in bundle.reads:
            filled |= {start + k: (piece.file, offset + k) for k in range(num_bytes)}
        for name, start, length in zip(bundle.names, bundle.starts, bundle.lengths, strict=True):
            stored = by_name[name].shards[0]
            assert ranks[name] == bundle.ranks
            assert [filled[start + k] for k in range(length)] == [
                (stored.file, stored.offset + k) for k in range(length)
            ]
