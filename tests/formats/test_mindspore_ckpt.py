"""MindSpore's weight files: read by offset, laid out byte for byte as MindSpore writes them."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
from counting_folder import CountingFolder, SparseFolder
from golden_files import HERE, golden, manifest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.core.box import Box
from jaxshard.core.dtypes import BY_NAME, BY_NUMPY, dtype, num_bytes
from jaxshard.errors import FormatError, LayoutError, NotFoundError
from jaxshard.formats import mindspore_ckpt as ckpt
from jaxshard.formats import protobuf
from jaxshard.formats.folder import MemoryFolder, kind_of
from jaxshard.formats.protobuf import bytes_field as field
from jaxshard.formats.safetensors import FileLayout, StoredTensor

READABLE = sorted(
    str(p.relative_to(HERE))
    for p in HERE.rglob("*.ckpt")
    if "strategy" not in str(p) and not p.name.startswith(("enc_", "truncated"))
)


def header_of(data: bytes) -> ckpt.CkptHeader:
    return ckpt.read_header(MemoryFolder({"f.ckpt": data}), "f.ckpt")


def content(data: bytes, entry: StoredTensor) -> bytes:
    """The tensor put together from its pieces, each box at its place."""
    item = entry.dtype.bits // 8
    whole = np.zeros((*entry.shape, item), np.uint8)
    for offset, box in entry.pieces:
        size = num_bytes(box.shape, entry.dtype)
        part = np.frombuffer(data[offset : offset + size], np.uint8).reshape(*box.shape, item)
        whole[box.slices] = part
    return whole.tobytes()


def assemble(layout: FileLayout, tensors: dict[str, bytes]) -> bytes:
    """The file, every tensor written in two halves at the offsets the layout gives."""
    out = bytearray(layout.num_bytes)
    for at, data in layout.segments:
        out[at : at + len(data)] = data
    for name, data in tensors.items():
        half = len(data) // 3
        for first, last in ((0, half), (half, len(data))):
            done = first
            for at, length in layout.spans(name, first, last - first):
                out[at : at + length] = data[done : done + length]
                done += length
            assert done == last
    if layout.crc_offset is not None:
        out[layout.crc_offset :] = ckpt.crc_trailer(zlib.crc32(out[: layout.crc_offset]))
    return bytes(out)


def value(
    tag: bytes = b"w",
    dims: tuple[int, ...] = (2,),
    kind: bytes = b"Int8",
    data: bytes = b"ab",
) -> bytes:
    """One value as protobuf writes it, whatever it says."""
    tensor = protobuf.number_fields(1, dims) + field(2, kind) + field(3, data)
    return field(1, field(1, tag) + field(2, tensor))


# ------------------------------------------------------------------ MindSpore's own files


@pytest.mark.parametrize(
    "name", ["all_dtypes.ckpt", "chunked.ckpt", "chunked_async.ckpt", "crc.ckpt", "with_str.ckpt"]
)
def test_values_shapes_and_dtypes_are_those_mindspore_saved(name: str) -> None:
    truth, loaded = manifest("ckpt_formats")["tensors"], manifest("ckpt_formats")["loaded"]
    data = golden("ckpt_formats", name).read_bytes()
    header = header_of(data)
    for entry in header.entries:
        if entry.name in truth:
            said = truth[entry.name]
            assert entry.dtype == BY_NUMPY[said["dtype"]]
            assert entry.shape == tuple(said["shape"])
            assert hashlib.sha256(content(data, entry)).hexdigest() == said["sha256"]
    if name in loaded:
        shown = {
            e.name: ["Int4" if e.name in header.int4 else ckpt.TYPE_NAMES[e.dtype], list(e.shape)]
            for e in header.entries
        }
        shown |= {n: ["str", text] for n, text in header.strings.items()}
        assert shown == loaded[name]


def test_safetensors_of_the_same_weights_hold_the_same_bytes() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    pytest.importorskip("ml_dtypes")
    pairs = [("full/weights_only.ckpt", "full/full.safetensors")]
    pairs += [
        (
            f"src_ckpt/rank_{r}/net_rank_{r}-1_10.ckpt",
            f"src_safetensors/rank_{r}/net_rank_{r}-1_10.safetensors",
        )
        for r in range(8)
    ]
    for ours, theirs in pairs:
        data = golden("dp4mp2_opt2", ours).read_bytes()
        arrays = safetensors.load_file(golden("dp4mp2_opt2", theirs))
        entries = header_of(data).entries
        assert len(entries) > 40
        for entry in entries:
            array = arrays[entry.name]
            assert (entry.shape, entry.dtype) == (array.shape, BY_NUMPY[array.dtype.name])
            assert content(data, entry) == array.tobytes()


@pytest.mark.parametrize("path", READABLE)
def test_what_mindspore_wrote_is_laid_out_byte_for_byte(path: str) -> None:
    data = (HERE / path).read_bytes()
    header = header_of(data)
    layout = ckpt.layout_file(
        [e[:3] for e in header.entries],
        strings=header.strings,
        crc=header.has_crc,
        chunk_bytes=1024 if "chunked" in path else ckpt.CHUNK_BYTES,
    )
    ours = assemble(layout, {e.name: content(data, e) for e in header.entries})
    if Path(path).name in ("with_str.ckpt", "chunked_async.ckpt", "crc_damaged.ckpt"):
        assert ours != data  # strings go last here; rows are not where we cut; the crc is right
        assert content_by_name(ours) == content_by_name(data)
    else:
        assert ours == data


def content_by_name(data: bytes) -> dict[str, object]:
    header = header_of(data)
    found: dict[str, object] = {
        e.name: (e.dtype, e.shape, content(data, e)) for e in header.entries
    }
    return found | dict(header.strings)


def test_text_is_kept_apart_from_tensors() -> None:
    header = header_of(golden("ckpt_formats", "with_str.ckpt").read_bytes())
    assert header.strings == {"note": "hello world"}
    assert [e.name for e in header.entries] == ["f32", "f16", "epoch_num", "lr", "flag"]


def test_both_kinds_of_chunks_are_pieces_of_one_tensor() -> None:
    by_bytes = header_of(golden("ckpt_formats", "chunked.ckpt").read_bytes())
    by_rows = header_of(golden("ckpt_formats", "chunked_async.ckpt").read_bytes())
    (a,) = (e for e in by_bytes.entries if e.name == "big_f32")
    (b,) = (e for e in by_rows.entries if e.name == "big_f32")
    assert a.shape == b.shape == (37, 19)
    assert [str(box) for _, box in b.pieces] == ["[0:13, 0:19]", "[13:25, 0:19]", "[25:37, 0:19]"]
    # 1024 bytes are 256 elements: 13 rows and 9 elements
    assert [str(box) for _, box in a.pieces][:3] == [
        "[0:13, 0:19]",
        "[13:14, 0:9]",
        "[13:14, 9:19]",
    ]


def test_a_checksum_is_found_and_compared() -> None:
    files = {
        n: golden("ckpt_formats", f"{n}.ckpt").read_bytes()
        for n in ("crc", "crc_damaged", "all_dtypes")
    }
    folder = MemoryFolder(files)
    assert ckpt.read_header(folder, "crc").has_crc
    assert ckpt.check_crc(folder, "crc")
    assert not ckpt.read_header(folder, "all_dtypes").has_crc
    assert not ckpt.check_crc(folder, "all_dtypes")
    with pytest.raises(FormatError, match=r"crc_damaged: the bytes have crc32 .*expected"):
        ckpt.check_crc(folder, "crc_damaged")


def test_the_checksum_is_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt, "_BLOCK_BYTES", 1000)
    folder = CountingFolder({"f": golden("ckpt_formats", "crc.ckpt").read_bytes()})
    assert ckpt.check_crc(folder, "f")
    assert max(length for _, _, length in folder.reads) == 1000


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("enc_AES-GCM.ckpt", r"is encrypted \(AES-GCM\)"),
        ("enc_AES-CBC.ckpt", r"is encrypted \(AES-CBC\)"),
        ("enc_SM4-CBC.ckpt", r"is encrypted \(SM4-CBC\)"),
        ("truncated.ckpt", "left in its message"),
        ("all_dtypes.safetensors", "is a safetensors file, not a MindSpore weight checkpoint"),
    ],
)
def test_encrypted_truncated_and_other_files_are_refused_plainly(name: str, why: str) -> None:
    with pytest.raises(FormatError, match=f"^f.ckpt.*{why}"):
        header_of(golden("ckpt_formats", name).read_bytes())


def test_a_strategy_file_given_as_weights_is_said_to_be_one() -> None:
    with pytest.raises(FormatError, match="is a MindSpore strategy file, not a MindSpore weight"):
        header_of(golden("dp1mp4", "merged_strategy.ckpt").read_bytes())
    with pytest.raises(FormatError, match="is a PyTorch checkpoint"):
        header_of(b"PK\x03\x04")
    with pytest.raises(FormatError, match="is empty"):
        header_of(b"")
    with pytest.raises(NotFoundError):
        ckpt.read_header(MemoryFolder({}), "f.ckpt")


@pytest.mark.parametrize("path", READABLE)
def test_weights_are_recognised_by_their_first_bytes(path: str) -> None:
    assert kind_of(MemoryFolder({"x": (HERE / path).read_bytes()}), "x") == "weights.ckpt"


@pytest.mark.parametrize("name", ["all_dtypes.ckpt", "chunked.ckpt", "crc.ckpt"])
def test_a_file_cut_anywhere_is_refused_unless_it_ends_between_values(name: str) -> None:
    data = golden("ckpt_formats", name).read_bytes()
    ends, at = {0}, 0
    reader = protobuf.Reader(MemoryFolder({"f": data}), "f")
    while at < len(data) and data[at] == 0x0A:
        at = reader.field(at, len(data))[3]
        ends.add(at)
    for cut in range(1, len(data)):
        try:
            header_of(data[:cut])
            assert cut in ends
        except FormatError:
            # in "chunked", a tensor also misses parts where the file ends after one of them
            assert cut not in ends or name == "chunked.ckpt"


# ------------------------------------------------------------------ what is not read


def test_a_file_of_ten_gigabytes_opens_with_one_small_read_a_tensor() -> None:
    entries = [(f"model.layers.{i}.weight", dtype("BF16"), (2560, 2048)) for i in range(1000)]
    layout = ckpt.layout_file(entries)
    folder = SparseFolder("f.ckpt", layout.num_bytes, layout.segments)
    assert layout.num_bytes > 10 * 10**9
    header = ckpt.read_header(folder, "f.ckpt")
    assert [e[:3] for e in header.entries] == entries
    assert folder.num_reads < 1010
    assert folder.num_bytes < 5_000_000


def test_large_tensors_are_cut_at_512_mib_and_found_again() -> None:
    shape = (300_000, 1021)  # rows that do not divide a chunk
    layout = ckpt.layout_file([("w", dtype("F32"), shape), ("b", dtype("F32"), (4,))])
    folder = SparseFolder("f.ckpt", layout.num_bytes, layout.segments)
    w, b = ckpt.read_header(folder, "f.ckpt").entries
    assert (w.shape, b.shape) == (shape, (4,))
    assert len(layout.chunks["w"]) == 3
    assert sum(box.size for _, box in w.pieces) == prod(shape)
    for offset, box in w.pieces:  # every piece is where the layout said it would be
        first = box.start[0] * shape[1] + box.start[1]
        size = box.size * 4
        assert layout.spans("w", first * 4, size) == ((offset, size),)
    assert folder.num_bytes < 50_000


def test_spans_cross_chunks() -> None:
    layout = ckpt.layout_file([("w", dtype("U8"), (10,))], chunk_bytes=4)
    a, b, c = layout.chunks["w"]
    assert layout.spans("w", 0, 10) == ((a, 4), (b, 4), (c, 2))
    assert layout.spans("w", 3, 2) == ((a + 3, 1), (b, 1))
    assert layout.spans("w", 4, 0) == ()


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_a_run_of_elements_is_a_few_contiguous_boxes(shape: list[int], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    seen = np.full(size, -1).reshape(shape)
    order = np.arange(size).reshape(shape)
    boxes = ckpt.boxes_of_run(start, stop, tuple(shape))
    for first, box in boxes:
        part = order[box.slices].ravel()
        assert (part == np.arange(first, first + box.size)).all()  # contiguous, and where it says
        assert (seen[box.slices] == -1).all()
        seen[box.slices] = 1
    assert (
        seen.ravel() == np.where((np.arange(size) >= start) & (np.arange(size) < stop), 1, -1)
    ).all()
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


# ------------------------------------------------------------------ what is written


ENTRIES = st.lists(
    st.tuples(
        st.text(st.characters(codec="utf-8"), max_size=12),
        st.sampled_from(list(ckpt.TENSOR_TYPES.values())),
        st.lists(st.integers(0, 4), max_size=3).map(tuple).filter(lambda s: s != (0,)),
    ),
    unique_by=lambda e: e[0],
    max_size=5,
)


@given(ENTRIES, st.dictionaries(st.text(max_size=3), st.text(max_size=5)), st.booleans(), st.data())
def test_what_is_laid_out_is_read_back(
    entries: list, texts: dict[str, str], crc: bool, data: st.DataObject
) -> None:
    names = {e[0] for e in entries}
    texts = {f"{n}-text": t.rstrip("\0") for n, t in texts.items() if f"{n}-text" not in names}
    if not entries and not texts:
        return
    rng = random.Random(data.draw(st.integers(0, 99)))
    chunk = data.draw(st.sampled_from([8, 16, 24, ckpt.CHUNK_BYTES]))
    layout = ckpt.layout_file(entries, strings=texts, crc=crc, chunk_bytes=chunk)
    tensors = {n: rng.randbytes(num_bytes(s, d)) for n, d, s in entries}
    file = assemble(layout, tensors)
    header = header_of(file)
    assert [e[:3] for e in header.entries] == entries
    assert {e.name: content(file, e) for e in header.entries} == tensors
    assert (header.strings, header.has_crc) == (texts, crc)
    assert ckpt.check_crc(MemoryFolder({"f": file}), "f") == crc


def test_bytes_are_what_mindspore_reads() -> None:
    layout = ckpt.layout_file(
        [("w", dtype("F32"), (1, 2)), ("s", dtype("I64"), ())],
        strings={"n": "", "t": "é"},
        crc=True,
    )
    data = assemble(layout, {"w": struct.pack("<2f", 1, 2), "s": struct.pack("<q", 3)})
    wanted = b"\x0a\x1c\x0a\x01w\x12\x17\x08\x01\x08\x02\x12\x07Float32\x1a\x08"  # dims unpacked
    wanted += struct.pack("<2f", 1, 2)
    wanted += b"\x0a\x16\x0a\x01s\x12\x11\x12\x05Int64\x1a\x08" + struct.pack("<q", 3)  # no dims
    wanted += b"\x0a\x12\x0a\x01n\x12\x0d\x08\x00\x12\x03str\x1a\x04\0\0\0\0"  # '' as NumPy has it
    wanted += b"\x0a\x12\x0a\x01t\x12\x0d\x08\x00\x12\x03str\x1a\x04" + "é".encode("utf-32-le")
    wanted += b"crc_num" + zlib.crc32(wanted).to_bytes(10, "big")
    assert data == wanted


@pytest.mark.parametrize(
    ("entries", "more", "why"),
    [
        ([("w", "F8_E4M3", (2,))], {}, "w: MindSpore's .ckpt has no dtype F8_E4M3"),
        ([("w", "C64", (2,))], {}, "has no dtype C64"),
        ([("w", "F32", (0,))], {}, r"w: shape \(0,\) stands for a scalar"),
        ([("w", "F32", (2,)), ("w", "F32", (2,))], {}, "duplicate value name w"),
        ([("w", "F32", (2,))], {"strings": {"w": "x"}}, "duplicate value name w"),
        ([("w", "F32", (1,) * 33)], {}, "33 dims"),
        ([("\ud800", "F32", ())], {}, "not Unicode text"),
        ([("w" * 5000, "F32", ())], {}, "needs 5000 bytes .expected at most 4096"),
        ([], {"strings": {"t": "x\0"}}, "ends with a NUL"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(entries: list, more: dict, why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        ckpt.layout_file([(n, BY_NAME[d], s) for n, d, s in entries], **more)


# ------------------------------------------------------------------ oddities and strangers


def test_a_scalar_may_have_the_dims_zero() -> None:
    (scalar,) = header_of(value(dims=(0,), data=b"a")).entries
    (empty,) = header_of(value(dims=(0,), data=b"")).entries
    (flat,) = header_of(value(dims=(0, 4), data=b"")).entries
    assert (scalar.shape, empty.shape, flat.shape) == ((), (0,), (0, 4))
    assert scalar.pieces[0][1] == Box((), ())


def test_int4_is_kept_as_packed_bytes_and_written_back() -> None:
    for dims, data in (((2, 4), b"abcd"), ((2, 2), b"abcd")):  # dims in halves, and in bytes
        header = header_of(value(dims=dims, kind=b"Int4", data=data))
        (entry,) = header.entries
        assert (entry.dtype.name, entry.shape, header.int4) == ("U8", (2, 2), {"w"})
        assert header.notes == ("w is packed Int4; its bytes are kept as U8.",)
    layout = ckpt.layout_file([entry[:3]], int4=["w"])
    assert assemble(layout, {"w": b"abcd"}) == value(dims=(2, 2), kind=b"Int4", data=b"abcd")


def test_packed_dims_unknown_fields_and_any_order_are_read() -> None:
    tensor = field(3, b"abcdef") + field(9, b"new")
    tensor += field(1, b"\x02\x03") + field(2, b"Int8")
    data = field(1, field(2, tensor) + field(1, b"w"))
    (entry,) = header_of(data).entries
    assert (entry.name, entry.shape) == ("w", (2, 3))
    assert content(data, entry) == b"abcdef"


def test_empty_parts_of_a_tensor_are_nothing() -> None:
    data = value(data=b"ab") + value(data=b"")
    (entry,) = header_of(data).entries
    assert [box for _, box in entry.pieces] == [Box((0,), (2,))]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (value(data=b"abc"), "w has 3 bytes .expected 2 for dims .2,. of Int8"),
        (value(dims=(1 << 62, 1 << 62)), "w has 2 bytes .expected"),
        (value(kind=b"Complex64"), "w has dtype Complex64 .expected one of"),
        (value(dims=(-1,)), "a tensor of dims"),
        (value(dims=(1,) * 33), "a tensor of dims"),
        (value(tag=b"\xff"), "a name that is not UTF-8"),
        (value(tag=b"w" * 5000), "a name of 5000 bytes"),
        (value() + value(b"v") + value(), "w is stored twice, in different places"),
        (value(dims=(4,)) + value(dims=(2, 2)), "has parts of different dims or dtypes"),
        (value(dims=(4,)) + value(dims=(4,), kind=b"UInt8"), "has parts of different dims"),
        (value(dims=(4,), kind=b"Int16", data=b"abc") * 2, "dims"),
        (
            value(dims=(3,), kind=b"Int16", data=b"abc") * 2,
            "w is split in the middle of an element",
        ),
        (value(kind=b"str", data=b"abc"), "w is text, but not UTF-32"),
        (value(kind=b"str", data=bytes(1 << 21)), "a string of 2097152 bytes"),
        (
            field(1, field(1, b"w")),
            "a value without name or tensor",
        ),
        (
            field(1, field(2, b"")),
            "a tensor without dtype or content",
        ),
        (value() + b"\x12\x00", "field 2 .expected a value"),
        (value() + b"crc_num123", "wire type 3"),
        (
            field(1, field(1, b"e") + field(3, b"\x0a\x00")),
            r"e is a hash-map embedding \(MapTensor\)",
        ),
    ],
)
def test_files_that_contradict_themselves_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=f"^f.ckpt.*{why}"):
        header_of(data)
