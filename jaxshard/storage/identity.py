"""Identity of an opened checkpoint, compared between processes.

Hosts may have their own copies at one path, and a copy may be of another step. Names, shapes and
sizes are the same then, so a few bytes of the files are compared too, a fixed number for any size.
Times differ between copies and are not compared.

    whole     tensors: names, dtypes, shapes      contents: paths, sizes, samples of all files
    a part    what one server has of a job's ranks: each file by itself, to be compared with the
              same file of another server

Two checkpoints that differ only between the samples are taken for one.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from ..core.box import Box
from ..core.catalog import Catalog, File, StoredShard
from ..errors import CoverageError, format_list
from ..formats import rank_folder, rank_names
from ..formats.folder import ORBAX_FILES
from ..formats.huggingface import CHECKSUMS
from ..formats.registry import format_of
from .local import LocalFolder
from .readers import SourceFiles
from .remote import is_remote

_T = TypeVar("_T")

_SAMPLE_BYTES = 512
_SAMPLES = 128  # 64 KiB in all
_PARTS = 16  # files that are compared one by one: their digests must stay short
_CHARACTERS = 16
_MAX_CHECKSUMS_BYTES = 4 << 20  # those of a terabyte or so
_NO_BOX = Box.whole(())

_WHAT = {
    "save": "are of {} different saves",
    "step": "have files of {} different steps",
    "tensors": "hold tensors of {} different lists of names, dtypes and shapes",
    "contents": "hold {} different contents",
    "checksums": "have {} different files of checksums",
}


def identity(catalog: Catalog) -> str:
    """Return the identity of ``catalog``, for ``check_same``.

    Raises:
        FormatError, StorageError: a file is damaged, changed or cannot be read.
    """
    if is_remote(catalog.root):  # the listing has a version of each file
        versions = "\n".join(sorted(map(repr, catalog.files)))
        return json.dumps({"tensors": _tensors(catalog), "contents": _short(versions.encode())})
    found: dict[str, Any] = {"save": _save_of(catalog), "checksums": _checksums(catalog)}
    if format_of(catalog.format).own_library:
        found |= {"tensors": _tensors(catalog), "contents": _orbax(catalog)}
    elif _is_part(catalog):
        files = sorted(catalog.files, key=lambda file: _short(file.path.encode()))[:_PARTS]
        samples = {**_samples(catalog, files), **_metadata(catalog)}
        found["parts"] = {_short(path.encode()): _short(data) for path, data in samples.items()}
        found["step"] = _step(catalog)
    else:
        files = sorted(catalog.files, key=_path)  # folders list them in any order
        digest = hashlib.sha256(repr([(_path(f), f.num_bytes) for f in files]).encode())
        for path, data in _samples(catalog, _spread(files, _SAMPLES // 2)).items():
            digest.update(path.encode() + data)
        found |= {"tensors": _tensors(catalog), "contents": digest.hexdigest()[:_CHARACTERS]}
    return json.dumps(found)


def check_same(identities: Sequence[str], root: str, members: Sequence[int]) -> None:
    """Check that all processes opened the same checkpoint.

    Args:
        identities: the result of ``identity`` in each process.
        root: what this process opened.
        members: the processes' numbers.

    Raises:
        CoverageError: they differ.
    """
    found = [json.loads(text) for text in identities]
    for field, what in _WHAT.items():
        _check(field, what, [one.get(field) for one in found], root, members)
    for part in sorted({part for one in found for part in one.get("parts", ())}):
        values = [one.get("parts", {}).get(part) for one in found]
        _check("contents", _WHAT["contents"], values, root, members)


def _check(
    field: str, what: str, values: Sequence[object], root: str, members: Sequence[int]
) -> None:
    groups: dict[str, list[int]] = {}
    for process, value in zip(members, values, strict=True):
        if value is not None:
            groups.setdefault(repr(value), []).append(process)
    if len(groups) < 2:
        return
    who = "; ".join(f"processes {format_list(map(str, group), 4)}" for group in groups.values())
    remedy = "Copy one checkpoint to all hosts, or give a path where all see the same."
    if field == "save":
        remedy = (
            "A save was cut short while they published. Load an earlier save that all of them "
            "have, or save again."
        )
    raise CoverageError(f"{root}: the hosts' folders {what.format(len(groups))}: {who}. {remedy}")


def _save_of(catalog: Catalog) -> str:
    """Return the save that a host's own folder belongs to; empty for other folders.

    Raises:
        FormatError: the file with its token is damaged.
    """
    if catalog.layout is None or not format_of(catalog.format).on_own_disks:
        return ""
    folder = LocalFolder(catalog.root)
    try:
        return rank_folder.save_of(folder)
    finally:
        folder.close()


def _checksums(catalog: Catalog) -> str | None:
    """What the file of checksums is, where there is one: it is about every byte."""
    folder = LocalFolder(catalog.root)
    try:
        file = folder.files().get(CHECKSUMS)
        if file is None or file.num_bytes > _MAX_CHECKSUMS_BYTES or _is_part(catalog):
            return None
        return _short(folder.read(CHECKSUMS, 0, file.num_bytes))
    finally:
        folder.close()


def _is_part(catalog: Catalog) -> bool:
    """Whether other servers may have files of this checkpoint that are not here."""
    return catalog.layout is not None and len(_of_ranks(catalog)) < catalog.layout.num_ranks


def _of_ranks(catalog: Catalog) -> list[str]:
    return [file.path for file in catalog.files if rank_names.is_rank_file(file.path)]


def _step(catalog: Catalog) -> object:
    """Return the step of the rank files; None if they are too few to distinguish it."""
    paths = _of_ranks(catalog)
    with suppress(CoverageError):
        return repr(rank_names.choose(paths).step) if len(paths) > 1 else None
    return None


def _metadata(catalog: Catalog) -> dict[str, bytes]:
    """The beginning and the end of the file that describes the tensors, if there is one."""
    path = format_of(catalog.format).metadata_file
    if not path:
        return {}
    folder = LocalFolder(catalog.root)
    try:
        size = folder.files()[path].num_bytes
        ends = [(0, min(size, _SAMPLE_BYTES)), (max(0, size - _SAMPLE_BYTES), _SAMPLE_BYTES)]
        read = [folder.read(path, start, min(n, size - start)) for start, n in ends]
    finally:
        folder.close()
    return {path: b"".join((str(size).encode(), *read))}


def _tensors(catalog: Catalog) -> str:
    digest = hashlib.sha256()
    for name in sorted(catalog.tensors):
        tensor = catalog.tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    viewed = [t for t in catalog.tensors.values() if any(p.view for p in t.shards)]
    for tensor in _spread(viewed, _SAMPLES):  # for example how an adapter is merged
        digest.update(repr([p.view for p in tensor.shards[:1]]).encode())
    return digest.hexdigest()[:_CHARACTERS]


def _orbax(catalog: Catalog) -> str:
    """Return a digest of an Orbax save, whose data files have unique names."""
    folder = LocalFolder(catalog.root)
    try:
        files = folder.files()
        own = sorted(path for path in files if "/" in path or path in ORBAX_FILES)
        digest = hashlib.sha256(repr([(p, files[p].num_bytes) for p in own]).encode())
        for path in sorted(ORBAX_FILES & files.keys()):
            digest.update(folder.read(path, 0, min(files[path].num_bytes, _SAMPLE_BYTES)))
    finally:
        folder.close()
    return digest.hexdigest()[:_CHARACTERS]


def _samples(catalog: Catalog, chosen: Sequence[File]) -> Mapping[str, bytes]:
    """Some bytes of each of the files ``chosen``, and their sizes."""
    numbers = {file.path: number for number, file in enumerate(catalog.files)}
    places = _places(catalog, {numbers[file.path] for file in chosen})
    each = max(2, _SAMPLES // max(1, len(chosen)))
    files, found = SourceFiles(catalog), {}
    try:
        for file in chosen:
            digest = hashlib.sha256(str(file.num_bytes).encode())
            for offset in _offsets(file, places[numbers[file.path]], each):
                data = bytearray(min(_SAMPLE_BYTES, file.num_bytes - offset))
                files.read(
                    StoredShard(numbers[file.path], offset, _NO_BOX), offset, memoryview(data)
                )
                digest.update(data)
            found[_path(file)] = digest.digest()
    finally:
        files.close()
    return found


def _path(file: File) -> str:
    """The path within a checkpoint; only the name of a file that lies elsewhere on each host."""
    return posixpath.basename(file.path) if posixpath.isabs(file.path) else file.path


def _places(catalog: Catalog, numbers: set[int]) -> dict[int, list[int]]:
    """The middle of each tensor in the files ``numbers``."""
    found: dict[int, list[int]] = {number: [] for number in numbers}
    for tensor in catalog.tensors.values():
        for piece in tensor.shards:
            if piece.file in found and piece.view is None:
                num_bytes = piece.box.size * tensor.dtype.bits // 8
                found[piece.file].append(piece.offset + num_bytes // 2)
    return found


def _offsets(file: File, middles: Sequence[int], most: int) -> Iterator[int]:
    """Where to look into ``file``: into tensors of any size alike, evenly, and at its end."""
    last = max(0, file.num_bytes - _SAMPLE_BYTES)
    tensors = _spread(sorted(middles), most // 2)
    even = [last * i // most for i in range(most - len(tensors) - 1)]
    yield from sorted({min(offset, last) for offset in (*tensors, *even, last)})


def _spread(items: Sequence[_T], most: int) -> Sequence[_T]:
    """At most so many of ``items``, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // max(1, most - 1)] for i in range(most)]


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_CHARACTERS]
