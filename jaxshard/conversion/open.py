"""Opening a checkpoint: from a path to a catalog, in any format.

Each format of the registry recognises its own files, in the registry's order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.catalog import Catalog, Tensor
from ..core.decoders import FETCH, parse_object
from ..core.layout import Layout
from ..core.runtime import paused
from ..errors import RESUME, CoverageError, FormatError, LayoutError, NotFoundError, format_list
from ..formats.folder import COMMON, Folder, latest_iteration
from ..formats.huggingface import CONFIG, MAX_CONFIG_BYTES, NO_CONFIG, model_of, parse_config
from ..formats.rank_names import rank_of_folder
from ..formats.registry import FORMATS
from ..storage.fs import read_bytes
from ..storage.io import Source
from ..storage.local import LocalFolder
from ..storage.readers import open_source
from ..storage.remote import (
    Place,
    ReadFolder,
    folder_at,
    place_at,
    refuse_repository,
)
from ..storage.staging import is_unfinished

PathLike = str | os.PathLike[str]
#: A ``config.json``: its path, the directory that contains it, or its contents.
Config = PathLike | Mapping[str, Any]

# MindFormers merges the strategies of two jobs; dst_ is that of the job that saves here.
_MERGED = ("merged_strategy.ckpt", "merged_strategy/dst_strategy.ckpt")


def opened(
    source: Catalog | PathLike,
    *,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    config: Config | None = None,
) -> Catalog:
    """Return ``source``, opened if it is a path (arguments and errors as ``open_checkpoint``).

    Raises:
        LayoutError: it is open already, and the arguments would have no effect.
    """
    if not isinstance(source, Catalog):
        return open_checkpoint(source, src_strategy=src_strategy, suffix=suffix, config=config)
    if src_strategy is not None or suffix is not None:
        raise LayoutError(
            f"src_strategy= and suffix= are for paths, and {source.root} is open already. Pass "
            "them to open()."
        )
    return source if config is None else _with_config(source, config)


@paused()
def open_checkpoint(
    path: PathLike,
    *,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    config: Config | None = None,
) -> Catalog:
    """Open the checkpoint at ``path``, from headers only.

    Args:
        path: a directory, or a single weight file.
        src_strategy: for rank folders, the strategy files they were written with (a file or a
            directory); by default ``strategy/`` in or next to the directory, or a merged file.
        suffix: for rank folders with several files per rank, which one: ``1_10``.
        config: the model's ``config.json``, for a checkpoint without one, or in place of it: the
            path of the file or of its directory, or the contents.

    Raises:
        NotFoundError: jaxshard finds no checkpoint, or no ``config``.
        FormatError: a file is damaged.
        CoverageError: files contradict each other.
    """
    if not os.fspath(path):
        raise NotFoundError("the path of the checkpoint is empty. Name a folder, or a weight file.")
    refuse_repository(path)
    where = place_at(path)
    if _is_index(where):
        where = where.parent  # the index lists the files in its directory
    if isinstance(where, Path) and is_unfinished(where):
        raise FormatError(
            f"{where} is an unfinished conversion. Complete it with {RESUME}, or delete it."
        )
    for place in _places(where):
        folder = folder_at(place)
        try:
            catalog = _read(folder, place, src_strategy, suffix)
        except (CoverageError, NotFoundError) as error:
            raise type(error)(" ".join([str(error), *_links(folder)])) from None
        finally:
            folder.close()
        if catalog is not None:
            catalog = replace(catalog, notes=(*catalog.notes, *_links(folder)))
            return catalog if config is None else _with_config(catalog, config)
    _refuse_other_weights(where)
    raise NotFoundError(
        f"{where} holds no checkpoint that jaxshard can read: neither *.safetensors, nor rank_0/ "
        "or iteration_00000001/ folders, nor MindSpore's *.ckpt were found."
        + "".join(f" {text}" for text in _links(folder_at(where)))
    )


def read_config(config: Config) -> tuple[Mapping[str, object], str]:
    """Return the contents of ``config``, and what messages call it.

    Raises:
        NotFoundError: no such file.
        FormatError: not a JSON object.
    """
    if isinstance(config, Mapping):
        return dict(config), "config="
    path = Path(config)
    where = str(path / CONFIG if path.is_dir() else path)
    raw = read_bytes(where, MAX_CONFIG_BYTES, f"config= (--config) {where}")
    try:
        return parse_config(raw), where
    except ValueError as error:
        raise FormatError(
            f"config= (--config) {where}: {error}. Pass a config.json, or the directory that "
            "contains it."
        ) from None


def _with_config(catalog: Catalog, config: Config) -> Catalog:
    """Return ``catalog`` with the model of ``config`` (errors as ``read_config``)."""
    found, where = read_config(config)
    notes = tuple(n for n in catalog.notes if n != NO_CONFIG)
    if CONFIG in catalog.extras and catalog.model.config != found:
        notes = (*notes, f"{CONFIG} of {catalog.root} is replaced by {where}.")
    return replace(catalog, model=model_of(found), notes=notes, config_is_given=True)


def open_some(
    path: PathLike, names: Iterable[str], *, src_strategy: PathLike | None = None
) -> Catalog:
    """Open the files ``names`` of the directory ``path`` as a checkpoint, without the others.

    Raises:
        NotFoundError: a file is missing, or they are not a checkpoint.
        FormatError, CoverageError, LayoutError: as ``open_checkpoint``.
    """
    folder = LocalFolder(path, names)
    try:
        catalog = _read(folder, Path(path), src_strategy, None)
    finally:
        folder.close()
    if catalog is None:
        raise NotFoundError(f"{path}: {format_list(folder.files())} are not a checkpoint.")
    return catalog


def _is_index(where: Place) -> bool:
    """Return whether ``where`` is an index of weight files."""
    if where.suffix != ".json":
        return False
    from ..formats.huggingface import INDEX, MINDSPORE_INDEX  # noqa: PLC0415 - rarely needed

    return where.name in (INDEX, MINDSPORE_INDEX) and where.is_file()


def _links(folder: ReadFolder) -> tuple[str, ...]:
    """Return a note on links to directories, which are not followed."""
    names = folder.not_followed
    if not names:
        return ()
    what = "is a link" if len(names) == 1 else "are links"
    return (
        f"{format_list(names)} {what} to a folder elsewhere, not followed: copy what it holds "
        "here.",
    )


def _refuse_other_weights(where: Place) -> None:
    """Raise a precise error for weights in a format or a place that is not read.

    Raises:
        NotFoundError: there are such weights.
    """
    from ..formats import huggingface  # noqa: PLC0415

    folder = folder_at(where)
    if huggingface.carried(folder.files(), ())[1]:
        huggingface.read(folder)


def _places(where: Place) -> Iterator[Place]:
    """Yield ``where``, and the directories below it in which MindFormers saves checkpoints."""
    yield where
    for place in (where, where / "checkpoint"):
        if place.is_dir():
            newest = latest_iteration(folder_at(place))
            yield place / newest if newest else place


def _read(
    folder: ReadFolder, where: Place, strategy: PathLike | None, suffix: str | None
) -> Catalog | None:
    """Read ``folder`` with the first format that recognises it; None if no format does."""
    files = folder.files()
    format = next((f for f in FORMATS.values() if f.recognise(folder, files)), None)
    format = format or next((f for f in FORMATS.values() if f.recognise_inside(files)), None)
    if format is None:
        return None
    if format.reads_strategy:
        layout, notes = _source_layout(where, strategy)
        catalog = format.read(folder, layout, suffix)
        return replace(catalog, notes=(*notes, *catalog.notes))
    catalog = format.read(folder)
    if strategy is not None or suffix is not None:
        raise LayoutError(
            f"{where} has no rank_0/ … folders, so strategy files and suffix= (--suffix) "
            "have no effect. Leave them out."
        )
    if where.is_file() and rank_of_folder(where.parent.name) is not None:
        note = f"{where.name} is the file of one rank; its tensors are read as whole tensors."
        return replace(catalog, notes=(note, *catalog.notes))
    return catalog


def open_strategy(path: PathLike) -> Layout:
    """Return the layout of the strategy files at ``path``, a file or a directory.

    Raises:
        NotFoundError: the path does not exist.
        FormatError: a file is not a strategy file.
        CoverageError: files of one stage contradict each other, or a stage is missing.
    """
    folder = folder_at(path)
    try:
        return strategy_of(folder)
    finally:
        folder.close()


def strategy_of(folder: Folder, *, partial: bool = False) -> Layout:
    """Return the layout of the strategy files in ``folder``; errors as ``open_strategy``.

    Stages may be missing if ``partial``.
    """
    from ..formats import strategy_files, strategy_layouts  # noqa: PLC0415 - rarely needed

    own = strategy_layouts.find_layout_file(folder)
    if own is not None:
        return strategy_layouts.read_layout_file(folder, own)
    return strategy_files.layout(strategy_files.read(folder), partial=partial)


def strategy_place(where: Place, given: PathLike | None = None) -> Place | None:
    """Return the place of the strategy files for ``where``: given, or where jobs save them."""
    if given is not None:
        return place_at(given)
    for place in (where / "strategy", where.parent / "strategy"):
        if place.is_dir():
            return place
    merged = (place / name for place in (where, where.parent) for name in _MERGED)
    return next((place for place in merged if place.is_file()), None)


def _source_layout(where: Place, given: PathLike | None) -> tuple[Layout | None, tuple[str, ...]]:
    """Return the layout of the strategy files and notes; None if there are none."""
    place = strategy_place(where, given)
    if place is None:
        return None, ()
    guessed = given is None and place.is_file()
    folder = folder_at(place)
    try:
        layout = strategy_of(
            folder, partial=True
        )  # a server may have the files of its own stage only
    finally:
        folder.close()
    return layout, (f"the layout is that of {place}.",) if guessed else ()


# --- Training scalars (``global_step`` …) of a checkpoint as values

_MAX_COMMON_BYTES = 1 << 20


def read_scalars(catalog: Catalog) -> dict[str, Any]:
    """Return training scalars (``global_step`` …) by name; null in ``common.json`` is unknown.

    They are tensors of one element, or values in the ``common.json`` of a Checkpoint 2.0 folder.

    Raises:
        FormatError: a scalar does not have the type of its name, or ``common.json`` is damaged.
    """
    values = _common(catalog)
    one = [t for t in catalog.tensors.values() if t.name in catalog.scalars and _is_number(t)]
    if not one:
        return values
    with open_source(catalog) as files:
        return values | _typed({t.name: _value(files, t) for t in one}, catalog.root)


def _typed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    from ..formats.huggingface import TRAINING_SCALARS, scalar_value  # noqa: PLC0415 - rarely needed

    known = {n: v for n, v in values.items() if n not in TRAINING_SCALARS or v is not None}
    return {n: scalar_value(n, v, where) if n in TRAINING_SCALARS else v for n, v in known.items()}


def _is_number(tensor: Tensor) -> bool:
    kind = tensor.dtype
    is_real = kind.numpy is not None and not kind.name.startswith("C")
    return tensor.shape in ((), (1,)) and bool(tensor.shards) and is_real


def _value(files: Source, tensor: Tensor) -> bool | int | float:
    import numpy as np  # noqa: PLC0415 - opening needs no NumPy

    from ..core.numpy_dtypes import numpy_dtype  # noqa: PLC0415

    data = bytearray(tensor.num_bytes)
    files.read(tensor.shards[0], tensor.shards[0].offset, memoryview(data))
    value = np.frombuffer(data, numpy_dtype(tensor.dtype))[0]
    if tensor.dtype.name == "BOOL":
        return bool(value)
    return int(value) if tensor.dtype.name[0] in "IU" else float(value)


def _common(catalog: Catalog) -> dict[str, Any]:
    found = [path for path in catalog.extras if PurePosixPath(path).name == COMMON]
    if not found:
        return {}
    folder = folder_at(catalog.root, found[:1])
    try:
        size = folder.files()[found[0]].num_bytes
        where = f"{catalog.root}/{found[0]}"
        if size > _MAX_COMMON_BYTES:
            raise FormatError(f"{where} has {size} bytes, expected a few numbers. {FETCH}")
        told = parse_object(folder.read(found[0], 0, size), where)
    finally:
        folder.close()
    return _typed(told, where)
