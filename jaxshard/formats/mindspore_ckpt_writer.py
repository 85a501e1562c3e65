"""MindSpore's ``.ckpt`` files: layout of a file before its tensors are written.

Every length is known from shapes, so all that is not a tensor's bytes is made first, and
whoever moves the bytes puts them at the offsets given here, in any order. What MindSpore
demands and protobuf allows is in ``mindspore_ckpt``. This module opens no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..core.dtypes import DType, num_bytes
from ..errors import FormatError, LayoutError, quote_name
from . import protobuf
from .mindspore_ckpt import (
    CRC_BYTES,
    CRC_MARK,
    MAX_DIMS,
    MAX_STRING_BYTES,
    MAX_TAG_BYTES,
    STRING,
    TENSOR_TYPES,
)

CHUNK_BYTES = 512 << 20  # MindSpore cuts larger tensors; protobuf ends at 2 GiB

_TYPE_OF = {kind: name for name, kind in TENSOR_TYPES.items() if name != "Int4"}


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file to be written.

    Attributes:
        segments: (offset, bytes) of everything that is no tensor's, in order.
        chunks: per tensor, in order, where its parts start in the file.
        chunk_bytes: how long all but the last part of a tensor are.
        num_bytes: the size of the whole file.
        crc_offset: where ``crc_trailer`` goes once all else is written, or None.
    """

    segments: tuple[tuple[int, bytes], ...] = field(repr=False)
    chunks: Mapping[str, tuple[int, ...]] = field(repr=False)
    chunk_bytes: int
    num_bytes: int
    crc_offset: int | None = None

    def spans(self, name: str, offset: int, length: int) -> tuple[tuple[int, int], ...]:
        """Where bytes ``offset … offset + length`` of a tensor lie: (file offset, length)."""
        out, starts = list[tuple[int, int]](), self.chunks[name]
        while length:
            number, into = divmod(offset, self.chunk_bytes)
            part = min(length, self.chunk_bytes - into)
            out.append((starts[number] + into, part))
            offset, length = offset + part, length - part
        return tuple(out)


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
        chunks=build.chunks,
        chunk_bytes=chunk_bytes,
        num_bytes=end + CRC_BYTES if crc else end,
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
    found = _TYPE_OF.get(kind)
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
