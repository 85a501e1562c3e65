"""``resume_training: True`` goes on from the newest step that is good, as the guide has it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore_ranks import ARRAYS, LAYOUT, NUMBERS, held_by, write_ranks, write_strategy

import jaxshard as js
from jaxshard import mindformers
from jaxshard.errors import FormatError, JaxshardError
from jaxshard.training import CheckpointManager

FORMS = ("net_rank_{r}-1_%d", "example-1_%d", "net_rank_{r}_1-1_%d")
Damage = Callable[[bytes], bytes | None]


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _short(data: bytes) -> bytes:
    return data[:-1]


def _empty(data: bytes) -> bytes:
    return b""


def _garbled(data: bytes) -> bytes:
    return b"\xff" * 64 + data[64:]


def _missing(data: bytes) -> None:
    return None


def _steps(directory: Path, form: str, kind: str, *steps: int) -> Path:
    """A job's folder; the weights of step n are n more than ``ARRAYS``."""
    write_strategy(directory / "strategy")
    for step in steps:
        arrays = {name: array + np.float32(step) for name, array in ARRAYS.items()}
        write_ranks(
            directory / "checkpoint",
            lambda r, arrays=arrays: {**held_by(r, arrays), **NUMBERS},
            f"{form % step}.{kind}",
        )
    return directory


def _loaded(directory: Path, **more: Any) -> tuple[int, tuple[str, ...]]:
    """The step that training goes on from, by the weights, and the notes on it."""
    told = {"load_checkpoint": str(directory), "resume_training": True, "use_parallel": True}
    asked = mindformers.from_config(told | more)
    share = js.load_rank(asked.open(), "full", include="^norm$")
    (step,) = set((share["norm"] - ARRAYS["norm"]).tolist())
    return int(step), asked.open().notes


@pytest.mark.parametrize("below", ["", "checkpoint"])
@pytest.mark.parametrize("damage", [_cut, _short, _empty, _garbled, _missing])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_newest_file_of_one_rank_leads_to_the_step_before(
    tmp_path: Path, form: str, kind: str, damage: Damage, below: str
) -> None:
    _steps(tmp_path, form, kind, 10, 20, 30)
    assert _loaded(tmp_path / below) == (30, ())  # the twin: nothing is passed over
    for bad, rank in ((30, 2), (20, 0)):
        path = tmp_path / "checkpoint" / f"rank_{rank}" / f"{form.format(r=rank) % bad}.{kind}"
        data = damage(path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)
        found, notes = _loaded(tmp_path / below)
        assert found == bad - 10
        assert damage is _missing or any("is passed over" in note for note in notes)


@pytest.mark.parametrize(("with_checksum", "expected"), [(True, 10), (False, 20)])
def test_a_checksum_in_the_file_is_compared(
    tmp_path: Path, with_checksum: bool, expected: int
) -> None:
    _steps(tmp_path, "net_rank_{r}-1_%d", "ckpt", 10, 20)
    path = tmp_path / "checkpoint/rank_1/net_rank_1-1_20.ckpt"
    data = path.read_bytes()
    trailer = b"crc_num" + zlib.crc32(data).to_bytes(10, "big") if with_checksum else b""
    path.write_bytes(data + trailer)
    assert _loaded(tmp_path)[0] == 20
    at = data.index(b"wq") + 40  # within the numbers of a tensor
    changed = bytes([data[at] ^ 1])
    path.write_bytes(data[:at] + changed + data[at + 1 :] + trailer)
    assert _loaded(tmp_path)[0] == expected


def test_where_no_step_is_good_the_newest_ones_fault_is_the_error(tmp_path: Path) -> None:
    _steps(tmp_path, "net_rank_{r}-1_%d", "safetensors", 10, 20)
    for step in (10, 20):
        path = tmp_path / f"checkpoint/rank_1/net_rank_1-1_{step}.safetensors"
        path.write_bytes(_garbled(path.read_bytes()))
    with pytest.raises(FormatError, match="net_rank_1-1_20"):
        _loaded(tmp_path)


def test_a_named_step_that_is_damaged_is_an_error_and_not_another_step(tmp_path: Path) -> None:
    _steps(tmp_path, "net_rank_{r}-1_%d", "safetensors", 10, 20)
    path = tmp_path / "checkpoint/rank_1/net_rank_1-1_20.safetensors"
    path.write_bytes(_cut(path.read_bytes()))
    with pytest.raises(JaxshardError, match="net_rank_1-1_20"):
        _loaded(tmp_path, resume_training="net_rank_0-1_20.safetensors")
    assert _loaded(tmp_path, resume_training="net_rank_0-1_10.safetensors")[0] == 10


def test_strategy_files_that_are_named_are_those_of_every_step(tmp_path: Path) -> None:
    _steps(tmp_path, "net_rank_{r}-1_%d", "safetensors", 10, 20)
    (tmp_path / "strategy").rename(tmp_path / "elsewhere")
    path = tmp_path / "checkpoint/rank_1/net_rank_1-1_20.safetensors"
    path.write_bytes(_cut(path.read_bytes()))
    source = str(tmp_path / "elsewhere")
    assert _loaded(tmp_path, src_strategy_path_or_dir=source)[0] == 10


def test_the_kind_of_file_and_the_prefix_choose_among_several(tmp_path: Path) -> None:
    _steps(tmp_path, "net_rank_{r}-1_%d", "safetensors", 10)
    _steps(tmp_path, "net_rank_{r}-1_%d", "ckpt", 20)
    for kind, step in (("safetensors", 10), ("ckpt", 20)):
        assert _loaded(tmp_path, load_ckpt_format=kind)[0] == step
    _steps(tmp_path / "two", "one_rank_{r}-1_%d", "ckpt", 10)
    _steps(tmp_path / "two", "other_rank_{r}-1_%d", "ckpt", 20)
    for prefix, step in (("one", 10), ("other", 20)):
        monitor = {"type": "CheckpointMonitor", "prefix": prefix}
        assert _loaded(tmp_path / "two", callbacks=[monitor])[0] == step


@pytest.mark.parametrize("format", ["ranks", "iteration"])
def test_steps_of_a_manager_are_resumed_from_in_its_own_order(tmp_path: Path, format: str) -> None:
    """After a roll-back the newest is not the one with the largest number."""

    def state(value: int) -> dict[str, Any]:
        return {name: array + np.float32(value) for name, array in ARRAYS.items()}

    options = {"prefix": "net", "format": format, "strategy": LAYOUT, "fsync": False}
    manager = CheckpointManager(tmp_path, workers=1, **options)
    for step in (10, 20, 30):
        manager.save(step, state(step))
    manager.restore(state(0), step=10)
    manager.save(15, state(15))
    assert _loaded(tmp_path)[0] == 15
    for step, then in ((15, 10), (10, 30)):
        for path in (tmp_path / "checkpoint").rglob("*.safetensors"):
            ranks = f"-1_{step}." in path.name
            if ranks or path.parent.name == f"iteration_{step:08d}":
                path.write_bytes(_cut(path.read_bytes()))
                break
        found, notes = _loaded(tmp_path)
        assert found == then
        assert any(f"step 1_{step} is passed over" in note for note in notes)
