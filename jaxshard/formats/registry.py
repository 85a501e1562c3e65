"""The formats that can be written, and what each supports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """What checkpoints of a format can be.

    Attributes:
        is_complete: tensors are whole, in a checkpoint that is one.
        is_cut: there is a file for each rank.
        in_shards: a complete one may be several files of a limited size.
        as_steps: a training run's manager saves steps in it.
    """

    is_complete: bool = False
    is_cut: bool = False
    in_shards: bool = False
    as_steps: bool = False


FORMATS = {
    "huggingface": Format(is_complete=True, in_shards=True, as_steps=True),
    "ranks": Format(is_cut=True, as_steps=True),
    "ckpt": Format(is_complete=True, is_cut=True),
    "unified": Format(is_complete=True, in_shards=True),
    "iteration": Format(is_complete=True, is_cut=True, as_steps=True),
    "orbax": Format(is_complete=True, as_steps=True),
}
STEP_FORMATS = tuple(name for name, format in FORMATS.items() if format.as_steps)
