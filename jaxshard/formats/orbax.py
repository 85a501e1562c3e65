"""Orbax checkpoints through Orbax's own library.

    _METADATA, manifest.ocdbt, d/ …    an item: a tree of arrays
    default/_METADATA …                a step of a CheckpointManager has its item in a folder

Where an array's bytes lie in the files is Orbax's to know. So a tensor here is one piece,
whose "file" is the tensor's number; ``storage.orbax_source`` reads it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import Catalog, File, Model, StoredShard, Tensor, group_by_bytes
from ..core.dtypes import DType
from ..core.numpy_dtypes import held_as
from ..errors import LayoutError
from . import huggingface
from .folder import ORBAX_FILES, Folder, orbax_item_folder
from .orbax_items import OrbaxItem, check

Asked = tuple[np.dtype[np.generic], Sharding]

_GROUP_BYTES = 256 << 20
_OF_ARRAYS = "array_metadatas/"  # a file for each process that saved


def read(folder: Folder, files: Mapping[str, File]) -> Catalog:
    """The catalog of the Orbax checkpoint in ``folder``, from its metadata.

    A tensor's name is the keys of its leaf, joined by dots (see ``leaf_names``). None, and empty
    dicts and lists, hold nothing and have no name.

    Raises:
        FormatError: Orbax cannot read the metadata.
    """
    inside = orbax_item_folder(list(files))
    where = str(Path(folder.root, inside))
    item = OrbaxItem(where)
    config = posixpath.join(inside, huggingface.CONFIG)
    model, notes = Model(), list[str]()
    if config in files:
        model, notes = huggingface.read_model(folder, files, config)
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, leaf in item.leaves.items():
        kind = _kind(leaf)
        if isinstance(kind, str):
            left_out[name] = kind
            continue
        shape = tuple(leaf.shape)
        tensors[name] = Tensor(name, kind, shape, (StoredShard(len(tensors), 0, Box.whole(shape)),))
    listed = tuple(File(name, t.num_bytes) for name, t in tensors.items())
    extras = (
        tuple(f for f in files if "/" not in f and f not in (*ORBAX_FILES, huggingface.CHECKSUMS))
        if not inside
        else ()
    )
    described = [f for f in files if f.startswith(posixpath.join(inside, _OF_ARRAYS))]
    return Catalog(
        where,
        "orbax",
        listed,
        tensors,
        model=model,
        extras=extras,
        notes=tuple(notes),
        keys=item.keys(folder, [files[f] for f in sorted(described)]),
        left_out=left_out,
    )


def _kind(leaf: Any) -> DType | str:
    """The dtype of a leaf, or what it is if it is no array that there is a dtype for."""
    if not hasattr(leaf, "dtype") or getattr(leaf, "shape", None) is None:
        return (
            "a text"
            if isinstance(leaf, ocp.metadata.StringMetadata)
            else f"a {type(leaf).__name__}"
        )
    try:
        return held_as(np.dtype(leaf.dtype), tuple(leaf.shape))
    except LayoutError:
        return f"an array of {leaf.dtype}"


def load(
    catalog: Catalog, asked: Mapping[str, Asked], group_bytes: int = _GROUP_BYTES
) -> dict[str, jax.Array]:
    """The arrays ``asked`` for by name, each with its dtype and sharding.

    Orbax reads the parts that this process's devices hold, of as many tensors at a time as
    have ``group_bytes`` together; of one, if it alone has more.

    Raises:
        FormatError: Orbax cannot read them.
    """
    item, found = OrbaxItem(catalog.root), dict[str, jax.Array]()
    for names in group_by_bytes({n: catalog.tensors[n].num_bytes for n in asked}, group_bytes):
        arguments = {
            name: ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding)
            if name not in catalog.keys
            else ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
            for name, (dtype, sharding) in ((n, asked[n]) for n in names)
        }
        wide = any(asked[n][0].itemsize >= 8 for n in names)
        for name, array in item.restore(arguments, wide=wide).items():
            check(name, array, catalog.tensors[name].shape, asked[name][0])
            found[name] = _placed(array, asked[name][1]) if name in catalog.keys else array
    return found


def _placed(data: NDArray[np.uint32], sharding: Sharding) -> jax.Array:
    """The data of keys, which Orbax would make keys of if it put them on devices."""
    return jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
