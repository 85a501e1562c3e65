"""Sources: how the bytes of a load are got at, decided before the first is read.

pread   bytes are copied from the page cache to where they are wanted
mmap    they are looked at where they are, and shards that lie ready in a file are used
        there; only files that nobody changes in place may be used so
"""

from __future__ import annotations

import os

import jax

from ..catalog import Catalog
from ..errors import LayoutError
from ..ranges import byte_runs
from ..storage.mapping import MappedFiles
from ..storage.reading import SourceFiles
from ..storage.sources import OpenSource
from .carrying import Source
from .memory import Bytes, is_aligned
from .placing import adopts
from .wanted import Job

IO_VARIABLE = "JAXSHARD_IO"


def file_source(catalog: Catalog, files: OpenSource, *, mmap: bool) -> Source:
    """The source that reads ``files``, the open files of ``catalog``.

    Raises:
        LayoutError: the environment asks for a way of reading that there is not.
    """
    asked = os.environ.get(IO_VARIABLE, "pread")
    if asked not in ("pread", "mmap"):
        raise LayoutError(f"{IO_VARIABLE}={asked!r}: set it to pread or mmap, or not at all.")
    disk = files if isinstance(files, SourceFiles) else None
    if disk is None:
        return Source(files.read, rows=files.read_rows)
    if not mmap and asked == "pread":
        return Source(files.read, rows=files.read_rows, scatter=disk.read_places, disk=disk)
    mapped = MappedFiles(catalog, disk.opened)
    if not mmap:
        return Source(files.read, mapped.lend, disk=disk)
    return Source(
        files.read,
        mapped.lend,  # a column alone; what several shards share is quicker scattered
        scatter=disk.read_places,
        disk=disk,
        given=lambda job: in_place(job, mapped),
    )


def in_place(job: Job, mapped: MappedFiles) -> dict[int, Bytes]:
    """The shards of ``job`` that lie in a file as the CPU backend would have them in memory."""
    devices: dict[int, list[jax.Device]] = {number: [] for number in range(len(job.shards))}
    for use in job.uses:
        for device, number in use:
            devices[number].append(device)
    found = {}
    for number, shard in enumerate(job.shards):
        if shard.conversion.is_copy and shard.box.size and adopts(devices[number]):
            memory = _stored(job, number, mapped)
            if memory is not None and is_aligned(memory):
                found[number] = memory
    return found


def _stored(job: Job, number: int, mapped: MappedFiles) -> Bytes | None:
    """The shard's bytes in a file, if they are one run of one piece."""
    shard, tensor = job.shards[number], job.tensor
    if tensor.factors is not None:
        return None
    for piece in tensor.pieces:
        if piece.view is None and piece.box.contains(shard.box):
            runs = byte_runs(
                shard.box.within(piece.box),
                piece.box.shape,
                tensor.dtype.unit_bytes,
                piece.offset,
            )
            if not runs.outer:
                memory = mapped.part(piece.file, runs.offset, runs.length)
                return memory if memory.size == runs.length else None
    return None
