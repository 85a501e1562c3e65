"""MindSpore's ``.ckpt`` files: reader of their contents and byte offsets.

The file is one protobuf message, a list of values one after another. A large tensor is
several values with the same tag and the *whole* tensor's dims in each; where it is cut
has nothing to do with rows.

    0a len | 0a tag | 12 len | 08 dim 08 dim | 12 "Float32" | 1a len  ...bytes... |   × n
    "crc_num", 10 bytes: zlib.crc32 of everything before                (if asked for)

Only what stands between the tensors is read here: a file of ten gigabytes costs one small
read for each large tensor. This module knows nothing of ranks or models, and does not
move tensors' bytes. Laying out a file to be written is ``mindspore_ckpt_writing``.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from ..core.box import Box
from ..core.cache import cached
from ..core.dtypes import BY_NAME, DType, num_bytes
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
        ("Int4", "U8"),  # two in a byte (qint4x2), and no format has a name for that
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
    """What a file holds; ``entries`` in the order of the file.

    Attributes:
        entries: the tensors.
        strings: values that are text, by name.
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
    """One value as stored: all of a tensor or a part of one; bytes ``start`` to ``stop``."""

    tag: str
    dims: tuple[int, ...]
    tensor_type: str
    start: int
    stop: int


def read_header(folder: Folder, path: str) -> CkptHeader:
    """The tensors in the ``.ckpt`` at ``path`` and where their bytes lie; no tensor is read.

    Raises:
        FormatError: it is damaged, encrypted, or no weight file.
        NotFoundError: there is no such file.
    """
    _check_kind(folder, path)
    reader = Reader(folder, path)
    found = _Found(reader)
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
                raise reader.damaged(at, f"field {number} where every field is a value")
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
    """Whether the file has a checksum, after comparing it with the file's bytes.

    Raises:
        FormatError: the checksum is another one: the file is damaged.
        NotFoundError: there is no such file.
    """
    size = Reader(folder, path).num_bytes
    end = size - CRC_BYTES
    trailer = folder.read(path, end, CRC_BYTES) if end >= 0 else b""
    if not trailer.startswith(CRC_MARK):
        return False
    told_crc, crc = int.from_bytes(trailer[len(CRC_MARK) :], "big"), checksum(folder, path, end)
    if told_crc != crc:
        raise FormatError(
            f"{path}: its checksum says crc32 {told_crc:#010x}, but its bytes have {crc:#010x}. "
            "The file is damaged; fetch it again."
        )
    return True


def checksum(folder: Folder, path: str, stop: int) -> int:
    """The crc32 of the first ``stop`` bytes, read in blocks."""
    crc = 0
    for at in range(0, stop, _BLOCK_BYTES):
        crc = zlib.crc32(folder.read(path, at, min(_BLOCK_BYTES, stop - at)), crc)
    return crc


def boxes_of_run(start: int, stop: int, shape: tuple[int, ...]) -> list[tuple[int, Box]]:
    """Elements ``start`` to ``stop`` of a row-major tensor as boxes, each with its first element.

    Every box is contiguous; there are at most two for each dim, less one.

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
            f"{path} is {describe_kind(kind)}, not a MindSpore weight checkpoint. Weights lie in "
            "rank_0, rank_1 …; strategy files in strategy."
        )


# What MindSpore writes before a tensor's bytes: the length of the value, the tag; the length of
# the tensor, its dims, its type, and the length of its content, which is the last of all.
_VARINT = rb"[\x80-\xff]{0,4}[\x00-\x7f]"
_HEAD = re.compile(
    rb"\x0a(%b)\x0a([\x00-\x7f])([^\x12]*)\x12(%b)((?:\x08%b)*)\x12([\x00-\x7f])([A-Za-z0-9]+)\x1a(%b)"
    % ((_VARINT,) * 4),
    re.DOTALL,
)
_HEAD_BYTES = 512


def _usual(reader: Reader, at: int, stop: int) -> _Value | None:
    """The value at byte ``at`` if it is as MindSpore writes it, else None: then field by field.

    A file of ten gigabytes has thousands, and opens in half the time.
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
    """The value in bytes ``start`` to ``stop``, its tensor's bytes not read."""
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
                "(MapTensor), which is not a tensor. Export it as one from MindSpore, or leave it "
                "out there."
            )
        else:
            raise reader.damaged(a, f"field {number} is not what a value has there")
    if tag is None or tensor is None:
        raise reader.damaged(start, "a value without a name or without a tensor")
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
            raise reader.damaged(a, f"field {number} is not what a tensor has there")
    if tensor_type is None or content is None:
        raise reader.damaged(start, "a tensor without a dtype or without content")
    return dims, tensor_type, *content


class _Found:
    """The tensors and strings met so far."""

    def __init__(self, reader: Reader) -> None:
        self.entries: dict[str, StoredTensor] = {}
        self.strings: dict[str, str] = {}
        self.int4: list[str] = []
        self.notes: list[str] = []
        self._reader = reader
        self._num_pieces = 0

    def add(self, run: list[_Value]) -> None:
        """Add the tensor or string of which ``run`` has all parts.

        Raises:
            FormatError: the parts contradict each other, or the name was there before.
        """
        first = run[0]
        if first.tag in self.entries or first.tag in self.strings:
            raise self._wrong(first, "is there twice, in different places")
        if any(v.dims != first.dims or v.tensor_type != first.tensor_type for v in run[1:]):
            raise self._wrong(first, "is in parts of different dims or dtypes")
        if first.tensor_type == STRING:
            self.strings[first.tag] = self._text(run)
            return
        entry = self._entry(run)
        self.entries[first.tag] = entry
        self._num_pieces += len(entry.pieces)
        if self._num_pieces > _MAX_PIECES:
            raise self._wrong(first, f"is past the {_MAX_PIECES} pieces that a file may have")

    def _entry(self, run: list[_Value]) -> StoredTensor:
        tag, dims, tensor_type, *_ = run[0]
        kind = TENSOR_TYPES.get(tensor_type)
        if kind is None:
            raise self._wrong(
                run[0],
                f"has dtype {quote_name(tensor_type)}, which is none of MindSpore's "
                f"({', '.join(TENSOR_TYPES)})",
            )
        stored = sum(v.stop - v.start for v in run)
        shape = () if dims == (0,) and stored else dims  # how MindSpore writes some scalars
        if tensor_type == "Int4":
            shape = self._packed(run[0], shape, stored)
        if num_bytes(shape, kind) != stored:
            raise self._wrong(
                run[0],
                f"has dims {quote_name(str(dims))} of {tensor_type}, which are "
                f"{prod(shape) * kind.bits // 8} bytes, but {stored} are stored",
            )
        return StoredTensor(tag, kind, shape, self._pieces(run, shape, kind))

    def _packed(self, value: _Value, shape: tuple[int, ...], stored: int) -> tuple[int, ...]:
        """Return the shape in bytes of a packed Int4 tensor; its dims count halves or bytes."""
        self.int4.append(value.tag)
        self.notes.append(
            f"{quote_name(value.tag)} is Int4, two in a byte; it is kept as those bytes."
        )
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
                raise self._wrong(value, "is cut in the middle of an element")
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
            raise self._wrong(run[0], "is text, but not in UTF-32") from None

    def _wrong(self, value: _Value, what: str) -> FormatError:
        return self._reader.damaged(value.start, f"{quote_name(value.tag)} {what}")


# --- MindSpore's ``.ckpt`` files: layout of a file before its tensors are written

CHUNK_BYTES = 512 << 20  # MindSpore cuts larger tensors; protobuf ends at 2 GiB


def layout_file(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]],
    *,
    strings: Mapping[str, str] | None = None,
    int4: Iterable[str] = (),
    crc: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> FileLayout:
    """The file that holds ``entries`` in the order given, and ``strings`` after them.

    Args:
        entries: (name, dtype, shape) of every tensor.
        strings: text values.
        int4: the names of U8 tensors that are packed Int4.
        crc: leave room for a checksum at the end.
        chunk_bytes: where larger tensors are cut.

    Raises:
        LayoutError: a name stands twice, MindSpore has no such dtype, or a tensor has shape (0,).

    >>> from ..core.dtypes import dtype
    >>> layout_file([("w", dtype("F32"), (2, 3))]).spans("w", 4, 8)
    ((26, 8),)
    """
    build, packed, seen = _Building(chunk_bytes), frozenset(int4), set[str]()
    texts = dict(strings or {})
    for name, kind, shape in entries:
        if name in seen or name in texts:
            raise LayoutError(
                f"a file cannot hold two values called {quote_name(name)}. Rename one."
            )
        if len(shape) > MAX_DIMS:
            raise LayoutError(
                f"{quote_name(name)} has {len(shape)} dims; more than {MAX_DIMS} fail."
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
    r"""The last bytes of a file whose others have the crc32 ``crc``.

    >>> crc_trailer(258)
    b'crc_num\x00\x00\x00\x00\x00\x00\x00\x00\x01\x02'
    """
    return CRC_MARK + crc.to_bytes(CRC_BYTES - len(CRC_MARK), "big")


class _Building:
    """A file as far as it is laid out."""

    def __init__(self, chunk_bytes: int) -> None:
        self.at = 0
        self.segments: dict[int, list[bytes]] = {}
        self.offsets: dict[str, int] = {}
        self.chunks: dict[str, tuple[int, ...]] = {}
        self._chunk_bytes = chunk_bytes
        self._segment: list[bytes] | None = None  # the one that ends where the file ends so far

    def tensor(self, name: str, shape: tuple[int, ...], tensor_type: str, length: int) -> None:
        starts = list[int]()
        for offset in range(0, max(length, 1), self._chunk_bytes):  # an empty one has a value too
            part = min(self._chunk_bytes, length - offset)
            self._put(_value_head(name, shape, tensor_type, part))
            starts.append(self.at)
            self.at += part
            self._segment = None
        self.offsets[name] = starts[0]
        if len(starts) > 1:
            self.chunks[name] = tuple(starts)

    def string(self, name: str, text: str) -> None:
        data = _encoded(text or "\0", "utf-32-le", MAX_STRING_BYTES)  # NumPy's '' is one character
        if text.endswith("\0"):
            raise LayoutError(
                f"{quote_name(name)}: NumPy, and so MindSpore, drops the zeros at its end."
            )
        self._put(_value_head(name, (0,), STRING, len(data)) + data)

    def _put(self, data: bytes) -> None:
        if self._segment is None:
            self._segment = self.segments.setdefault(self.at, [])
        self._segment.append(data)
        self.at += len(data)


def _value_head(name: str, shape: tuple[int, ...], tensor_type: str, length: int) -> bytes:
    """All of a value but the ``length`` bytes of content that follow."""
    tensor = protobuf.number_fields(1, shape) + protobuf.bytes_field(2, tensor_type.encode())
    tensor += protobuf.bytes_head(3, length)
    value = protobuf.bytes_field(1, _encoded(name, "utf-8", MAX_TAG_BYTES))
    value += protobuf.bytes_head(2, len(tensor) + length) + tensor
    return protobuf.bytes_head(1, len(value) + length) + value


def _encoded(text: str, encoding: str, max_bytes: int) -> bytes:
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        raise LayoutError(f"{quote_name(text)} is not Unicode text (a lone surrogate).") from None
    if len(data) > max_bytes:
        raise LayoutError(f"{quote_name(text)} takes {len(data)} bytes; {max_bytes} are the most.")
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
            f"{quote_name(name)} has shape (0,), which MindSpore's .ckpt takes for a number "
            "without dims. Write safetensors, or leave it out (exclude= of a conversion, "
            "--exclude)."
        )
    return size
