"""The safetensors file: a length, a JSON header, then every tensor's bytes.

    | 8 bytes: n | n bytes of JSON, space-padded | tensor | tensor | … |
                                                 ^ data_start; ours is a multiple of 64

Reading takes only the header and believes nothing in it. Writing only lays the file
out: whoever moves bytes puts each tensor at the offset given here. This module knows
nothing of models or of which files belong together.
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
ALIGNMENT = 64  # a cache line, and what JAX asks of memory that it uses in place

_METADATA = "__metadata__"
_MAX_DIMS = 64  # NumPy's
_LIMIT = 2**64  # the format's integers are unsigned and 64 bits wide
_KEYS = {"dtype", "shape", "data_offsets"}  # one more might change what the bytes mean
_TWO_INTS = [int, int]
_quoted = _dumped = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class HeaderEntry(NamedTuple):  # a tuple, because headers have 100,000 of them
    """One tensor of a file: ``start`` and ``stop`` are byte offsets in the file."""

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
    """What a file says of itself; ``entries`` are in the order of their bytes."""

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
        starts = self.chunks.get(name)
        if starts is None:
            return ((self.offsets[name] + offset, length),)
        out = list[tuple[int, int]]()
        while length:
            number, into = divmod(offset, self.chunk_bytes)
            part = min(length, self.chunk_bytes - into)
            out.append((starts[number] + into, part))
            offset, length = offset + part, length - part
        return tuple(out)


def read_header(folder: Folder, path: str, *, file_bytes: int | None = None) -> Header:
    """The header of the safetensors file at ``path``, checked against the file's size.

    Every byte after the header belongs to exactly one tensor, or the file is refused.

    Args:
        folder: where the file lies.
        path: the file, relative to ``folder``.
        file_bytes: the file's size, where the caller has listed the folder already.

    Raises:
        FormatError: the file is not what it claims to be.
        NotFoundError: there is no such file.
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
    """Whether ``text`` stands anywhere in the header of the file at ``path``; nothing is parsed.

    Raises:
        FormatError: the file is not what it claims to be.
        NotFoundError: there is no such file.
    """
    listed = folder.files().get(path)
    if listed is None:
        raise NotFoundError(f"{folder.root} has no file {quote_name(path)}.")
    return text in folder.read(path, 8, _header_bytes(folder, path, listed.num_bytes))


def layout_file(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> FileLayout:
    """The file that holds ``entries``: its header, and where each tensor goes.

    The data starts on a 64-byte boundary. Tensors whose size is a multiple of 64 bytes come
    first, in the order given, so that each of them lies on such a boundary too and can be
    used in place; the others follow, widest elements first, so that every tensor is aligned
    to its elements. The header lists tensors in the order of their bytes, without holes:
    some readers demand it.

    Raises:
        LayoutError: a name stands twice, a tensor does not fill whole bytes, metadata is not
            text, or the header would be larger than the format allows.

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
    """The length of the JSON header, checked against the file and the format."""
    if file_bytes < 8:
        raise FormatError(
            f"{path} has {file_bytes} bytes; a safetensors file has 8 and more. {FETCH}"
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
            f"{path} claims a header of {length} bytes; the format allows {MAX_HEADER_BYTES}. "
            f"It is no safetensors file, or damaged. {FETCH}"
        )
    if length > file_bytes - 8:
        raise FormatError(
            f"{path} claims a header of {length} bytes, but only {file_bytes - 8} follow its "
            f"first 8: it is cut short. {FETCH}"
        )
    return length


def _num_texts(raw: dict[str, Any]) -> int:
    """Keys and texts of a header: each tensor has its name, three keys and a dtype."""
    metadata = raw.get(_METADATA)
    if not isinstance(metadata, dict):
        return 5 * len(raw)
    return 5 * (len(raw) - 1) + 1 + 2 * len(metadata)


def _metadata(value: object, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {_METADATA} is not an object. {FETCH}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise FormatError(
                f"{path}: {_METADATA} has {quote_name(key)} = {quote_name(repr(text))}, which is "
                "not text. " + FETCH
            )
    return value


def _entry(name: str, value: object, data_start: int, path: str) -> HeaderEntry:
    """The entry that ``value`` describes, consistent in itself."""
    if not isinstance(value, dict) or value.keys() != _KEYS:
        _refuse(path, name, f"has not exactly the keys {', '.join(sorted(_KEYS))}")
    dims, offsets = value["shape"], value["data_offsets"]
    kind = BY_NAME.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if kind is None:
        _refuse(path, name, f"has the dtype {quote_name(repr(value['dtype']))}, which is not known")
    if not isinstance(dims, list) or len(dims) > _MAX_DIMS:
        _refuse(path, name, f"has no shape that is a list of at most {_MAX_DIMS} dims")
    size = 1
    for dim in dims:
        if type(dim) is not int or not 0 <= dim < _LIMIT:  # a bool is an int to isinstance
            _refuse(path, name, f"has the shape {quote_name(repr(dims))}; dims are 0 to 2**64 - 1")
        size *= dim
        if size >= _LIMIT:  # checked at every step, so that no product grows without bound
            _refuse(path, name, f"has the shape {quote_name(repr(dims))}, 2**64 elements or more")
    if not isinstance(offsets, list) or [type(o) for o in offsets] != _TWO_INTS:
        _refuse(path, name, "has data_offsets that are not two integers")
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
    """Refuse tensors that overlap, leave holes, or do not end where the file ends."""
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
            f"{path} is cut short: its tensors need {at} bytes, and it has {file_bytes}. {FETCH}"
        )
    if at < file_bytes:
        raise FormatError(
            f"{path} has {file_bytes - at} bytes too many: its tensors end at byte {at} of "
            f"{file_bytes}. {FETCH}"
        )


class _Form(NamedTuple):
    """What tensors of one dtype and shape have in common.

    Attributes:
        num_bytes: how many each has.
        rank: those with a smaller one come first in a file.
        text: of the JSON object that describes one, what comes before its offsets.
    """

    num_bytes: int
    rank: int
    text: str


def _form(name: str, kind: DType, shape: tuple[int, ...]) -> _Form:
    size = _writable_bytes(name, kind, shape)
    rank = -_element_alignment(kind) if size % ALIGNMENT else -ALIGNMENT
    return _Form(size, rank, f'{{"dtype":{_quoted(kind.name)},"shape":{_dumped(shape)}')


def _ordered(entries: Iterable[tuple[str, DType, tuple[int, ...]]]) -> list[tuple[str, _Form]]:
    """The names of ``entries`` in the order in which the file holds them, and their forms."""
    forms: dict[tuple[str, tuple[int, ...]], _Form] = {}  # thousands of tensors share one
    found = []
    for name, kind, shape in entries:
        form = forms.get((kind.name, shape))
        if form is None:
            form = forms[kind.name, shape] = _form(name, kind, shape)
        found.append((name, form))
    seen: set[str] = set()
    for name, _ in found:
        if name in seen or name == _METADATA:
            raise LayoutError(
                f"a file cannot hold {'two tensors' if name in seen else 'a tensor'} called "
                f"{quote_name(name)}. Rename it."
            )
        seen.add(name)
    found.sort(key=_rank)  # stable: equals stay as given
    return found


def _rank(item: tuple[str, _Form]) -> int:
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
    """The first bytes of a file, whose JSON object has ``members``."""
    try:
        text = f"{{{','.join(members)}}}".encode()
    except UnicodeEncodeError:
        raise LayoutError("a name or metadata is not Unicode text (a lone surrogate).") from None
    padded = len(text) + -(8 + len(text)) % ALIGNMENT
    if padded > MAX_HEADER_BYTES:
        raise LayoutError(
            f"a file of {len(members)} tensors needs a header of {padded} bytes; the format "
            f"allows {MAX_HEADER_BYTES}. Spread the tensors over more files: choose a complete "
            "checkpoint with a smaller max_shard_size= (--max-shard-size), or more ranks."
        )
    return padded.to_bytes(8, "little") + text.ljust(padded)
