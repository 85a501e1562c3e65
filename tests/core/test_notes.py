"""Every note reaches the user of the verb that made it, once: in the result and in the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from mindspore_ranks import ARRAYS, QUICK, held_by, write_ranks, write_strategy
from mindspore_ranks import LAYOUT as BARE

import jaxshard as js
from jaxshard import mindformers
from jaxshard.cli import main
from jaxshard.core.layout import Layout
from jaxshard.training import CheckpointManager

WEIGHTS = {f"{name}.weight": array for name, array in ARRAYS.items()}
LAYOUT = Layout(4, {f"{name}.weight": placed for name, placed in BARE.placements.items()})

MISSING = "no files of rank 2"  # what opening notes here
IDLE = 'the rules for "lm_head.wieght" match'  # what laying out notes
RULES = js.read_rules('[specs]\n"lm_head.wieght" = "-,-"\n"*" = "-"\n')


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    """Four ranks of which one is missing, which replicas replace: a note."""
    write_strategy(tmp_path / "strategy", LAYOUT, WEIGHTS)
    return write_ranks(
        tmp_path / "checkpoint", lambda r: held_by(r, WEIGHTS, LAYOUT), ranks=(0, 1, 3)
    )


def _config(source: Path) -> dict[str, Any]:
    return {"load_checkpoint": str(source), "use_parallel": True, "parallel_config": {}}


Verb = Callable[[Any, Path], object]
VERBS: dict[str, Verb] = {
    "load": lambda source, out: js.load(source, LAYOUT),
    "load onto one device": lambda source, out: js.load(source, jax.devices()[0]),
    "load_rank": lambda source, out: js.load_rank(source, LAYOUT, 1),
    "plan": lambda source, out: js.plan(source, LAYOUT),
    "convert": lambda source, out: js.convert(source, out, LAYOUT, **QUICK),
    "merge": lambda source, out: js.merge(source, out, **QUICK),
    "slice": lambda source, out: js.slice(source, out, LAYOUT, **QUICK),
    "verify": lambda source, out: js.verify(source),
    "verify against": lambda source, out: js.verify(_whole(out), source),
    "save with extras": lambda source, out: js.save(WEIGHTS, out, extras=source, fsync=False),
    "merge_lora": lambda source, out: js.merge_lora(source, out, adapter=_adapter(out), **QUICK),
}
OF_A_CONFIGURATION: dict[str, Verb] = {
    "load": lambda source, out: mindformers.load(_config(source), exclude=()),
    "load_rank": lambda source, out: mindformers.load_rank(_config(source)),
    "open": lambda source, out: mindformers.from_config(_config(source)).open(),
}


def _whole(out: Path) -> Path:
    out.mkdir()
    safetensors.numpy.save_file(
        {**WEIGHTS, "global_step": np.array([1], np.int32)}, out / "model.safetensors"
    )
    return out


def _adapter(out: Path) -> Path:
    place = out.with_name("adapter")
    place.mkdir()
    pair = {"wq.lora_a": np.ones((1, 6), np.float32), "wq.lora_b": np.ones((8, 1), np.float32)}
    safetensors.numpy.save_file(pair, place / "adapter.safetensors")
    (place / "adapter_config.json").write_text('{"lora_alpha": 1, "r": 1}')
    return place


def _logged(caplog: pytest.LogCaptureFixture, text: str) -> int:
    found = [r for r in caplog.records if text in r.getMessage()]
    assert all(r.levelno == logging.WARNING and r.name.startswith("jaxshard") for r in found)
    return len(found)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_logs_the_notes_of_opening_once(
    verb: str, noted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = VERBS[verb](noted, tmp_path / "out")
    assert _logged(caplog, MISSING) == 1
    notes = getattr(result, "notes", None)
    assert notes is None or sum(MISSING in note for note in notes) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_what_opening_has_logged_no_later_verb_logs_again(
    verb: str, noted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = js.open(noted)
    assert _logged(caplog, MISSING) == 1
    result = VERBS[verb](catalog, tmp_path / "out")
    assert _logged(caplog, MISSING) == 1
    assert MISSING in " ".join(getattr(result, "notes", (MISSING,)))


@pytest.mark.parametrize("verb", OF_A_CONFIGURATION)
def test_what_a_configuration_loads_logs_the_notes_of_both_once(
    verb: str, noted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**_config(noted), "auto_trans_ckpt": False, "pretrained_model_dir": "elsewhere"}
    run = {
        "load": lambda: mindformers.load(config, rules=RULES),
        "load_rank": lambda: mindformers.load_rank(config, rules=RULES),
        "open": lambda: mindformers.from_config(config).open(),
    }
    run[verb]()
    for text in (MISSING, "not pretrained_model_dir (elsewhere)", "auto_trans_ckpt is False"):
        assert _logged(caplog, text) == 1, text
    assert _logged(caplog, IDLE) == (verb != "open")


def test_every_way_to_lay_out_logs_the_notes_of_its_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _whole(tmp_path / "whole")
    mesh = jax.make_mesh((2, 2), ("dp", "mp"))
    arrays = js.load(whole, jax.devices()[0])
    for number, run in enumerate(
        (
            lambda: js.load(whole, "dp2mp2", rules=RULES, exclude="global"),
            lambda: js.load(whole, mesh, rules=RULES, exclude="global"),
            lambda: js.load_rank(whole, "dp2mp2", rules=RULES),
            lambda: js.plan(whole, "dp2mp2", rules=RULES),
            lambda: js.convert(whole, tmp_path / "c", "dp2mp2", rules=RULES, **QUICK),
            lambda: js.save(
                WEIGHTS, tmp_path / "s", format="ranks", strategy="mp2", rules=RULES, fsync=False
            ),
            lambda: js.reshard(
                {n: arrays[n] for n in WEIGHTS}, "mp2", rules=RULES, devices=jax.devices()[:2]
            ),
        ),
        start=1,
    ):
        run()
        assert _logged(caplog, IDLE) == number


def test_links_that_a_save_does_not_carry_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, secret = _whole(tmp_path / "whole"), tmp_path / "secret.json"
    secret.write_text("{}")
    os.symlink(secret, whole / "tokenizer.json")
    for form in ("huggingface", "orbax"):
        report = js.save(WEIGHTS, tmp_path / form, format=form, extras=whole, fsync=False)
        assert not list((tmp_path / form).rglob("tokenizer.json"))
        assert sum("tokenizer.json: links to files" in note for note in report.notes) == 1
    assert _logged(caplog, "tokenizer.json: links to files") == 2


def test_the_notes_of_an_adapter_are_of_its_merge(
    noted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = _adapter(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", adapter / "linked")
    report = js.merge_lora(noted, tmp_path / "out", adapter=adapter, **QUICK)
    assert sum("linked is a link to a folder" in note for note in report.notes) == 1
    assert _logged(caplog, "linked is a link to a folder") == 1


@pytest.mark.parametrize(
    "command",
    ["inspect", "plan", "convert", "merge", "slice", "verify", "strategy make"],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line_prints_each_note_and_logs_none(
    command: str,
    as_json: bool,
    noted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = [] if command in ("inspect", "plan", "verify") else [str(tmp_path / "out")]
    to = ["--to", str(tmp_path / "strategy")] if command in ("plan", "convert", "slice") else []
    if command == "strategy make":
        (tmp_path / "rules.toml").write_text('[specs]\n"*" = "-"\n')
        to = ["--to", "dp2mp2", "--rules", str(tmp_path / "rules.toml")]
    flags = ["--json"] if as_json else []
    assert main([*command.split(), str(noted), *out, *to, *flags]) == 0
    told = capsys.readouterr()
    assert (told.out.count(MISSING), told.err) == (1, "")
    assert caplog.records == []


def test_a_restored_step_logs_its_notes_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "output"
    write_strategy(place / "strategy", LAYOUT, WEIGHTS)
    large = {**WEIGHTS, "extra": np.zeros((2, 600), np.float32)}  # the strategy does not have it
    write_ranks(place / "checkpoint", lambda r: held_by(r, large, LAYOUT))
    with CheckpointManager(place, format="ranks", prefix="net") as manager:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {
            n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for n, a in large.items()
        }
        manager.restore(target)
    assert _logged(caplog, "are missing in the strategy") == 1


def test_a_restored_step_of_the_managers_own_returns_and_logs_its_notes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(
        tmp_path, format="huggingface", prefix="net", rules=RULES, fsync=False
    )
    manager.save(1, dict(WEIGHTS))
    safetensors.numpy.save_file({}, tmp_path / "checkpoint/net-1_1/other.safetensors")
    found = manager.restore("mp2", devices=jax.devices()[:2])
    for text in ("other.safetensors", IDLE):
        assert sum(text in note for note in found.notes) == 1
        assert _logged(caplog, text) == 1


def test_a_manager_logs_the_notes_of_its_layout_with_the_first_step_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for form in ("ranks", "iteration"):
        caplog.clear()
        with CheckpointManager(
            tmp_path / form, format=form, strategy="mp2", rules=RULES, fsync=False
        ) as manager:
            for step in (1, 2):
                manager.save(step, dict(WEIGHTS))
        assert _logged(caplog, IDLE) == 1, form
