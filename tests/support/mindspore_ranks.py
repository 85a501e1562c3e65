"""Four small ranks with their strategy, written without jaxshard's writer of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import jaxshard as js
from jaxshard.core.dtypes import dtype
from jaxshard.core.layout import Layout, Placement
from jaxshard.formats import mindspore_ckpt, strategy_files

QUICK = {"fsync": False, "workers": 1}
DP, MP = ("dp", 2), ("mp", 2)
ROWS = Placement((DP, MP), (("mp",),))
COLUMNS = Placement((DP, MP), ((), ("mp",)))
WHOLE = Placement((DP, MP))
LAYOUT = Layout(4, {"wq": (ROWS,), "wo": (COLUMNS,), "norm": (WHOLE,)})
ARRAYS = {
    "wq": np.arange(48, dtype=np.float32).reshape(8, 6),
    "wo": np.arange(48, 96, dtype=np.float32).reshape(6, 8),
    "norm": np.arange(6, dtype=np.float32),
}
NUMBERS = {  # loss_scale has no dims: so MindSpore saves it
    "global_step": np.array([10], np.int32),
    "loss_scale": np.array(1024, np.float32),
}
STEP = "net_rank_{r}-1_10.safetensors"

Held = Mapping[str, np.ndarray]


def held_by(rank: int, arrays: Held = ARRAYS, layout: Layout = LAYOUT) -> dict[str, np.ndarray]:
    """What ``rank`` has of ``arrays``; those without a placement whole."""
    found = {}
    for name, array in arrays.items():
        placed = layout.placements.get(name)
        if placed is None:
            found[name] = array
        elif rank in placed[0].ranks:
            box = placed[0].boxes(array.shape)[rank - placed[0].first_rank]
            found[name] = np.ascontiguousarray(array[box.slices])
    return found


def write_ranks(
    folder: Path,
    held: Callable[[int], Held] = held_by,
    name: str = STEP,
    ranks: Iterable[int] = range(4),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    for rank in ranks:
        path = folder / f"rank_{rank}" / name.format(r=rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ckpt":
            path.write_bytes(as_ckpt(held(rank)))
        else:
            data = dict(held(rank))
            safetensors.numpy.save_file(data, path, {"format": "ms", **(metadata or {})})
    return folder


def as_ckpt(held: Held, chunk_bytes: int = 512 << 20, **more: object) -> bytes:
    kinds = {"float32": "F32", "int32": "I32", "uint8": "U8"}
    entries = [(n, dtype(kinds[a.dtype.name]), a.shape) for n, a in held.items()]
    layout = mindspore_ckpt.layout_file(entries, chunk_bytes=chunk_bytes, **more)
    out = bytearray(layout.num_bytes)
    for at, data in layout.segments:
        out[at : at + len(data)] = data
    for name, array in held.items():
        data, done = array.tobytes(), 0
        for at, length in layout.spans(name, 0, len(data)):
            out[at : at + length] = data[done : done + length]
            done += length
    return bytes(out)


def write_strategy(folder: Path, layout: Layout = LAYOUT, arrays: Held = ARRAYS) -> Path:
    shapes = {n: a.shape for n, a in arrays.items() if n in layout.placements}
    files = strategy_files.raw_files(strategy_files.from_layout(layout, shapes))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """Four ranks with all replicas, and their strategy beside them."""
    write_strategy(tmp_path / "strategy")
    return write_ranks(tmp_path / "checkpoint")


def merged(source: Path, out: Path, **how: object) -> dict[str, np.ndarray]:
    js.merge(source, out, **QUICK, **how)
    found = {}
    for path in out.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    return found


def check_equal(found: Held, wanted: Held) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array), name


def with_states(rank: int) -> Held:
    states = {f"adam_m.{n}": a * 2 for n, a in ARRAYS.items()}
    gradients = {f"accu_grads.{n}": a * 3 for n, a in ARRAYS.items()}
    every = {**ARRAYS, **states, **gradients}
    layout = Layout(4, {n: LAYOUT.placements[n.split(".")[-1]] for n in every})
    return {**held_by(rank, every, layout), **NUMBERS}


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """Ranks of a job in training: states, accumulated gradients and numbers too."""
    every = {k: v for r in range(4) for k, v in with_states(r).items() if k not in NUMBERS}
    names = {n: LAYOUT.placements[n.split(".")[-1]] for n in every}
    arrays = {n: ARRAYS[n.split(".")[-1]] for n in every}
    write_strategy(tmp_path / "strategy", Layout(4, names), arrays)
    return write_ranks(tmp_path / "checkpoint", with_states)
