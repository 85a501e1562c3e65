"""Catalogs: which file holds which box of which tensor.

Every on-disk format becomes one of these, by reading headers only. What follows
(planning, loading, verifying) never asks which format it was. This module opens
no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .box import Box
from .dtypes import DType, num_bytes
from .errors import NotFoundError, nearest
from .layout import Layout


@dataclass(frozen=True, slots=True)
class File:
    """A file of the checkpoint: its path relative to the checkpoint's root, and its state."""

    path: str
    num_bytes: int
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored box: contiguous, row-major, at byte ``offset`` of file number ``file``."""

    file: int
    offset: int
    box: Box


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint and every stored piece of it, replicas included."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor, counted once."""
        return num_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Model:
    """What the checkpoint's ``config.json`` says of the model, as far as layouts care."""

    type: str | None = None
    num_layers: int | None = None
    tied_embeddings: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Catalog:
    """The contents of one checkpoint.

    Attributes:
        root: the folder that ``files`` are relative to.
        format: the format's name, as ``--format`` takes it.
        layout: for checkpoints cut into ranks, who holds what.
        extras: other files to carry along (tokenizer, config), relative to ``root``.
        hyper: names of tensors that are no weights and are never cut (``global_step`` …).
        notes: things a person should know that are not errors.
    """

    root: str
    format: str
    files: tuple[File, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    layout: Layout | None = field(default=None, repr=False)
    model: Model = Model()
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    hyper: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called ``name``.

        Raises:
            NotFoundError: there is none; the nearest name is offered.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise NotFoundError(
                f"no tensor {name} among the {len(self.tensors)} of {self.root}."
                + nearest(name, self.tensors)
            ) from None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(t.num_bytes for t in self.tensors.values())
