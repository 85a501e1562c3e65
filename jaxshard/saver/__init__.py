"""Saving arrays on devices to files, without gathering.

    arrays  →  a catalog of shards  →  the same plan as from files  →  writes at final offsets

File layouts follow from the shapes. Each distinct shard is written once, directly from host memory
where possible, and the result is published atomically.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..conversion import targets
from ..conversion.execute import Report
from ..conversion.open import PathLike, opened
from ..conversion.targets import (
    SAME,
    check_factors,
    check_request,
    lay_out_for,
    make_result,
    parse_target,
    step_of_numbers,
)
from ..core.catalog import Catalog, Model, log_done, log_notes
from ..core.layout import Layout, Strategy
from ..core.runtime import paused
from ..devices.host_shards import Array, HostShards, num_fetched
from ..devices.host_transfer import share_out
from ..devices.mesh import layout_of
from ..devices.pytree import is_array_like, named_leaves
from ..distributed.processes import DEFAULT_TIMEOUT_S, Processes, processes_of_jax
from ..errors import LayoutError, format_list
from ..formats import huggingface, rank_names
from ..formats.huggingface import check_config
from ..formats.output_files import Request, Result
from ..formats.registry import Format, find_format, names_where
from ..mapping import Mapping as NamesAndShapes
from ..mapping import find_mapping
from ..rules import Rules
from ..storage import writers as carrying
from ..storage.remote import is_remote
from ..storage.resources import Budget, Counts, default_budget, default_workers, parse_size
from ..storage.staging import real_place
from ..storage.writers import put_beside
from .publish import (
    Publication,
    check_across,
    check_alone,
    check_on_store,
    commit,
    commit_own,
    commit_shared,
    commit_upload,
    save_tree,
    write_files,
)


def save(
    tree: Any,
    path: PathLike,
    *,
    format: str = "huggingface",
    strategy: str | PathLike | Strategy | Layout | None = None,
    rules: Rules | None = None,
    max_shard_size: int | str | None = None,
    prefix: str = Request.prefix,
    step: str | None = None,
    remove_redundancy: bool = False,
    name_of: Callable[[str], str] | None = None,
    names: NamesAndShapes | str | None = None,
    config: Mapping[str, Any] | None = None,
    extras: Catalog | PathLike | None = None,
    metadata: Mapping[str, str] | None = None,
    host_bytes: int | str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    fsync: bool = True,
    checksums: bool = False,
    shared_filesystem: bool = True,
    single_process: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Report:
    """Write the arrays of ``tree`` as a checkpoint at ``path``; return a report.

    If JAX runs several processes, all of them call this with the same arguments. Each writes its
    own shards, and process 0 writes NumPy arrays; the result is published when all are done.

    Args:
        tree: a pytree of JAX or NumPy arrays with any sharding. The name of a tensor is its
            leaf's path joined by dots; leaves that are not arrays are left out.
        path: a folder, which is published atomically; or a URL of an object store, which one
            process writes.
        format: ``huggingface`` (safetensors, with an index if there are several files),
            ``ranks`` (one file per rank, and strategy files), ``ckpt`` (one file; with
            ``strategy`` one per rank), MindSpore's ``unified`` or ``iteration`` (Checkpoint 2.0),
            or ``orbax``.
        strategy: the layout of files by rank: a strategy, strategy files, a ``Layout``, or
            ``"same"``: that of the arrays, where rank r is the mesh's r-th device. ``"same"`` is
            the default of ``ranks`` and ``iteration``.
        rules: layout rules that take precedence over those of the family, for a strategy.
        max_shard_size: maximum tensor bytes per file, such as ``"5GB"``.
        prefix: rank files are named ``rank_{r}/{prefix}_rank_{r}-{epoch}_{step}.safetensors``.
        step: the epoch and step in these names, ``"1_10"``. The default is that of the arrays
            that are training scalars (``global_step``), or ``1_1``; ``"none"``: the prefix alone.
        remove_redundancy: store each shard on one rank only.
        name_of: returns the tensor's name for a leaf's path.
        names: a mapping to other names and shapes, or an argument of ``mapping.find_mapping``
            (``"llama-nnx-scan:llama-hf"``, with the model's numbers from ``config`` or
            ``extras``). Fused, stacked and transposed tensors are written from their shards.
        config: the contents of ``config.json``.
        extras: a checkpoint whose other files (config, tokenizer) are copied.
        metadata: text entries of the files' headers.
        host_bytes: maximum host memory in flight; by default 256 MiB.
        workers: threads; by default one per core, at most 8.
        overwrite: replace an existing checkpoint at ``path``.
        fsync: have every file on disk before the result is published.
        checksums: also write ``checksums.json``, for ``verify`` and ``load(verify=True)``; other
            readers ignore it.
        shared_filesystem: all processes see the same files at ``path``. Otherwise each writes the
            files of its own devices' ranks to its own disk, where ``load`` in the same process
            finds them; only for files by rank.
        single_process: only this process calls, and saves arrays that it holds completely.
        timeout_s: how long several processes wait for each other.

    Raises:
        LayoutError: an array or the target cannot be written in this format, or ``path`` exists.
        NotFoundError: no rules match the names, or ``extras`` does not exist.
        FormatError: ``config`` does not fit ``names``.
        StorageError: the disk is full or fails, or another process failed or did not arrive.
    """
    processes = Processes() if single_process else processes_of_jax(timeout_s)
    began, where, options = time.monotonic(), Path(path), {"overwrite": overwrite, "durable": fsync}
    with processes.about(os.fspath(path)).together("saving: preparing"), paused():
        kind = find_format(format)
        check_on_store(path, kind, processes, checksums=checksums)
        targets.refuse_file_name(where)
        arrays, notes = arrays_of(tree, name_of)
        if processes.are_several:
            check_across(kind, shared=shared_filesystem)
        elif single_process:
            check_alone(arrays, kind)
        carried, of_extras = _carried(extras)
        check_config(config)
        model, ready = _model(config, carried), None
        _check_uncut(kind, strategy)
        max_bytes = None if max_shard_size is None else parse_size(max_shard_size, "max_shard_size")
        request = Request(
            None,
            max_bytes,
            prefix,
            remove_redundancy=remove_redundancy,
            format=format,
            checksums=checksums,
        )
        if kind.own_library:
            check_request(request, step)
        else:
            limit = default_budget() if host_bytes is None else parse_size(host_bytes, "host_bytes")
            threads = default_workers() if workers is None else workers
            budget, room = share_out(limit, threads, num_fetched(arrays))
            source = HostShards(
                arrays,
                model=model,
                metadata=metadata,
                room=room,
                has_numbers=kind.of_mindspore,
            )
            if names is not None:
                source.map(find_mapping(names, source.catalog))
            layout = _layout(kind, strategy, rules, source.catalog, arrays)
            request = _with_step(replace(request, to=layout), step, source.catalog, arrays)
            result = make_result(source.catalog, list(source.catalog.tensors.values()), request)
            ready = source, result if config is None else _with_config(result, config), budget
    if ready is None:
        if names is not None:
            arrays = _mapped(arrays, names, model)
        own = tree if name_of is None and names is None else arrays
        publication = Publication(
            destination=real_place(where), carried=carried, overwrite=overwrite, durable=fsync
        )
        counts = save_tree(kind, own, arrays, publication)
        return _report(path, counts, 0, (*notes, *of_extras), carried, began)
    source, result, budget = ready
    try:
        if is_remote(path):
            counts = commit_upload(source, result, os.fspath(path), carried, budget, overwrite)
        else:
            publication = Publication.of(result, where, carried, **options)
            counts = _commit(source, publication, result, budget, processes, shared_filesystem)
    finally:
        source.close()
    is_elsewhere = is_remote(path) or (processes.index > 0 and shared_filesystem)
    beside = put_beside(where, {} if is_elsewhere else result.side_files, **options)
    notes = (*notes, *of_extras, *result.outputs.layout.notes, *beside)
    return _report(path, counts, len(result.outputs.paths), notes, carried, began)


def _commit(
    source: HostShards,
    publication: Publication,
    result: Result,
    budget: Budget,
    processes: Processes,
    shared_filesystem: bool,
) -> Counts:
    """Write and publish files, from one process or several."""
    if processes.are_several:
        commit_all = commit_shared if shared_filesystem else commit_own
        return commit_all(source, result, publication, budget, processes)
    return commit(publication, lambda s: write_files(source, result, s, budget))


def _report(
    path: PathLike,
    counts: Counts,
    num_files: int,
    notes: tuple[str, ...],
    carried: Catalog | None,
    began: float,
) -> Report:
    """Log the notes and the numbers, and return the report."""
    log_notes(str(path), notes, carried.logged if carried else ())
    log_done("save", path, counts.bytes_written, time.monotonic() - began)
    return Report(str(path), counts, num_files, 0, notes)


def _with_config(result: Result, config: Mapping[str, Any]) -> Result:
    text = (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()
    place = f"{result.extras_to}/{huggingface.CONFIG}".lstrip("/")
    return replace(result, side_files={**result.side_files, place: text})


def arrays_of(
    tree: Any, name_of: Callable[[str], str] | None = None
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Return the arrays of ``tree`` by their names in files, and notes.

    Raises:
        LayoutError: two leaves have the same name, or no leaf is an array.
    """
    found: dict[str, Array] = {}
    others = []
    kinds = jax.Array, np.ndarray
    for path, given in named_leaves(tree)[0]:
        leaf = np.asarray(given) if isinstance(given, np.generic) else given
        if not isinstance(leaf, kinds):
            if is_array_like(leaf):
                raise LayoutError(
                    f"{path}: a {type(leaf).__name__} has no values to save. Pass arrays."
                )
            others.append(path)
            continue
        name = name_of(path) if name_of else path
        if not isinstance(name, str):
            raise LayoutError(f"{path}: name_of returned {name!r} (expected a str).")
        if name in found:
            raise LayoutError(
                f"duplicate tensor name {name} (leaf {path}). Rename it with name_of=."
            )
        if not isinstance(leaf, np.ndarray) and leaf.is_deleted():
            raise LayoutError(
                f"{name}: the array was donated or deleted. Save the arrays that the step returned."
            )
        found[name] = leaf
    if not found:
        raise LayoutError("the tree has no arrays to save. Pass a pytree of arrays.")
    note = f"{len(others)} leaves are not arrays and are not saved: {format_list(others)}."
    return found, (note,) if others else ()


def _carried(extras: Catalog | PathLike | None) -> tuple[Catalog | None, tuple[str, ...]]:
    """Open the checkpoint whose other files are copied; also return notes."""
    if extras is None:
        return None, ()
    catalog = opened(extras)
    kept, notes = carrying.carried(catalog)
    return replace(catalog, extras=kept), (*catalog.notes, *notes)


def _mapped(
    arrays: dict[str, Array], names: NamesAndShapes | str, model: Model
) -> dict[str, Array]:
    """Return ``arrays`` with other names and shapes, computed on their devices."""
    source = HostShards(arrays, model=model)
    mapping = find_mapping(names, source.catalog)
    source.close()
    return mapping.apply_arrays(arrays)


def _check_uncut(format: Format, strategy: object) -> None:
    """Refuse a strategy for a format without files by rank."""
    if strategy is not None and not format.is_by_rank:
        raise LayoutError(
            f"strategy={strategy} is for files by rank, and format {format.name!r} has none "
            f"(expected one of {', '.join(names_where('is_by_rank'))}). Leave it out, or "
            "choose one of these formats."
        )


def _with_step(
    request: Request, step: str | None, catalog: Catalog, arrays: Mapping[str, Array]
) -> Request:
    """Return ``request`` with the training scalars, and with their or the caller's step."""
    check_request(request, step)
    numbers = _numbers(arrays, catalog.scalars)
    asked = step_of_numbers(numbers) if step is None else rank_names.read_step(step)
    return replace(request, step=asked, numbers=numbers)


def _numbers(arrays: Mapping[str, Array], scalars: frozenset[str]) -> dict[str, Any]:
    """Return the values of the training scalars among ``arrays`` that every process has."""
    found = {}
    for name in sorted(scalars & arrays.keys()):
        array = arrays[name]
        if isinstance(array, jax.Array):
            devices: set[jax.Device] = array.sharding.device_set
            holders = {device.process_index for device in devices}
            if not array.is_fully_addressable and len(holders) < jax.process_count():
                continue  # all processes must return the same
            array = array.addressable_data(0)
        found[name] = np.asarray(array).reshape(-1)[0].item()
    return found


def _layout(
    format: Format,
    strategy: str | PathLike | Strategy | Layout | None,
    rules: Rules | None,
    catalog: Catalog,
    arrays: Mapping[str, Array],
) -> Layout | None:
    """Return the layout of files by rank; None for complete files."""
    if strategy == SAME or (strategy is None and format.of_shardings):
        own = layout_of(arrays)
        return catalog.origin.place(own) if catalog.origin else own
    if strategy is None:
        return None
    target = parse_target(strategy, ())
    if isinstance(target, Layout):
        check_factors(catalog, target)
        return target
    assert isinstance(target, Strategy)
    return lay_out_for(catalog, target, rules)


def _model(config: Mapping[str, Any] | None, carried: Catalog | None) -> Model:
    if config is not None:
        return huggingface.model_of(config)
    return carried.model if carried else Model()
