"""Loading through Orbax's library, which makes the arrays itself."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from ..core.catalog import Catalog
from ..formats.registry import Orbax, format_of
from ..storage.local import FolderVersions
from ..storage.resources import Counts, default_budget
from .memory_budget import check_dtypes, check_memory, need_of
from .requests import Want, jobs


def restored_by_orbax(catalog: Catalog, wants: Sequence[Want]) -> bool:
    """Whether Orbax can make every array: each is a tensor as stored, and wanted once."""
    names = [want.tensor.name for want in wants]
    return (
        isinstance(format_of(catalog.format), Orbax)
        and len(set(names)) == len(names)
        and all(catalog.tensors.get(want.tensor.name) is want.tensor for want in wants)
    )


def restore(
    catalog: Catalog, wants: Sequence[Want], host_bytes: int | None
) -> tuple[list[jax.Array], Counts]:
    """The arrays of ``wants``, in their order, and what was read.

    Orbax does not tell how many bytes of its files that took; they are counted as those of
    the distinct shards, and a request for each tensor.

    Raises:
        LayoutError: there is not the memory, or a device lacks a dtype.
        FormatError: Orbax cannot read them.
    """
    from ..formats import orbax  # noqa: PLC0415 - a second to import, and rarely needed

    todo = [job for job, _ in jobs(wants)]
    group_bytes = default_budget() if host_bytes is None else host_bytes
    largest = max((job.tensor.num_bytes for job in todo), default=0)
    check_memory(need_of(todo), max(group_bytes, largest))
    check_dtypes(todo)
    versions = FolderVersions(catalog.root)
    found = orbax.load(catalog, {w.tensor.name: (w.dtype, w.sharding) for w in wants}, group_bytes)
    versions.check()
    num_bytes = sum(
        job.tensor.dtype.bits * shard.box.size // 8 for job in todo for shard in job.shards
    )
    counts = Counts(bytes_needed=num_bytes, bytes_read=num_bytes, num_reads=len(todo))
    return [found[want.tensor.name] for want in wants], counts
