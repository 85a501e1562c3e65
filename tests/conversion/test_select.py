"""Strategy files of inference: a training checkpoint's optimizer states have no place in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_files import golden
from mindspore_files import rank_weights_of
from mindspore_ranks import ARRAYS, LAYOUT, NUMBERS, QUICK, write_strategy

import jaxshard as js
from jaxshard.core.layout import Layout
from jaxshard.errors import LayoutError, NotFoundError

NOTE = "optimizer states are left out, because the target's strategy has only their weights"
ONE_STATE = Layout(4, {**LAYOUT.placements, "adam_m.wq": LAYOUT.placements["wq"]})


def _converted(source: Path, target: Any, out: Path) -> dict[int, set[str]]:
    report = js.convert(source, out, target, **QUICK)
    assert sum(NOTE in note for note in report.notes) == 1
    return {rank: set(held) for rank, held in rank_weights_of(out).items()}


def _as_share(source: Path, target: Any, out: Path) -> dict[int, set[str]]:
    return {rank: set(js.load_rank(source, target, rank)) for rank in range(4)}


def _on_devices(source: Path, target: Any, out: Path) -> dict[int, set[str]]:
    held = set(js.load(source, target, exclude="^accu_grads"))
    return dict.fromkeys(range(4), held)


@pytest.mark.parametrize("verb", [_converted, _as_share, _on_devices])
@pytest.mark.parametrize("as_files", [False, True])
def test_states_without_a_place_are_left_out_with_a_note(
    verb: Callable[..., dict[int, set[str]]],
    as_files: bool,
    training: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target: Any = LAYOUT
    if as_files:
        target = write_strategy(tmp_path / "inference")
    for held in verb(training, target, tmp_path / "out").values():
        assert held == {*ARRAYS, *NUMBERS}
    assert NOTE in caplog.text


def test_states_that_have_a_place_stay(training: Path) -> None:
    held = set(js.load_rank(training, ONE_STATE, 0))
    assert held == {*ARRAYS, *NUMBERS, "adam_m.wq"}
    assert set(js.load(training, ONE_STATE, exclude="^accu_grads")) == held


def test_weights_without_a_place_are_refused(training: Path) -> None:
    lacking = Layout(4, {n: p for n, p in LAYOUT.placements.items() if n != "wo"})
    with pytest.raises(
        LayoutError, match=r"2 tensors are not in the target.s strategy: adam_m\.wo, wo"
    ):
        js.load_rank(training, lacking, 0)
    with pytest.raises(NotFoundError, match=r"2 tensors .* are not in the target's strategy"):
        js.load(training, lacking, exclude="^accu_grads")


def test_a_real_inference_strategy_takes_the_weights_of_a_real_training(tmp_path: Path) -> None:
    """MindSpore itself cut them so, and passed the states by."""
    source = golden("dp2mp2pp2", "src_safetensors")
    target = golden("dp2mp2pp2", "targets", "infer_mp4_strategy.ckpt")
    theirs = rank_weights_of(golden("dp2mp2pp2", "ms_slices_infer_mp4"))
    js.convert(
        source, tmp_path / "o", target, src_strategy=golden("dp2mp2pp2", "strategy"), **QUICK
    )
    ours = rank_weights_of(tmp_path / "o")
    assert ours.keys() == theirs.keys()
    for rank, held in ours.items():
        for name, (_, shape, data) in held.items():
            assert (shape, data) == theirs[rank][name][1:], name
        assert not any(name.startswith("adam_") for name in held)
