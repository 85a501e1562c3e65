"""safetensors files: header reader, and layout of new files.

    | 8 bytes: n | n bytes of JSON, space-padded | tensor | tensor | … |
                                                 ^ data_start; a multiple of 64 in our files

Reading needs the header only and validates all of it. Writing only computes the layout; tensors
are written at its offsets in any order. ``StoredTensor`` and ``FileLayout`` describe ``.ckpt``
files too. This module does not depend on models or on sets of files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

from ..core.box import Box
from ..core.decoders import FETCH, parse_object
from ..core.dtypes import BY_NAME, DType, num_bytes
from ..errors import FormatError, LayoutError, NotFoundError, quote_name
from .folder import Folder

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ALIGNMENT = 64  # a cache line; JAX requires it of memory that it aliases

_METADATA = "__metadata__"
_MAX_DIMS = 64  # NumPy's
_LIMIT = 2**64  # the format has unsigned 64-bit integers
_KEYS = {"dtype", "shape", "data_offsets"}  # an unknown key might change the meaning of the bytes
_TWO_INTS = [int, int]
_quoted = _dumped = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class HeaderEntry(NamedTuple):  # a tuple, because headers have 100,000 of them
    """Header entry of one tensor, in bytes ``start`` to ``stop`` of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int


class StoredTensor(NamedTuple):
    """A tensor stored in pieces: (file offset, box of the tensor) each, in order."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, Box], ...]


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a file; ``entries`` are in byte order."""

    metadata: Mapping[str, str]
    entries: tuple[HeaderEntry, ...] = field(repr=False)
    data_start: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Offsets of a weight file to be written, and its bytes that are not tensor data.

    Attributes:
        segments: (file offset, bytes) of everything but tensor data, in order.
        offsets: the file offset of each tensor, in the order of the file.
        num_bytes: the size of the file.
        chunks: the file offsets of the parts of tensors that the format splits.
        chunk_bytes: the size of every part of a split tensor but the last.
        crc_offset: the offset of the checksum, written after everything else, or None.
    """

    segments: tuple[tuple[int, bytes], ...] = field(repr=False)
    offsets: Mapping[str, int] = field(repr=False)
    num_bytes: int
    chunks: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    chunk_bytes: int = 0
    crc_offset: int | None = None

    def spans(self, name: str, offset: int, length: int) -> tuple[tuple[int, int], ...]:
        """Return (file offset, length) of ``length`` bytes of a tensor from byte ``offset``."""
        if name not in self.chunks:
            return ((self.offsets[name] + offset, length),)
        out, starts = list[tuple[int, int]](), self.chunks[name]
        while length:
            number, into = divmod(offset, self.chunk_bytes)
            part = min(length, self.chunk_bytes - into)
            out.append((starts[number] + into, part))
            offset, length = offset + part, length - part
        return tuple(out)


def read_header(folder: Folder, path: str, *, file_bytes: int | None = None) -> Header:
    """Read and validate the header of the safetensors file at ``path``.

    Every byte after the header must belong to exactly one tensor.

    Args:
        folder: the folder of the file.
        path: the file, relative to ``folder``.
        file_bytes: the file's size, if the caller knows it.

    Raises:
        FormatError: the file is damaged or not a safetensors file.
        NotFoundError: no such file.
    """
    if file_bytes is None:
        listed = folder.files().get(path)
        if listed is None:
            raise NotFoundError(f"{folder.root} has no file {quote_name(path)}.")
        file_bytes = listed.num_bytes
    json_bytes = _header_bytes(folder, path, file_bytes)
    text = folder.read(path, 8, json_bytes)
    raw = parse_object(text, f"the header of {path}", num_texts=_num_texts)
    metadata = _metadata(raw.pop(_METADATA, {}), path)
    data_start = 8 + json_bytes
    entries = [_entry(name, value, data_start, path) for name, value in raw.items()]
    entries.sort(key=itemgetter(3, 4))
    _check_cover(entries, data_start, file_bytes, path)
    return Header(metadata, tuple(entries), data_start)


def mentions(folder: Folder, path: str, text: bytes) -> bool:
    """Return whether ``text`` occurs in the header of the file at ``path``, without parsing it.

    Raises:
        FormatError: the file is damaged or not a safetensors file.
        NotFoundError: no such file.
    """
    listed = folder.files().get(path)
    if listed is None:
        raise NotFoundError(f"{folder.root} has no file {quote_name(path)}.")
    return text in folder.read(path, 8, _header_bytes(folder, path, listed.num_bytes))


def layout_file(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> FileLayout:
    """Lay out the file of ``entries``.

    The data starts on a 64-byte boundary. Tensors whose size is a multiple of 64 bytes come
    first, in the given order, so they are aligned too and can be aliased. The others follow,
    widest elements first, so every tensor is aligned to its elements. The header lists tensors
    in byte order without holes, as some readers require.

    Raises:
        LayoutError: a name is a duplicate, a tensor does not fill whole bytes, metadata is not
            text, or the header exceeds the format's limit.

    >>> layout_file([("b", BY_NAME["U8"], (3,)), ("w", BY_NAME["F32"], (16,))], {}).offsets
    {'w': 128, 'b': 192}
    """
    texts, relative, position = list[str](), dict[str, int](), 0
    if metadata:
        texts.append(f"{_quoted(_METADATA)}:{_dumped(_writable_metadata(metadata))}")
    for name, form in _ordered(entries):
        relative[name] = position
        end = position + form.num_bytes
        texts.append(f'{_quoted(name)}:{form.text},"data_offsets":[{position},{end}]}}')
        position = end
    header = _header(texts)
    start = len(header)
    offsets = {name: start + at for name, at in relative.items()}
    return FileLayout(((0, header),), offsets, start + position)


def _header_bytes(folder: Folder, path: str, file_bytes: int) -> int:
    """Return the length of the JSON header, validated against the file size and format."""
    if file_bytes < 8:
        raise FormatError(
            f"{path} has {file_bytes} bytes (expected 8 or more in a safetensors file). {FETCH}"
        )
    start = folder.read(path, 0, 8)
    if start == b"version ":  # https://git-lfs.github.com/spec
        raise FormatError(
            f"{path} is a Git LFS pointer of {file_bytes} bytes, not the weights. "
            "Fetch them with: git lfs pull"
        )
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: header of {length} bytes (expected at most {MAX_HEADER_BYTES}). It is "
            f"damaged or not a safetensors file. {FETCH}"
        )
    if length > file_bytes - 8:
        raise FormatError(
            f"{path} is truncated: header of {length} bytes (expected at most {file_bytes - 8}, "
            f"the bytes after the first 8). {FETCH}"
        )
    return length


def _num_texts(raw: dict[str, Any]) -> int:
    """Count the keys and strings of a header: a name, three keys and a dtype per tensor."""
    metadata = raw.get(_METADATA)
    if not isinstance(metadata, dict):
        return 5 * len(raw)
    return 5 * (len(raw) - 1) + 1 + 2 * len(metadata)


def _metadata(value: object, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FormatError(
            f"{path}: {_METADATA} is a {type(value).__name__} (expected an object). {FETCH}"
        )
    for key, text in value.items():
        if not isinstance(text, str):
            raise FormatError(
                f"{path}: {_METADATA} has {quote_name(key)} = {quote_name(repr(text))}, expected "
                "a string. " + FETCH
            )
    return value


def _entry(name: str, value: object, data_start: int, path: str) -> HeaderEntry:
    """Parse and validate the entry of one tensor."""
    if not isinstance(value, dict) or value.keys() != _KEYS:
        _refuse(path, name, f"must have exactly the keys {', '.join(sorted(_KEYS))}")
    dims, offsets = value["shape"], value["data_offsets"]
    kind = BY_NAME.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if kind is None:
        _refuse(path, name, f"has the unknown dtype {quote_name(repr(value['dtype']))}")
    if not isinstance(dims, list) or len(dims) > _MAX_DIMS:
        _refuse(path, name, f"must have a shape, a list of at most {_MAX_DIMS} dims")
    size = 1
    for dim in dims:
        if type(dim) is not int or not 0 <= dim < _LIMIT:  # isinstance would accept a bool
            _refuse(
                path, name, f"has shape {quote_name(repr(dims))} (expected dims of 0 to 2**64 - 1)"
            )
        size *= dim
        if size >= _LIMIT:  # checked at every step to bound the product
            _refuse(path, name, f"has shape {quote_name(repr(dims))} of 2**64 elements or more")
    if not isinstance(offsets, list) or [type(o) for o in offsets] != _TWO_INTS:
        _refuse(path, name, "must have two integers as data_offsets")
    start, stop = offsets
    if not 0 <= start <= stop < _LIMIT or (stop - start) * 8 != size * kind.bits:
        _refuse(
            path,
            name,
            f"has bytes {start} to {stop} of the data, but {kind} of shape "
            f"{quote_name(repr(dims))} takes {size * kind.bits / 8:.12g}",
        )
    return HeaderEntry(name, kind, tuple(dims), data_start + start, data_start + stop)


def _refuse(path: str, name: str, what: str) -> NoReturn:
    raise FormatError(f"{path}: tensor {quote_name(name)} {what}. {FETCH}")


def _check_cover(entries: list[HeaderEntry], data_start: int, file_bytes: int, path: str) -> None:
    """Raise FormatError unless the tensors cover the data without overlaps or holes."""
    at, before = data_start, "the header"
    for name, _, _, start, stop in entries:
        if start < at:
            _refuse(path, name, f"starts at byte {start} of the file, inside {before}")
        if start > at:
            _refuse(
                path, name, f"starts at byte {start} of the file, {start - at} after {before} ends"
            )
        at, before = stop, name
    if at > file_bytes:
        raise FormatError(
            f"{path} is truncated: it has {file_bytes} bytes (expected {at}). {FETCH}"
        )
    if at < file_bytes:
        raise FormatError(
            f"{path} has {file_bytes} bytes (expected {at}, the end of the last tensor). {FETCH}"
        )


class _TensorForm(NamedTuple):
    """Common properties of all tensors of one dtype and shape.

    Attributes:
        num_bytes: the size of each tensor.
        rank: tensors of a smaller rank come first in a file.
        text: the start of the JSON object of a tensor, up to its offsets.
    """

    num_bytes: int
    rank: int
    text: str


def _tensor_form(name: str, kind: DType, shape: tuple[int, ...]) -> _TensorForm:
    size = _writable_bytes(name, kind, shape)
    rank = -_element_alignment(kind) if size % ALIGNMENT else -ALIGNMENT
    return _TensorForm(size, rank, f'{{"dtype":{_quoted(kind.name)},"shape":{_dumped(shape)}')


def _ordered(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]],
) -> list[tuple[str, _TensorForm]]:
    """Return the names of ``entries`` in file order, with their forms."""
    forms: dict[tuple[str, tuple[int, ...]], _TensorForm] = {}  # thousands of tensors share one
    found = []
    for name, kind, shape in entries:
        form = forms.get((kind.name, shape))
        if form is None:
            form = forms[kind.name, shape] = _tensor_form(name, kind, shape)
        found.append((name, form))
    seen: set[str] = set()
    for name, _ in found:
        if name in seen or name == _METADATA:
            raise LayoutError(
                f"a file cannot hold {'two tensors' if name in seen else 'a tensor'} called "
                f"{quote_name(name)}. Rename it."
            )
        seen.add(name)
    found.sort(key=_rank)  # stable: equal ranks keep the given order
    return found


def _rank(item: tuple[str, _TensorForm]) -> int:
    return item[1].rank


def _element_alignment(kind: DType) -> int:
    return kind.unit_bytes & -kind.unit_bytes  # its power of two: 1 for the 3-byte units of F6


def _writable_bytes(name: str, kind: DType, shape: tuple[int, ...]) -> int:
    try:
        return num_bytes(shape, kind)
    except FormatError as error:
        raise LayoutError(f"{quote_name(name)}: {error} Leave it whole, or cast it.") from None


def _writable_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise LayoutError(f"metadata {key!r} = {value!r} is not text. Convert it with str().")
    return dict(sorted(metadata.items()))


def _header(members: Sequence[str]) -> bytes:
    """Return the length and padded JSON of a header with ``members``."""
    try:
        text = f"{{{','.join(members)}}}".encode()
    except UnicodeEncodeError:
        raise LayoutError(
            "a name or metadata value is not Unicode text (lone surrogate)."
        ) from None
    padded = len(text) + -(8 + len(text)) % ALIGNMENT
    if padded > MAX_HEADER_BYTES:
        raise LayoutError(
            f"a file of {len(members)} tensors needs a header of {padded} bytes (expected at most "
            f"{MAX_HEADER_BYTES}). Use more files: a complete checkpoint with a smaller "
            "max_shard_size= (--max-shard-size), or more ranks."
        )
    return padded.to_bytes(8, "little") + text.ljust(padded)
