"""The manifest of tensors that are stored on other hosts.

Hosts that share no disk each keep the files of their own ranks. Without this file a
tensor of another host's pipeline stage would not exist for them; with it, its name and
shape are known, and who asks for its bytes hears where they are not.

    {"jaxshard_elsewhere": 1, "save": "7c01…",
     "tensors": {"model.layers.9.mlp.up_proj.weight": ["BF16", [64, 16]]}}

The word after "save" is the same in the folders of one save. Each host publishes its own, so a
host that died at that moment may have an older one than the others: then the words differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..core.catalog import Tensor
from ..core.dtypes import dtype
from ..errors import FormatError, JaxshardError, quote_name
from .reader import Folder
from .strict_json import FETCH, parse_object

NAME = "elsewhere.json"

_MARK, _VERSION = "jaxshard_elsewhere", 1
_MAX_BYTES = 100_000_000
_MAX_DIMS = 64


def to_bytes(tensors: Iterable[Tensor], save: str = "") -> bytes:
    """The file that tells of ``tensors``, and of which ``save`` this folder is."""
    told = {t.name: [t.dtype.name, t.shape] for t in tensors}
    return (json.dumps({_MARK: _VERSION, "save": save, "tensors": told}) + "\n").encode()


def read(folder: Folder) -> dict[str, Tensor]:
    """The tensors that other folders hold, without pieces; none where nothing tells of any.

    Raises:
        FormatError: the file is not what it claims to be.
    """
    return {name: _tensor(name, entry) for name, entry in _told(folder).get("tensors", {}).items()}


def save_of(folder: Folder) -> str:
    """The word that the folders of one save share; empty where this is no such folder.

    Raises:
        FormatError: the file is not what it claims to be.
    """
    save = _told(folder).get("save", "")
    if not isinstance(save, str):
        raise FormatError(f"{NAME}: save is {quote_name(repr(save))}, expected a text. {FETCH}")
    return save


def _told(folder: Folder) -> dict[str, Any]:
    known = folder.files().get(NAME)
    if known is None or known.num_bytes > _MAX_BYTES:
        return {}
    told = parse_object(folder.read(NAME, 0, known.num_bytes), NAME)
    if _MARK not in told:
        return {}  # somebody else's file of that name
    version = told[_MARK]
    if type(version) is not int or version != _VERSION or not isinstance(told.get("tensors"), dict):
        raise FormatError(
            f"{NAME}: version {quote_name(repr(version))}; this jaxshard reads version {_VERSION}. "
            "Upgrade jaxshard, or save again."
        )
    return dict(told)


def _tensor(name: str, entry: object) -> Tensor:
    try:
        if not isinstance(entry, list) or len(entry) != 2:
            raise TypeError(f"it is {entry!r}")
        kind, shape = entry
        dims = tuple(shape)
        if len(dims) > _MAX_DIMS or any(type(n) is not int or n < 0 for n in dims):
            raise FormatError(f"shape {dims}")
        return Tensor(name, dtype(kind), dims, ())
    except (TypeError, ValueError, JaxshardError) as error:
        raise FormatError(f"{NAME}: {name} is no dtype and shape ({error}). {FETCH}") from None
