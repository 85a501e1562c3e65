"""Protobuf wire format: fields and their byte offsets.

MindSpore's strategy files and weight files are protobuf messages. A protobuf library
parses a whole file into objects, but jaxshard needs the *offset* of each tensor in a file
that may be larger than memory. So this reader walks a file in small blocks, skips payloads,
and never recurses: a nested message is one more range of bytes. Files are untrusted: a length
beyond its message, an endless varint and an unknown wire type are refused.

    key     number << 3 | kind         one varint before every field
    kind 0  varint                     7 bits per byte, low bits first, top bit set but in the last
    kind 2  length, then bytes         text, bytes, nested messages, packed numbers
    kind 1  8 bytes      kind 5  4 bytes

This module does not depend on the messages of MindSpore.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..errors import FormatError, NotFoundError
from .folder import Folder

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# (number, kind, start, stop): for BYTES the range of its bytes in the file, else the value and
# the offset after it. A plain tuple: a large file has a million of them.
Field = tuple[int, int, int, int]

_MAX_VARINT_BYTES = 10  # 64 bits, 7 a byte
_WORD = 1 << 64


class Reader:
    """Reader of the fields of one file, in blocks of ``block_bytes`` at a moving position."""

    def __init__(self, folder: Folder, path: str, block_bytes: int = 4096) -> None:
        file = folder.files().get(path)
        if file is None:
            raise NotFoundError(f"{folder.root} has no file {path}.")
        self.path = path
        self.num_bytes = file.num_bytes
        self._folder = folder
        self._block_bytes = max(block_bytes, _MAX_VARINT_BYTES)
        self._base = 0
        self._block = b""

    def damaged(self, at: int, what: str) -> FormatError:
        """Return the error for damage at byte ``at``."""
        return FormatError(
            f"{self.path}, byte {at}: {what}. The file is damaged, truncated or of another kind; "
            "fetch it again."
        )

    def around(self, at: int, num_bytes: int) -> tuple[bytes, int]:
        """Return a block with ``num_bytes`` from byte ``at``, and the index of that byte.

        At the end of the file the block may be shorter.
        """
        index = at - self._base
        if index < 0 or index + num_bytes > len(self._block):
            index = self._fill(at)
        return self._block, index

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """Read the unsigned number at byte ``at``; also return the offset after it.

        Raises:
            FormatError: the number has no end before ``stop``, or more than 64 bits.
        """
        index = at - self._base
        if index < 0 or index + _MAX_VARINT_BYTES > len(self._block):
            index = self._fill(at)
        block = self._block
        if at < stop and block[index] < 0x80:
            return block[index], at + 1
        value = shift = 0
        for byte in block[index : index + min(_MAX_VARINT_BYTES, stop - at)]:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                if value >= _WORD:
                    break
                return value, at + shift // 7
        raise self.damaged(at, "a number exceeds 64 bits or the end of its message")

    def field(self, at: int, stop: int) -> Field:
        """Read the field whose key is at byte ``at`` of a message that ends at ``stop``.

        Raises:
            FormatError: the wire type is unknown, or the field exceeds its message.
        """
        index, block = at - self._base, self._block
        if 0 <= index < len(block) - 1 and at + 1 < stop and block[index] < 0x80:
            key, start = (
                block[index],
                at + 1,
            )  # the usual case: one byte each for key and number or length
            value = block[index + 1]
            if value < 0x80 and key > 7:
                if key & 7 == VARINT:
                    return key >> 3, VARINT, value, at + 2
                if key & 7 == BYTES and value <= stop - at - 2:
                    return key >> 3, BYTES, at + 2, at + 2 + value
        else:
            key, start = self.varint(at, stop)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            return number, kind, *self.varint(start, stop)
        if kind == BYTES:
            length, start = self.varint(start, stop)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise self.damaged(at, f"a field of wire type {kind}, which MindSpore does not write")
        if number == 0:
            raise self.damaged(at, "a field numbered 0")
        if length > stop - start:
            raise self.damaged(
                at, f"a field of {length} bytes with {stop - start} left in its message"
            )
        if kind == BYTES:
            return number, kind, start, start + length
        value = int.from_bytes(self.take(start, start + length, 8, "a number"), "little")
        return number, kind, value, start + length

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """Yield every field of the message in bytes ``start`` to ``stop``.

        Raises:
            FormatError: as ``field``.
        """
        while start < stop:
            one = self.field(start, stop)
            yield one
            start = one[3]

    def take(self, start: int, stop: int, max_bytes: int, what: str) -> bytes:
        """Read bytes ``start`` to ``stop`` of the file.

        Raises:
            FormatError: a ``what`` of more than ``max_bytes``.
        """
        if stop - start > max_bytes:
            raise self.damaged(
                start, f"{what} of {stop - start} bytes (expected at most {max_bytes})"
            )
        index = start - self._base
        if index < 0 or stop - self._base > len(self._block):
            if stop - start > self._block_bytes:
                return self._folder.read(self.path, start, stop - start)
            index = self._fill(start)
        return self._block[index : index + stop - start]

    def text(self, start: int, stop: int, max_bytes: int, what: str) -> str:
        """Decode bytes ``start`` to ``stop`` as UTF-8.

        Raises:
            FormatError: the bytes are not UTF-8, or more than ``max_bytes``.
        """
        data = self.take(start, stop, max_bytes, what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.damaged(start, f"{what} that is not UTF-8") from None

    def numbers(self, field: Field, max_numbers: int) -> tuple[int, ...]:
        """Return the signed numbers of one field of a repeated integer, packed or not.

        Raises:
            FormatError: more than ``max_numbers``, or a field that is not an integer.
        """
        _, kind, start, stop = field
        if kind == VARINT:
            return (signed(start),)
        if kind != BYTES:
            raise self.damaged(stop, "a field of fixed width where an integer is expected")
        out = list[int]()
        while start < stop:
            if len(out) == max_numbers:
                raise self.damaged(start, f"a list of more than {max_numbers} numbers")
            value, start = self.varint(start, stop)
            out.append(signed(value))
        return tuple(out)

    def _fill(self, at: int) -> int:
        """Load the block at ``at`` unless it is loaded; return the index of ``at`` in it."""
        index = at - self._base
        whole = self._base + len(self._block) == self.num_bytes
        if index < 0 or index > len(self._block) or not whole:
            length = max(0, min(self._block_bytes, self.num_bytes - at))
            self._block, self._base = self._folder.read(self.path, at, length), at
            return 0
        return index


def signed(value: int) -> int:
    """Return the signed number with the 64-bit two's complement ``value``.

    >>> signed(2**64 - 1)
    -1
    """
    return value - _WORD if value >= _WORD // 2 else value


def varint(value: int) -> bytes:
    """Encode ``value`` as a varint; a negative number needs ten bytes.

    >>> varint(300).hex(), len(varint(-1))
    ('ac02', 10)
    """
    value %= _WORD
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number_field(number: int, value: int) -> bytes:
    """Encode field ``number`` with an integer.

    >>> number_field(5, 0).hex()
    '2800'
    """
    return varint(number << 3 | VARINT) + varint(value)


def bytes_head(number: int, length: int) -> bytes:
    """Encode the key and length that precede the payload of field ``number``."""
    return varint(number << 3 | BYTES) + varint(length)


def bytes_field(number: int, payload: bytes) -> bytes:
    r"""Encode field ``number`` with bytes, text or a message.

    >>> bytes_field(1, b"f32")
    b'\n\x03f32'
    """
    return bytes_head(number, len(payload)) + payload


def number_fields(number: int, values: Iterable[int]) -> bytes:
    """Encode a repeated integer, unpacked as in proto2 and MindSpore.

    >>> number_fields(1, (4, 2)).hex()
    '08040802'
    """
    return b"".join(number_field(number, v) for v in values)
