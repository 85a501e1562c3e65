"""Safetensors files: the package is the oracle, in both directions."""

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from safetensors_oracle import (
    ENTRY,
    WatchedFolder,
    as_text,
    disagreement,
    filled,
    packed,
    read_all,
    read_by_package,
)

from jaxshard.core.dtypes import BY_NAME, num_bytes
from jaxshard.errors import FormatError, LayoutError, NotFoundError
from jaxshard.formats import safetensors as ours
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.safetensors import MAX_HEADER_BYTES, layout_file, read_header

F32, U8, F4 = BY_NAME["F32"], BY_NAME["U8"], BY_NAME["F4"]


# What is written -------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda n: n != "__metadata__"
)


@st.composite
def entry_lists(draw: st.DrawFn) -> list[tuple[str, Any, tuple[int, ...]]]:
    entries = []
    for name in draw(st.lists(names, unique=True, max_size=12)):
        kind = BY_NAME[draw(st.sampled_from(sorted(BY_NAME)))]
        shape = draw(st.lists(st.integers(0, 9), max_size=4))
        if prod(shape) * kind.bits % 8:
            shape.append(kind.unit_elements)
        entries.append((name, kind, tuple(shape)))
    return entries


@given(entry_lists(), st.dictionaries(names, names, max_size=3))
def test_what_is_laid_out_the_package_reads(entries, metadata):
    layout = layout_file(entries, metadata)
    content = filled(layout)
    theirs = read_by_package(content)
    assert theirs == {
        name: (kind.name, shape, content[at : at + num_bytes(shape, kind)])
        for name, kind, shape in entries
        for at in [layout.offsets[name]]
    }
    assert read_all(content) == theirs
    header = read_header(MemoryFolder({"f": content}), "f")
    assert header.metadata == metadata
    assert [e.name for e in header.entries] == list(layout.offsets)


@given(entry_lists())
def test_data_is_aligned_and_the_header_lists_it_in_its_order_without_holes(entries):
    layout = layout_file(entries, {"format": "pt"})
    assert len(layout.segments[0][1]) % 64 == 0
    sizes = {name: num_bytes(shape, kind) for name, kind, shape in entries}
    whole_lines = [name for name, size in sizes.items() if size % 64 == 0]
    assert list(layout.offsets)[: len(whole_lines)] == whole_lines
    assert all(layout.offsets[name] % 64 == 0 for name in whole_lines)
    for name, kind, _ in entries:
        if kind.bits >= 8:
            assert layout.offsets[name] % kind.unit_bytes == 0
    at = 0  # as a reader does that trusts the header's order
    described = json.loads(layout.segments[0][1][8:])
    del described["__metadata__"]
    for name, entry in described.items():
        assert entry["data_offsets"] == [at, at + sizes[name]]
        assert layout.offsets[name] == len(layout.segments[0][1]) + at
        at += sizes[name]
    assert len(layout.segments[0][1]) + at == layout.num_bytes


def test_the_same_tensors_give_the_same_bytes_whatever_the_order_of_metadata():
    entries = [("a", F32, (3,)), ("b", U8, (64,))]
    one = layout_file(entries, {"x": "1", "y": "2"})
    assert one == layout_file(iter(entries), {"y": "2", "x": "1"})
    assert list(one.offsets) == ["b", "a"]


def test_a_file_of_every_dtype_opens_with_safe_open(tmp_path):
    entries = [(n, k, (4, k.unit_elements)) for n, k in BY_NAME.items()]
    entries += [("scalar", F32, ()), ("empty", F32, (0, 5))]
    path = tmp_path / "f.safetensors"
    path.write_bytes(filled(layout_file(entries, {"format": "np"})))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "np"}
        assert set(file.keys()) == {name for name, _, _ in entries}
        for name, kind, shape in entries:
            assert file.get_slice(name).get_dtype() == kind.name
            assert tuple(file.get_slice(name).get_shape()) == shape


def test_a_file_without_tensors_or_metadata_is_a_file():
    layout = layout_file([], {})
    assert (len(layout.segments[0][1]), layout.num_bytes, layout.offsets) == (64, 64, {})
    assert read_by_package(layout.segments[0][1]) == {} == read_all(layout.segments[0][1])


@pytest.mark.parametrize(
    ("entries", "metadata", "says"),
    [
        ([("a", U8, (1,)), ("a", U8, (2,))], {}, "two tensors called a"),
        ([("__metadata__", U8, (1,))], {}, "a tensor called __metadata__"),
        ([("a", F4, (3,))], {}, "a: 3 elements of F4 do not fill whole bytes"),
        ([("\ud800", U8, (1,))], {}, "not Unicode"),
        ([("a", U8, (1,))], {"epoch": 3}, "'epoch' = 3 is not text"),
        ([("a", U8, (1,))], {3: "epoch"}, "3 = 'epoch' is not text"),
    ],
)
def test_what_no_file_can_hold_is_refused(entries, metadata, says):
    with pytest.raises(LayoutError, match=says):
        layout_file(entries, metadata)


def test_a_header_over_the_formats_limit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(ours, "MAX_HEADER_BYTES", 56)  # a line of 64 with the length before it
    assert len(layout_file([("a", U8, (1,))], {}).segments[0][1]) == 64
    with pytest.raises(LayoutError, match=r"header of 120 bytes .expected at most 56"):
        layout_file([("a", U8, (1,)), ("b", U8, (1,))], {})


# What is read ----------------------------------------------------------------


@given(
    st.dictionaries(
        names,
        st.tuples(
            st.sampled_from(["bool", "u1", "i2", "f2", "u4", "f4", "c8", "f8", "i8"]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=8,
    ),
    st.none() | st.dictionaries(names, names, min_size=1, max_size=3),
)
def test_what_the_package_writes_is_read(described, metadata):
    rng = np.random.default_rng(0)
    arrays = {
        name: np.frombuffer(rng.bytes(prod(shape) * np.dtype(kind).itemsize), kind).reshape(shape)
        if kind != "bool"
        else np.ones(shape, bool)
        for name, (kind, shape) in described.items()
    }
    content = safetensors.numpy.save(arrays, metadata)
    assert read_all(content) == read_by_package(content)
    assert read_header(MemoryFolder({"f": content}), "f").metadata == (metadata or {})


@pytest.mark.parametrize(
    ("header", "data", "found"),
    [
        (' \n{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\n ', b"a", ["a"]),
        ('{"a":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"}}', b"a", ["a"]),
        ({"b": {**ENTRY, "data_offsets": [2, 4]}, "a": ENTRY}, b"1234", ["a", "b"]),
        ({"a": {**ENTRY, "shape": [2**64 - 1, 0], "data_offsets": [0, 0]}}, b"", ["a"]),
        ({"__metadata__": {"format": "pt"}}, b"", []),
        ("{}", b"", []),
    ],
)
def test_odd_but_valid_headers_are_read_in_the_order_of_their_bytes(header, data, found):
    content = packed(header, data)
    read = read_header(WatchedFolder(content), "f")
    assert [e.name for e in read.entries] == found == sorted(read_by_package(content))


def test_only_the_header_is_read():
    folder = WatchedFolder(filled(layout_file([("a", U8, (1 << 20,))], {})))
    header = read_header(folder, "f")
    assert folder.read_bytes == [8, header.data_start - 8]


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(NotFoundError, match="memory has no file g"):
        read_header(MemoryFolder({}), "g")


E, DEEP = as_text({"a": ENTRY}), 100_000
BAD = {
    "7 bytes": (b"1234567", "f has 7 bytes"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs pull"),
    "100 MB header": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        "header of 100000001 bytes .expected at most 100000000",
    ),
    "header past the end": (packed(E)[:20], f"header of {len(E)} bytes .expected at most 12"),
    "empty header": (packed(b""), "not JSON"),
    "zeros": (packed(bytes(64)), "not JSON"),
    "not UTF-8": (packed(b'{"\xff":1}'), "byte 2 of 7"),
    "UTF-16": (packed("{}".encode("utf-16")), "not UTF-8"),
    "BOM": (packed(b"\xef\xbb\xbf{}"), "not JSON"),
    "a list": (packed("[]"), "is a JSON list .expected an object"),
    "lone surrogate in metadata": (
        packed(r'{"__metadata__":{"a":"\ud800"}}'),
        "lone surrogate",
    ),
    "cut JSON": (packed(E[:-1], b"12"), "not JSON"),
    "NaN": (packed('{"a":NaN}'), "NaN is not a JSON number"),
    "lone surrogate": (packed(r'{"\ud800":' + E[5:], b"12"), "lone surrogate"),
    "duplicate tensor": (packed(f"{E[:-1]},{E[1:]}", b"12"), "duplicate key a in"),
    "duplicate field": (
        packed('{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "duplicate key dtype in",
    ),
    "deep lists": (packed('{"a":' + "[" * DEEP + "]" * DEEP + "}"), "too deep"),
    "deep objects": (packed('{"a":' * DEEP + "1" + "}" * DEEP), "too deep"),
    "huge integer": (packed('{"a":%s}' % ("9" * 50_000)), "too many digits"),
    "crowded": (packed('{"a":[' + "[]," * (2 << 20) + "0]}"), "denser than any list"),
    "metadata list": (packed({"__metadata__": ["format"]}), "expected an object"),
    "metadata number": (packed({"__metadata__": {"epoch": 3}}), "epoch = 3, expected a string"),
    "entry a list": (packed({"a": ["U8", [0], [0, 0]]}), "tensor a must have exactly the keys"),
    "key missing": (packed({"a": {"dtype": "U8", "shape": [0]}}), "must have exactly the keys"),
    "key too many": (packed({"a": {**ENTRY, "strides": [1]}}, b"12"), "must have exactly the keys"),
    "dtype": (packed({"a": {**ENTRY, "dtype": "I4"}}, b"12"), "unknown dtype 'I4'"),
    "dtype a list": (packed({"a": {**ENTRY, "dtype": []}}, b"12"), "dtype \\[\\]"),
    "shape a number": (packed({"a": {**ENTRY, "shape": 2}}, b"12"), "must have a shape, a list"),
    "dim negative": (packed({"a": {**ENTRY, "shape": [-2, -1]}}, b"12"), "shape \\[-2, -1\\]"),
    "dim a bool": (packed({"a": {**ENTRY, "shape": [2, True]}}, b"12"), "shape \\[2, True\\]"),
    "dim a float": (packed({"a": {**ENTRY, "shape": [2.0]}}, b"12"), "shape \\[2.0\\]"),
    "dim too large": (packed({"a": {**ENTRY, "shape": [2**64, 0]}}, b"12"), "2\\*\\*64 - 1"),
    "size too large": (packed({"a": {**ENTRY, "shape": [2**40] * 3}}, b"12"), "2\\*\\*64 elements"),
    "too many dims": (packed({"a": {**ENTRY, "shape": [1] * DEEP}}, b"12"), "at most 64 dims"),
    "offset negative": (packed({"a": {**ENTRY, "data_offsets": [-2, 0]}}), "bytes -2 to 0"),
    "offsets swapped": (packed({"a": {**ENTRY, "data_offsets": [2, 0]}}, b"12"), "bytes 2 to 0"),
    "three offsets": (packed({"a": {**ENTRY, "data_offsets": [0, 1, 2]}}, b"12"), "two integers"),
    "offset a bool": (packed({"a": {**ENTRY, "data_offsets": [False, 2]}}, b"12"), "two integers"),
    "size mismatch": (
        packed({"a": {**ENTRY, "dtype": "F64"}}, b"12"),
        "bytes 0 to 2 of the data, but F64 of shape \\[2\\] takes 16",
    ),
    "odd F4": (packed({"a": {**ENTRY, "dtype": "F4", "shape": [3]}}, b"12"), "takes 1.5"),
    "overlap": (
        packed({"a": ENTRY, "b": {**ENTRY, "data_offsets": [1, 3]}}, b"123"),
        "tensor b starts at byte [0-9]+ of the file, inside a",
    ),
    "hole": (
        packed({"a": ENTRY, "b": {**ENTRY, "data_offsets": [3, 5]}}, b"12345"),
        "tensor b starts at byte [0-9]+ of the file, 1 after a ends",
    ),
    "hole at the start": (
        packed({"a": {**ENTRY, "data_offsets": [1, 3]}}, b"123"),
        "1 after the header ends",
    ),
    "cut short": (packed(E, b"1"), "has 69 bytes .expected 70"),
    "out of range": (
        packed({"a": {**ENTRY, "shape": [2**50], "data_offsets": [0, 2**50]}}, b"12"),
        "has 100 bytes .expected 1125899906842722",
    ),
    "trailing bytes": (packed(E, b"1234"), "has 72 bytes .expected 70"),
}


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=list(BAD))
def test_a_file_that_is_not_what_it_claims_is_refused_in_one_line(content, says):
    with pytest.raises(FormatError, match=says) as caught:
        read_header(WatchedFolder(content), "f")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "f" in str(caught.value)
    assert str(caught.value).endswith(("again.", "git lfs pull"))


def test_hostile_names_stay_on_one_line_of_bounded_length():
    name = "\x1b[2J\n" + "x" * 10_000
    with pytest.raises(FormatError) as caught:
        read_header(MemoryFolder({"f": packed({name: 1})}), "f")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


# Golden files ----------------------------------------------------------------


def golden_files() -> list[Path]:
    """Those kept here, and the full set where there is one."""
    here = Path(__file__).parents[1] / "golden" / "safetensors"
    folders = [here, *filter(None, [os.environ.get("JAXSHARD_GOLDEN")])]
    return sorted(path for folder in folders for path in Path(folder).rglob("*.safetensors"))


def test_files_that_mindspore_wrote_are_read_as_the_package_reads_them():
    paths = golden_files()
    assert len(paths) >= 2
    for path in paths:
        content = path.read_bytes()
        assert disagreement(content) is None, path
        if "truncated" in path.name:
            with pytest.raises(FormatError, match="is truncated"):
                read_all(content)
        else:
            assert read_all(content), path
