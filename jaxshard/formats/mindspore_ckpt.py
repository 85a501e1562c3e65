"""MindSpore's ``.ckpt`` files: byte offsets of stored tensors, and layout of new files.

The file is one protobuf message, a sequence of values. A large tensor is stored as several values
with the same tag and the *whole* tensor's dims in each; the parts end at arbitrary bytes, not at
rows.

    0a len | 0a tag | 12 len | 08 dim 08 dim | 12 "Float32" | 1a len  ...bytes... |   × n
    "crc_num", 10 bytes: zlib.crc32 of everything before                (if requested)

Reading visits only the bytes between tensors: a file of ten gigabytes needs one small read per
large tensor. Every length follows from shapes, so writing starts with everything that is not
tensor data, and tensors are written at their offsets in any order. This module does not depend on
ranks or models.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from ..core.box import Box
from ..core.dtypes import BY_NAME, DType, num_bytes
from ..core.runtime import cached
from ..errors import FormatError, LayoutError, quote_name
from . import protobuf
from .folder import Folder, describe_kind, kind_of
from .protobuf import BYTES, Reader
from .safetensors import FileLayout, StoredTensor

TENSOR_TYPES: Mapping[str, DType] = {
    ours: BY_NAME[name]
    for ours, name in (
        ("Int8", "I8"), ("UInt8", "U8"), ("Int16", "I16"), ("UInt16", "U16"), ("Int32", "I32"),
        ("UInt32", "U32"), ("Int64", "I64"), ("UInt64", "U64"), ("Float16", "F16"),
        ("Float32", "F32"), ("Float64", "F64"), ("Bool", "BOOL"), ("BFloat16", "BF16"),
        ("Int4", "U8"),  # packed two per byte (qint4x2); other formats have no such dtype
    )
}  # fmt: skip
TYPE_NAMES = {kind: name for name, kind in TENSOR_TYPES.items() if name != "Int4"}
STRING = "str"
CRC_MARK = b"crc_num"
CRC_BYTES = len(CRC_MARK) + 10

MAX_TAG_BYTES = 4096
MAX_STRING_BYTES = 1 << 20
MAX_DIMS = 32
_MAX_PIECES = 1 << 20
_BLOCK_BYTES = 8 << 20
_ENCRYPTED = ("AES-GCM", "AES-CBC", "SM4-CBC")


@dataclass(frozen=True, slots=True)
class CkptHeader:
    """Contents of a file; ``entries`` in the order of the file.

    Attributes:
        entries: the tensors.
        strings: text values by name.
        has_crc: whether the file ends with a checksum, which ``check_crc`` compares.
        int4: the names of packed Int4 tensors, stored as U8.
        notes: remarks for the user.
    """

    entries: tuple[StoredTensor, ...] = field(repr=False)
    strings: Mapping[str, str] = field(repr=False)
    has_crc: bool
    int4: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class _Value(NamedTuple):
    """A stored value: a tensor or a part of one, in bytes ``start`` to ``stop``."""

    tag: str
    dims: tuple[int, ...]
    tensor_type: str
    start: int
    stop: int


def read_header(folder: Folder, path: str) -> CkptHeader:
    """Read names, dtypes, shapes and byte offsets of the tensors in a ``.ckpt``.

    Raises:
        FormatError: the file is damaged, encrypted, or not a weight file.
        NotFoundError: no such file.
    """
    _check_kind(folder, path)
    reader = Reader(folder, path)
    found = _Contents(reader)
    at, stop, has_crc = 0, reader.num_bytes, False
    run = list[_Value]()
    while at < stop and not has_crc:
        if stop - at == CRC_BYTES and reader.take(at, at + len(CRC_MARK), 8, "a") == CRC_MARK:
            has_crc = True
            continue
        start = at
        value = _usual(reader, at, stop)
        if value is not None:
            at = value.stop
        else:
            number, kind, start, end = reader.field(at, stop)
            if number != 1 or kind != BYTES:
                raise reader.damaged(at, f"field {number} (expected a value, field 1)")
            value, at = _value(reader, start, end), end
        if run and value.tag != run[0].tag:
            found.add(run)
            run = []
        run.append(value)
        if len(run) > _MAX_PIECES:
            raise reader.damaged(start, f"a tensor in more than {_MAX_PIECES} parts")
    if run:
        found.add(run)
    return CkptHeader(
        tuple(found.entries.values()),
        found.strings,
        has_crc,
        frozenset(found.int4),
        tuple(found.notes),
    )


def check_crc(folder: Folder, path: str) -> bool:
    """Verify the checksum of a ``.ckpt``; return whether the file has one.

    Raises:
        FormatError: the checksum differs, so the file is damaged.
        NotFoundError: no such file.
    """
    size = Reader(folder, path).num_bytes
    end = size - CRC_BYTES
    trailer = folder.read(path, end, CRC_BYTES) if end >= 0 else b""
    if not trailer.startswith(CRC_MARK):
        return False
    expected, crc = int.from_bytes(trailer[len(CRC_MARK) :], "big"), checksum(folder, path, end)
    if expected != crc:
        raise FormatError(
            f"{path}: the bytes have crc32 {crc:#010x} (expected {expected:#010x}). The file is "
            "damaged; fetch it again."
        )
    return True


def checksum(folder: Folder, path: str, stop: int) -> int:
    """Return the crc32 of the first ``stop`` bytes, read in blocks."""
    crc = 0
    for at in range(0, stop, _BLOCK_BYTES):
        crc = zlib.crc32(folder.read(path, at, min(_BLOCK_BYTES, stop - at)), crc)
    return crc


def boxes_of_run(start: int, stop: int, shape: tuple[int, ...]) -> list[tuple[int, Box]]:
    """Split elements ``start`` to ``stop`` of a row-major tensor into contiguous boxes.

    Each box comes with the number of its first element. There are at most two boxes per dim,
    less one.

    >>> [(at, str(box)) for at, box in boxes_of_run(2, 9, (4, 3))]
    [(2, '[0:1, 2:3]'), (3, '[1:3, 0:3]')]
    """
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    out = list[tuple[int, Box]]()
    while start < stop:
        if not shape:
            return [(0, Box((), ()))]
        dim = next(d for d, s in enumerate(strides) if start % s == 0 and start + s <= stop)
        index = [start // s % n for s, n in zip(strides, shape, strict=True)]
        count = min((stop - start) // strides[dim], shape[dim] - index[dim])
        first = (*index[: dim + 1], *(0 for _ in shape[dim + 1 :]))
        last = (*(i + 1 for i in index[:dim]), index[dim] + count, *shape[dim + 1 :])
        out.append((start, Box(first, last)))
        start += count * strides[dim]
    return out


def _check_kind(folder: Folder, path: str) -> None:
    kind = kind_of(folder, path)
    if kind in _ENCRYPTED:
        raise FormatError(
            f"{path} is encrypted ({kind}). Decrypt it first: jaxshard decrypt SRC DST --key-file "
            "FILE; or in MindSpore, with load_checkpoint(dec_key=) and save_checkpoint."
        )
    if kind != "weights.ckpt":
        raise FormatError(
            f"{path} is {describe_kind(kind)}, not a MindSpore weight checkpoint. MindSpore stores "
            "weights in rank_0, rank_1 … and strategy files in strategy."
        )


# The bytes before a tensor's content, as MindSpore writes them: the length of the value, the tag,
# the length of the tensor, its dims, its type, and the length of the content.
_VARINT = rb"[\x80-\xff]{0,4}[\x00-\x7f]"
_HEAD = re.compile(
    rb"\x0a(%b)\x0a([\x00-\x7f])([^\x12]*)\x12(%b)((?:\x08%b)*)\x12([\x00-\x7f])([A-Za-z0-9]+)\x1a(%b)"
    % ((_VARINT,) * 4),
    re.DOTALL,
)
_HEAD_BYTES = 512


def _usual(reader: Reader, at: int, stop: int) -> _Value | None:
    """Parse the value at byte ``at`` by one regex match; None if its form is unusual.

    The caller then parses field by field. The match halves the time to open a file of ten
    gigabytes, which has thousands of values.
    """
    block, index = reader.around(at, _HEAD_BYTES)
    found = _HEAD.match(block, index)
    if found is None:
        return None
    length, tag_bytes, tag, inner, dims, type_bytes, tensor_type, content = found.groups()
    start = at + found.end() - index
    end = start + _number(content)
    if (
        end > stop
        or at + found.end(1) - index + _number(length) != end
        or at + found.end(4) - index + _number(inner) != end
        or tag_bytes[0] != len(tag)
        or type_bytes[0] != len(tensor_type)
        or len(shape := _numbers(dims)) > MAX_DIMS
    ):
        return None
    try:
        return _Value(tag.decode(), shape, tensor_type.decode(), start, end)
    except UnicodeDecodeError:
        return None


@cached(4096)
def _number(varint: bytes) -> int:
    return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(varint))


@cached(4096)
def _numbers(fields: bytes) -> tuple[int, ...]:
    return tuple(_number(one[1:]) for one in re.findall(rb"\x08" + _VARINT, fields, re.DOTALL))


def _value(reader: Reader, start: int, stop: int) -> _Value:
    """Parse the value in bytes ``start`` to ``stop`` without reading the tensor."""
    tag, tensor = None, None
    for number, kind, a, b in reader.fields(start, stop):
        if number > 3:
            continue
        if number == 1 and kind == BYTES:
            tag = reader.text(a, b, MAX_TAG_BYTES, "a name")
        elif number == 2 and kind == BYTES and tensor is None:
            tensor = _tensor(reader, a, b)
        elif number == 3 and kind == BYTES:
            raise FormatError(
                f"{reader.path}: {quote_name(tag or 'a value')} is a hash-map embedding "
                "(MapTensor), which is not supported. In MindSpore, export it as a tensor or leave "
                "it out."
            )
        else:
            raise reader.damaged(a, f"invalid field {number} of a value")
    if tag is None or tensor is None:
        raise reader.damaged(start, "a value without name or tensor")
    return _Value(tag, *tensor)


def _tensor(reader: Reader, start: int, stop: int) -> tuple[tuple[int, ...], str, int, int]:
    dims = tuple[int, ...]()
    tensor_type: str | None = None
    content: tuple[int, int] | None = None
    for one in reader.fields(start, stop):
        number, kind, a, b = one
        if number == 1:
            dims += reader.numbers(one, MAX_DIMS)
            if len(dims) > MAX_DIMS or min(dims, default=0) < 0:
                raise reader.damaged(a, f"a tensor of dims {quote_name(str(dims))}")
        elif number == 2 and kind == BYTES:
            tensor_type = reader.text(a, b, 64, "a dtype")
        elif number == 3 and kind == BYTES and content is None:
            content = a, b
        elif number <= 3:
            raise reader.damaged(a, f"invalid field {number} of a tensor")
    if tensor_type is None or content is None:
        raise reader.damaged(start, "a tensor without dtype or content")
    return dims, tensor_type, *content


class _Contents:
    """Tensors and strings parsed so far."""

    def __init__(self, reader: Reader) -> None:
        self.entries: dict[str, StoredTensor] = {}
        self.strings: dict[str, str] = {}
        self.int4: list[str] = []
        self.notes: list[str] = []
        self._reader = reader
        self._num_pieces = 0

    def add(self, run: list[_Value]) -> None:
        """Add a tensor or string from the list of all its parts.

        Raises:
            FormatError: the parts contradict each other, or the name is a duplicate.
        """
        first = run[0]
        if first.tag in self.entries or first.tag in self.strings:
            raise self._wrong(first, "is stored twice, in different places")
        if any(v.dims != first.dims or v.tensor_type != first.tensor_type for v in run[1:]):
            raise self._wrong(first, "has parts of different dims or dtypes")
        if first.tensor_type == STRING:
            self.strings[first.tag] = self._text(run)
            return
        entry = self._entry(run)
        self.entries[first.tag] = entry
        self._num_pieces += len(entry.pieces)
        if self._num_pieces > _MAX_PIECES:
            raise self._wrong(first, f"exceeds the limit of {_MAX_PIECES} pieces per file")

    def _entry(self, run: list[_Value]) -> StoredTensor:
        tag, dims, tensor_type, *_ = run[0]
        kind = TENSOR_TYPES.get(tensor_type)
        if kind is None:
            raise self._wrong(
                run[0],
                f"has dtype {quote_name(tensor_type)} (expected one of {', '.join(TENSOR_TYPES)})",
            )
        stored = sum(v.stop - v.start for v in run)
        shape = (
            () if dims == (0,) and stored else dims
        )  # MindSpore writes some scalars with dims (0,)
        if tensor_type == "Int4":
            shape = self._packed(run[0], shape, stored)
        if num_bytes(shape, kind) != stored:
            raise self._wrong(
                run[0],
                f"has {stored} bytes (expected {prod(shape) * kind.bits // 8} for dims "
                f"{quote_name(str(dims))} of {tensor_type})",
            )
        return StoredTensor(tag, kind, shape, self._pieces(run, shape, kind))

    def _packed(self, value: _Value, shape: tuple[int, ...], stored: int) -> tuple[int, ...]:
        """Return the shape in bytes of a packed Int4 tensor; its dims count halves or bytes."""
        self.int4.append(value.tag)
        self.notes.append(f"{quote_name(value.tag)} is packed Int4; its bytes are kept as U8.")
        if shape and shape[-1] % 2 == 0 and prod(shape) == 2 * stored:
            return (*shape[:-1], shape[-1] // 2)
        return shape

    def _pieces(
        self, run: list[_Value], shape: tuple[int, ...], kind: DType
    ) -> tuple[tuple[int, Box], ...]:
        if len(run) == 1:
            return ((run[0].start, Box.whole(shape)),)
        out, before, each = list[tuple[int, Box]](), 0, kind.bits // 8
        for value in run:
            after = before + value.stop - value.start
            if before % each or after % each:
                raise self._wrong(value, "is split in the middle of an element")
            for first, box in boxes_of_run(before // each, after // each, shape):
                out.append((value.start + first * each - before, box))
            before = after
        return tuple(out)

    def _text(self, run: list[_Value]) -> str:
        data = b"".join(
            self._reader.take(v.start, v.stop, MAX_STRING_BYTES // len(run), "a string")
            for v in run
        )
        try:
            return data.decode("utf-32-le").rstrip("\0")
        except UnicodeDecodeError:
            raise self._wrong(run[0], "is text, but not UTF-32") from None

    def _wrong(self, value: _Value, what: str) -> FormatError:
        return self._reader.damaged(value.start, f"{quote_name(value.tag)} {what}")


# --- layout of a new file -------------------------------------------------------------------------

CHUNK_BYTES = 512 << 20  # MindSpore splits larger tensors: protobuf is limited to 2 GiB


def layout_file(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]],
    *,
    strings: Mapping[str, str] | None = None,
    int4: Iterable[str] = (),
    crc: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> FileLayout:
    """Lay out the file of ``entries`` in the given order, followed by ``strings``.

    Args:
        entries: (name, dtype, shape) of every tensor.
        strings: text values.
        int4: the names of U8 tensors that are packed Int4.
        crc: reserve space for a checksum at the end.
        chunk_bytes: the largest part; larger tensors are split.

    Raises:
        LayoutError: a name is a duplicate, MindSpore lacks a dtype, or a tensor has shape (0,).

    >>> from ..core.dtypes import dtype
    >>> layout_file([("w", dtype("F32"), (2, 3))]).spans("w", 4, 8)
    ((26, 8),)
    """
    build, packed, seen = _FileBuilder(chunk_bytes), frozenset(int4), set[str]()
    texts = dict(strings or {})
    for name, kind, shape in entries:
        if name in seen or name in texts:
            raise LayoutError(f"duplicate value name {quote_name(name)}. Rename one.")
        if len(shape) > MAX_DIMS:
            raise LayoutError(
                f"{quote_name(name)} has {len(shape)} dims (expected at most {MAX_DIMS})."
            )
        seen.add(name)
        tensor_type = "Int4" if name in packed and kind.name == "U8" else _tensor_type(name, kind)
        build.tensor(name, shape, tensor_type, _bytes_of(name, kind, shape))
    for name, text in texts.items():
        build.string(name, text)
    end = build.at
    return FileLayout(
        segments=tuple((at, b"".join(parts)) for at, parts in build.segments.items()),
        offsets=build.offsets,
        num_bytes=end + CRC_BYTES if crc else end,
        chunks=build.chunks,
        chunk_bytes=chunk_bytes,
        crc_offset=end if crc else None,
    )


def crc_trailer(crc: int) -> bytes:
    r"""Return the trailer of a file whose other bytes have the crc32 ``crc``.

    >>> crc_trailer(258)
    b'crc_num\x00\x00\x00\x00\x00\x00\x00\x00\x01\x02'
    """
    return CRC_MARK + crc.to_bytes(CRC_BYTES - len(CRC_MARK), "big")


class _FileBuilder:
    """Builder of a file layout, value by value."""

    def __init__(self, chunk_bytes: int) -> None:
        self.at = 0
        self.segments: dict[int, list[bytes]] = {}
        self.offsets: dict[str, int] = {}
        self.chunks: dict[str, tuple[int, ...]] = {}
        self._chunk_bytes = chunk_bytes
        self._segment: list[bytes] | None = None  # the segment at the current end of the file

    def tensor(self, name: str, shape: tuple[int, ...], tensor_type: str, length: int) -> None:
        starts = list[int]()
        for offset in range(0, max(length, 1), self._chunk_bytes):  # an empty tensor has one value
            part = min(self._chunk_bytes, length - offset)
            self._put(_value_head(name, shape, tensor_type, part))
            starts.append(self.at)
            self.at += part
            self._segment = None
        self.offsets[name] = starts[0]
        if len(starts) > 1:
            self.chunks[name] = tuple(starts)

    def string(self, name: str, text: str) -> None:
        data = _encoded(
            text or "\0", "utf-32-le", MAX_STRING_BYTES
        )  # NumPy stores '' as one character
        if text.endswith("\0"):
            raise LayoutError(
                f"{quote_name(name)}: the text ends with a NUL, which NumPy and MindSpore drop. "
                "Remove it."
            )
        self._put(_value_head(name, (0,), STRING, len(data)) + data)

    def _put(self, data: bytes) -> None:
        if self._segment is None:
            self._segment = self.segments.setdefault(self.at, [])
        self._segment.append(data)
        self.at += len(data)


def _value_head(name: str, shape: tuple[int, ...], tensor_type: str, length: int) -> bytes:
    """Encode a value up to its content of ``length`` bytes."""
    tensor = protobuf.number_fields(1, shape) + protobuf.bytes_field(2, tensor_type.encode())
    tensor += protobuf.bytes_head(3, length)
    value = protobuf.bytes_field(1, _encoded(name, "utf-8", MAX_TAG_BYTES))
    value += protobuf.bytes_head(2, len(tensor) + length) + tensor
    return protobuf.bytes_head(1, len(value) + length) + value


def _encoded(text: str, encoding: str, max_bytes: int) -> bytes:
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        raise LayoutError(f"{quote_name(text)} is not Unicode text (lone surrogate).") from None
    if len(data) > max_bytes:
        raise LayoutError(
            f"{quote_name(text)} needs {len(data)} bytes (expected at most {max_bytes})."
        )
    return data


def _tensor_type(name: str, kind: DType) -> str:
    found = TYPE_NAMES.get(kind)
    if found is None:
        raise LayoutError(
            f"{quote_name(name)}: MindSpore's .ckpt has no dtype {kind}. Write safetensors, or "
            "cast it (BF16 holds every F8)."
        )
    return found


def _bytes_of(name: str, kind: DType, shape: tuple[int, ...]) -> int:
    try:
        size = num_bytes(shape, kind)
    except FormatError as error:
        raise LayoutError(f"{quote_name(name)}: {error} Cast it.") from None
    if shape == (0,):
        raise LayoutError(
            f"{quote_name(name)}: shape (0,) stands for a scalar in MindSpore's .ckpt. Write "
            "safetensors, or leave it out (exclude= of a conversion, --exclude)."
        )
    return size
