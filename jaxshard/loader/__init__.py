"""Loading a checkpoint to arrays on devices.

    target            →  requests  →  filled buffers      →  arrays
    target_shardings     requests     read, memory_budget     make_arrays

Each process reads the bytes of its own devices' distinct shards, once. All checks that need only
headers come before the first read of a tensor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import jax

from ..conversion.open import Config, PathLike, opened
from ..conversion.select import refuse_lost, select, takes_whole, texts
from ..core.catalog import Catalog, log_done, log_notes
from ..devices.host_memory import BufferPool, Pin, pin_for
from ..distributed.processes import DEFAULT_TIMEOUT_S, Processes, processes_of_jax
from ..errors import CoverageError, LayoutError, NotFoundError, format_list
from ..formats.huggingface import CHECKSUMS
from ..formats.rank_names import rank_of_folder
from ..formats.registry import format_of
from ..mapping import Mapping, find_mapping
from ..rules import LogicalAxisRules, Rules, Unmatched, with_axis_rules
from ..storage.identity import check_same, identity
from ..storage.io import Source
from ..storage.readers import open_source
from ..storage.remote import downloaded, is_fetched, is_remote
from ..storage.resources import Counts, default_workers, parse_size
from .make_arrays import check_dtypes, load_small, restore, restored_by_orbax, small_of
from .memory_budget import (
    check_memory,
    need_of,
    share_out,
)
from .read import carry, gathered, kept_bytes, spread
from .requests import (
    ArrayRequest,
    Devices,
    LoadArguments,
    LoadRequest,
    TensorRequest,
    files_of,
    requests_of,
)
from .target_shardings import asked_dtype, asked_shapes, of_shardings, resolve, sharers

__all__ = ["load", "load_opened"]


def load(
    source: Catalog | PathLike,
    target: Any,
    *,
    devices: Devices = None,
    rules: Rules | None = None,
    logical_axis_rules: LogicalAxisRules | None = None,
    unmatched: Unmatched = "error",
    dtype: Any = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    host_bytes: int | str | None = None,
    strict: bool = True,
    name_of: Callable[[str], str] | None = None,
    names: Mapping | str | None = None,
    mmap: bool = False,
    copy: bool = False,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    config: Config | None = None,
    workers: int | None = None,
    balanced: bool | None = None,
    verify: bool = False,
    stream: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    counted: Callable[[Counts], None] | None = None,
) -> Any:
    """Load a checkpoint as ``{name: jax.Array}``, or as the tree that is the target.

    Arrays can be donated, and do not depend on the files (but see ``mmap``). On CPU devices
    they alias the buffers that were read, which replicas share (but see ``copy``). Small adjacent
    tensors are copied, so that no array keeps the buffer of thousands alive.

    Args:
        source: a checkpoint, or its path.
        target: the sharding of each tensor. A strategy (``"dp2mp4"``), a ``Layout``, strategy
            files, or a ``Mesh``: by the rules of the model's family. ``"same"``: that of the
            source's ranks. A ``Sharding`` or a device: the same for all tensors. A function of
            the name. Or a tree whose leaves are shardings, ``PartitionSpec``s, or arrays and
            ``jax.ShapeDtypeStruct``s with a sharding: the result is that tree, and the name of a
            leaf is its path joined by dots; other leaves are returned unchanged. Random keys are
            loaded as keys if the tree has keys, otherwise as their data.
        devices: the devices of the ranks, in order; or the mesh of the specs.
        rules: layout rules that take precedence over those of the family.
        logical_axis_rules: which mesh axes split each logical axis, as in Flax and MaxText:
            ``(("embed", "fsdp"), ("heads", ("tensor",)), ("mlp", None))``, for a mesh or a strategy
            as target. The first rule for an axis whose mesh axes are free in a tensor is used. The
            logical axes of a model are those of its table (``jaxshard models``).
        unmatched: names without a rule are an error, or ``"replicate"``, or ``"largest"``: split by
            their shapes.
        dtype: the dtype of floating-point tensors of 16 to 64 bits; others keep their dtype.
        include: regular expressions; load only the names in which one matches.
        exclude: regular expressions; do not load the names in which one matches.
        host_bytes: maximum host memory in flight, without the arrays on CPU devices. The default
            is 256 MiB, and for other devices at least two tensors.
        strict: refuse a tree with leaves that the checkpoint lacks, or without tensors that it
            has. Otherwise leaves without a tensor are returned unchanged.
        name_of: returns the tensor's name for a leaf's path. Two leaves may have one name (tied
            weights): the tensor is read once, and each leaf gets an array.
        names: a mapping to other names and shapes, or an argument of ``mapping.find_mapping``.
            Only the needed parts of fused, stacked and transposed tensors are read.
        mmap: alias tensors in memory-mapped files if they are aligned, as in files written by
            jaxshard. No process may change these files in place while the arrays live: the
            arrays change as well, and truncating a file kills the process.
        copy: copy arrays on CPU devices to memory that XLA allocates, each replica to its own.
            XLA writes in place only to such memory: with other arrays, the first step that
            they are donated to needs memory for the arrays twice. Slower by one copy.
        src_strategy: the strategy files of a source of rank files.
        suffix: selects one of several files per rank.
        config: the model's ``config.json``, or its path, for a checkpoint without one.
        workers: threads; by default one per core, at most 8.
        balanced: each byte is read by one process only, and common shards are sent from device
            to device. All processes must call this with the same arguments. The default is True for
            remote files whose target has devices of several processes, otherwise False.
        verify: first compare all files that are read with their checksums: those in
            ``checksums.json`` (written by ``save(checksums=True)``, ``convert`` …), in ``.ckpt``
            files, or Orbax's. Files without a checksum are refused.
        stream: read a repository of the Hub by ranges, and write nothing to its local cache.
            Otherwise the files that are read are downloaded to the cache first.
        timeout_s: how long the processes with devices of the target wait for each other to open
            the source, which must be the same for all. With ``balanced``, also how long they wait
            for each other to read it.
        counted: called with the read statistics.

    Raises:
        NotFoundError: the checkpoint does not exist, or names are missing on either side.
        FormatError: a file is invalid, damaged, or changed during the load.
        CoverageError: the source lacks part of a tensor, or weights of its strategy files; or
            processes opened different checkpoints.
        LayoutError: the target does not fit the tensors, the devices or the memory.
        StorageError: the disk fails, or another process failed or did not arrive in time.
    """
    if mmap and copy:
        raise LayoutError(
            "mmap=True aliases the files, and copy=True copies the tensors. Pass only one."
        )
    began = time.monotonic()
    everyone = Processes() if jax.process_count() == 1 else processes_of_jax(timeout_s)
    together = everyone
    if everyone.are_several and not balanced:
        together = everyone.of(sharers(target, devices))
    if balanced is None:
        place = source.root if isinstance(source, Catalog) else source
        balanced = together.are_several and is_fetched(place, stream=stream)
    may_differ = everyone.are_several and not balanced
    catalog = _opened_alike(source, src_strategy, suffix, config, together)

    def compare(wants: Sequence[ArrayRequest]) -> None:
        if may_differ and not together.are_several:
            known = everyone.of(of_shardings(want.sharding for want in wants))
            _check_same(
                catalog, known
            )  # the participants of a function of the name are known only now

    options = LoadArguments(
        devices=devices,
        rules=with_axis_rules(rules, logical_axis_rules),
        unmatched=unmatched,
        dtype=dtype,
        include=texts(include),
        exclude=texts(exclude),
        host_bytes=None if host_bytes is None else parse_size(host_bytes, "host_bytes"),
        workers=default_workers() if workers is None else workers,
        strict=strict,
        name_of=name_of,
        names=names,
        mmap=mmap,
        copy=copy,
        verify=verify,
        stream=stream,
    )
    arrays, counts = load_opened(
        catalog, target, options, balanced=together if balanced else None, decided=compare
    )
    if counted is not None:
        counted(counts)
    log_done("load", catalog.root, counts.bytes_read, time.monotonic() - began)
    return arrays


def _opened_alike(
    source: Catalog | PathLike,
    src_strategy: PathLike | None,
    suffix: str | None,
    config: Config | None,
    processes: Processes,
) -> Catalog:
    """Open ``source`` in all ``processes``, and check that they see one checkpoint."""
    processes = processes.about(str(getattr(source, "root", source)))
    with processes.together("loading: opening") as meeting:
        catalog = opened(source, src_strategy=src_strategy, suffix=suffix, config=config)
        if processes.are_several:
            meeting.sent = identity(catalog)
    if processes.are_several:
        check_same(meeting.received, catalog.root, processes.members)
    return catalog


def _check_same(catalog: Catalog, processes: Processes) -> None:
    if processes.are_several:
        meeting = processes.about(catalog.root)
        identities = meeting.all_gather("loading: which checkpoint", identity(catalog))
        check_same(identities, catalog.root, processes.members)


def load_opened(
    catalog: Catalog,
    target: Any,
    options: LoadArguments,
    *,
    balanced: Processes | None = None,
    decided: Callable[[Sequence[ArrayRequest]], None] = lambda wants: None,
) -> tuple[Any, Counts]:
    """Load an open checkpoint, which is not compared with those of other processes.

    Args:
        catalog: the checkpoint.
        target: as for ``load``.
        options: as for ``load``.
        balanced: the processes that divide the reading; None if this one reads all it needs.
        decided: called with the requests before any I/O.

    Returns:
        The arrays, and the read statistics.

    Raises:
        JaxshardError: as ``load``.
    """
    processes = (balanced or Processes()).about(catalog.root)
    with processes.together("loading"):
        wanted = _requests(catalog, target, options, is_shared=balanced is not None)
        decided(wanted.wants)
        log_notes(catalog.root, wanted.notes, catalog.logged)
        by_orbax = restored_by_orbax(catalog, wanted.wants) and not options.copy
        if by_orbax:
            arrays, counts = restore(catalog, wanted.wants, options.host_bytes)
        else:
            fetched = is_fetched(catalog.root, stream=options.stream)
            first = list(wanted.wants)
            if balanced is not None:
                first = spread(first, fetched=fetched)
            extra = kept_bytes(first, wanted.wants)
            if not fetched:
                catalog = downloaded(catalog, files_of(r for r, _ in requests_of(first)))
            with _explaining_lost_ranks(catalog):
                arrays, counts = _read(catalog, first, options, extra)
    if balanced is not None and not by_orbax:
        arrays = gathered(arrays, wanted.wants)
    return wanted.build(arrays), counts


def _requests(
    catalog: Catalog, target: Any, options: LoadArguments, *, is_shared: bool
) -> LoadRequest:
    """Select and map the tensors, and resolve their target, with all notes."""
    tensors, notes = select(catalog, options.include, options.exclude, may_lack=not options.strict)
    if is_shared:  # other processes cannot read tensors that only this target names
        refuse_lost(catalog, options.takes)
    chosen = replace(catalog, tensors={t.name: t for t in tensors})
    if options.names is not None:
        dtype = asked_dtype(target, options.dtype)
        wanted_shapes = asked_shapes(target)
        mapping = find_mapping(options.names, chosen, dtype, wanted_shapes)
        chosen = mapping.apply(chosen)
    is_whole = takes_whole(catalog, options.include, options.exclude)
    wanted = resolve(chosen, target, options, is_whole=is_whole)
    return replace(wanted, notes=(*chosen.notes, *notes, *wanted.notes))


def _read(
    catalog: Catalog, wants: Sequence[ArrayRequest], options: LoadArguments, extra_bytes: int
) -> tuple[list[jax.Array], Counts]:
    """Read the arrays of ``wants``; ``extra_bytes`` of host memory are needed afterwards."""
    small, rest = small_of(wants, mmap=options.mmap, fetched=is_remote(catalog.root))
    found = requests_of([wants[place] for place in rest])
    todo = [request for request, _ in found]
    need = need_of(todo, extra_bytes + small.num_bytes, adopted=not options.copy)
    budget, in_flight = share_out(need, options.host_bytes, options.workers)
    check_memory(need, budget.host_bytes, in_flight or 0)
    check_dtypes(todo, small.samples())
    files = open_source(catalog, mapped=options.mmap)
    try:
        _check_sums(catalog, files, chain(files_of(todo), small.files()), options)
        staging = BufferPool(in_flight or 0, _pin_for(todo))
        arrays: dict[int, jax.Array] = {}
        counts = load_small(small, files, arrays, workers=budget.workers)
        made, more = carry(todo, files, budget=budget, staging=staging, adopted=not options.copy)
        files.check_unchanged()
    finally:
        files.close()
    places = [rest[number] for _, numbers in found for number in numbers]
    arrays |= zip(places, chain.from_iterable(made), strict=True)
    return [arrays[place] for place in range(len(wants))], counts + more


def _check_sums(
    catalog: Catalog, files: Source, used: Iterable[int], options: LoadArguments
) -> None:
    """Compare the files numbered ``used`` with their checksums, each file once.

    Raises:
        FormatError: a file is damaged.
        LayoutError: ``verify`` is set, and the files are remote.
        NotFoundError: ``verify`` is set, and a file has no checksum.
    """
    if not options.verify or format_of(catalog.format).own_library:
        files.check_checksums(used)
        return
    if is_remote(catalog.root):
        raise LayoutError(
            f"{catalog.root}: verify=True reads whole files. Copy the checkpoint to a disk "
            "first, or leave verify out."
        )
    from ..storage.checksums import check_folder  # noqa: PLC0415 - on request only

    paths = {number: catalog.files[number].path for number in sorted(set(used))}
    has_file = check_folder(catalog.root, paths.values(), workers=options.workers)
    # checksums.json covers the files below the checkpoint's folder, their own checksums included
    rest = [number for number, path in paths.items() if not has_file or os.path.isabs(path)]
    without = files.check_checksums(rest)
    lacking = [path for path in paths.values() if path in without]
    if lacking and not has_file:
        raise NotFoundError(
            f"verify=True: {catalog.root} has no {CHECKSUMS}, and {len(lacking)} of its files have "
            f"no checksum of their own ({format_list(lacking, 3)}). Leave verify out, or write the "
            "checkpoint with checksums=True (--checksums)."
        )


def _pin_for(todo: Sequence[TensorRequest]) -> Pin | None:
    """Return the function that pins transfer buffers for the devices of ``todo``."""
    devices = (device for request in todo for use in request.uses for device, _ in use[:1])
    return next((pin for device in devices if (pin := pin_for(device))), None)


@contextmanager
def _explaining_lost_ranks(catalog: Catalog) -> Iterator[None]:
    """Explain a missing tensor by ranks whose files are on other hosts."""
    try:
        yield
    except CoverageError as error:
        ranks = (rank_of_folder(f.path) for f in catalog.files)
        have = {rank for rank in ranks if rank is not None}
        if catalog.layout is None or not have or len(have) == catalog.layout.num_ranks:
            raise
        raise CoverageError(
            f"{error} Of {catalog.layout.num_ranks} ranks, {catalog.root} has {len(have)}: "
            f"{format_list(map(str, sorted(have)))}. If hosts share no disk, each process loads "
            "its own save onto the same devices; for another layout, copy the other ranks' folders "
            "here."
        ) from None
