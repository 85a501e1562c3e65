"""The wire reader: numbers and lengths from strangers, read by small blocks."""

from __future__ import annotations

import pytest
from counting_folder import CountingFolder
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.errors import FormatError, NotFoundError
from jaxshard.formats import protobuf
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.protobuf import BYTES, FIXED32, FIXED64, Reader

WORDS = st.integers(-(2**63), 2**64 - 1)
NUMBERS = st.integers(1, 2**29 - 1)


def reader(data: bytes, block_bytes: int = 4096) -> Reader:
    return Reader(MemoryFolder({"f": data}), "f", block_bytes)


@given(WORDS, st.integers(10, 40))
def test_a_number_is_read_back_as_written(value: int, block_bytes: int) -> None:
    data = protobuf.varint(value)
    assert reader(data, block_bytes).varint(0, len(data)) == (value % 2**64, len(data))
    assert protobuf.signed(value % 2**64) == (value if value < 2**63 else value - 2**64)


@given(st.lists(st.tuples(NUMBERS, WORDS | st.binary(max_size=40))), st.integers(10, 60))
def test_fields_are_read_back_whatever_the_block_size(
    fields: list[tuple[int, int | bytes]], block_bytes: int
) -> None:
    data = b"".join(
        protobuf.bytes_field(n, v) if isinstance(v, bytes) else protobuf.number_field(n, v)
        for n, v in fields
    )
    r = reader(data, block_bytes)
    found = [
        (n, r.take(a, b, 100, "x") if kind == BYTES else protobuf.signed(a))
        for n, kind, a, b in r.fields(0, len(data))
    ]
    wanted = [(n, v if isinstance(v, bytes) else protobuf.signed(v % 2**64)) for n, v in fields]
    assert found == wanted


def test_bytes_are_as_protobuf_has_them() -> None:
    # the examples of the encoding's own documentation: 150 in field 1, "testing" in field 2
    assert protobuf.number_field(1, 150) == bytes.fromhex("089601")
    assert protobuf.bytes_field(2, b"testing") == bytes.fromhex("120774657374696e67")
    assert protobuf.varint(-1) == b"\xff" * 9 + b"\x01"


def test_numbers_of_fixed_width_are_read() -> None:
    data = bytes([5 << 3 | FIXED32, 1, 2, 0, 0, 6 << 3 | FIXED64, 9, 0, 0, 0, 0, 0, 0, 1])
    assert list(reader(data).fields(0, len(data))) == [
        (5, FIXED32, 513, 5),
        (6, FIXED64, 2**56 + 9, 14),
    ]


def test_a_list_may_be_packed_or_not() -> None:
    packed = protobuf.bytes_field(1, protobuf.varint(3) + protobuf.varint(-1))
    one = protobuf.number_fields(1, (3,))
    assert reader(packed).numbers(reader(packed).field(0, len(packed)), 9) == (3, -1)
    assert reader(one).numbers(reader(one).field(0, len(one)), 9) == (3,)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x80" * 11, "a number"),  # never ends
        (b"\x08" + b"\xff" * 9 + b"\x7f", "a number"),  # 70 bits
        (b"\x08\x80", "a number"),  # ends with the file
        (b"\x08", "a number"),
        (b"\x0a\x05abc", "a field of 5 bytes with 3 left"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "with 0 left"),
        (b"\x09\x00", "a field of 8 bytes with 1 left"),
        (b"\x0b", "wire type 3"),  # groups nest without a length: no file here has them
        (b"\x0c", "wire type 4"),
        (b"\x0f\x00", "wire type 7"),
        (b"\x02\x00", "numbered 0"),
    ],
)
def test_what_is_not_protobuf_is_refused_with_its_place(data: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=f"^f, byte [0-9]+: .*{why}.*fetch it again"):
        list(reader(data).fields(0, len(data)))


def test_a_field_cannot_leave_the_message_it_is_in() -> None:
    inner = b"\x0a\x04ab"  # claims 4 bytes; the file has them, the message does not
    data = protobuf.bytes_field(1, inner) + b"cd"
    _, _, start, stop = reader(data).field(0, len(data))
    with pytest.raises(FormatError, match="4 bytes with 2 left"):
        list(reader(data).fields(start, stop))


def test_text_must_be_utf8_and_short() -> None:
    with pytest.raises(FormatError, match="a name that is not UTF-8"):
        reader(b"\xff\xfe").text(0, 2, 10, "a name")
    with pytest.raises(FormatError, match=r"a name of 20 bytes .expected at most 10"):
        reader(b"a" * 20).text(0, 20, 10, "a name")
    assert reader("ü".encode()).text(0, 2, 2, "a name") == "ü"


def test_a_list_longer_than_allowed_is_refused() -> None:
    data = protobuf.bytes_field(1, b"\x01" * 100)
    with pytest.raises(FormatError, match="more than 64 numbers"):
        reader(data).numbers(reader(data).field(0, len(data)), 64)


def test_jumping_over_bytes_does_not_read_them() -> None:
    data = protobuf.bytes_field(1, bytes(1 << 20)) + protobuf.bytes_field(2, b"end")
    folder = CountingFolder({"f": data})
    r = Reader(folder, "f", block_bytes=64)
    (_, _, start, stop) = list(r.fields(0, len(data)))[1]
    assert r.take(start, stop, 10, "x") == b"end"
    assert folder.num_bytes <= 3 * 64


def test_a_missing_file_is_named() -> None:
    with pytest.raises(NotFoundError, match="memory has no file g"):
        Reader(MemoryFolder({"f": b""}), "g")
