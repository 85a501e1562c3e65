"""Every key of the known sections has an effect, concerns no weights, or gets a note."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mindspore_ranks import write_ranks, write_strategy

from jaxshard import mindformers
from jaxshard.errors import FormatError, NotFoundError
from jaxshard.mindformers.config_keys import SECTIONS
from jaxshard.training import CheckpointManager, resume_point
from jaxshard.training.policy import Progress
from jaxshard.training.records import step_name

VERBS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "load": mindformers.from_config,
    "save": mindformers.saving,
    "resume": mindformers.resuming,
}
MONITOR = "callbacks.CheckpointMonitor"

#: A value of every key that is used, which changes what a verb answers.
USED: dict[str, dict[str, Any]] = {
    "": {
        "load_checkpoint": "other",
        "pretrained_model_dir": "other",
        "src_strategy": "other/strategy",
        "src_strategy_path_or_dir": "other/strategy",
        "load_ckpt_format": "ckpt",
        "auto_trans_ckpt": False,
        "remove_redundancy": True,
        "use_parallel": False,
        "resume_training": True,
        "balanced_load": True,
        "reshard_worker_num": 3,
        "reshard_worker_number": 3,
        "only_save_strategy": True,
        "output_dir": "elsewhere",
        "use_legacy_format": False,
        "ckpt_use_legacy_format": False,
        "ignore_data_skip": True,
        "data_skip_steps": 2,
        "sink_mode": False,
        "sink_size": 2,
        "parallel_config": {"data_parallel": 2},
        "parallel": {"enable_parallel_optimizer": True},
        "checkpoint": {"load_balanced": True},
        "callbacks": [{"type": "CheckpointMonitor", "prefix": "net"}],
        "trainer": {"data_skip_steps": 3},
        "runner_config": {"sink_size": 4},
        "model": {"model_config": {"pp_interleave_num": 2}},
    },
    "parallel_config": {
        "data_parallel": 4,
        "model_parallel": 4,
        "pipeline_stage": 4,
        "context_parallel": 2,
        "expert_parallel": 2,
        "vocab_emb_dp": False,
        "expert_model_parallel": 2,
        "optimizer_shard": True,
    },
    "parallel": {
        "enable_parallel_optimizer": True,
        "parallel_optimizer_config": {"optimizer_weight_shard_size": 2},
        "parallel_mode": 0,
        "optimizer_weight_shard_size": 2,
    },
    "parallel.parallel_optimizer_config": {"optimizer_weight_shard_size": 2},
    "checkpoint": {
        "load_path": "other",
        "load_balanced": True,
        "no_load_optim": False,
        "reshard_worker_num": 2,
        "reshard_worker_number": 2,
        "save_path": "elsewhere",
        "save_max": None,
        "save_interleaved_steps": 7,
        "no_save_optim": True,
        "async_save": True,
        "prefix": "net",
        "save_remove_redundancy": True,
    },
    "trainer": {"ignore_data_skip": True, "data_skip_steps": 2},
    "runner_config": {"sink_mode": False, "sink_size": 2},
    MONITOR: {
        "prefix": "net",
        "directory": "elsewhere",
        "save_checkpoint_steps": 7,
        "save_checkpoint_seconds": 60,
        "keep_checkpoint_max": None,
        "global_batch_size": 16,
        "remove_redundancy": True,
        "async_save": True,
        "save_optimizer": False,
        "save_network_params": True,
        "save_trainable_params": True,
        "use_legacy_format": False,
        "checkpoint_format": "ckpt",
        "integrated_save": True,
    },
}
KEYS = [(path, key) for path, section in SECTIONS.items() for key in sorted(section.known)]


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two checkpoints, ``first`` and ``other``, in the current folder."""
    for name in ("first", "other"):
        write_strategy(tmp_path / name / "strategy")
        write_ranks(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(path: str = "", **values: Any) -> dict[str, Any]:
    """A configuration with ``values`` in the section at ``path``."""
    is_sharded = any("parallel_optimizer" in key or "shard_size" in key for key in values)
    monitor = {"type": "CheckpointMonitor", **(values if path == MONITOR else {})}
    made: dict[str, Any] = {
        "load_checkpoint": "first",
        "use_parallel": True,
        "parallel_config": {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2},
        "parallel": {"enable_parallel_optimizer": is_sharded},
        "callbacks": [monitor],
    }
    if path == MONITOR:
        return made
    here = made
    for key in path.split(".") if path else ():
        here = here.setdefault(key, {})
    here.update(values)
    return made


def without(told: dict[str, Any], path: str, key: str) -> dict[str, Any]:
    """``told`` without ``key`` of the section at ``path``."""
    if path == MONITOR:
        (one,) = told["callbacks"]
        return {**told, "callbacks": [{k: v for k, v in one.items() if k != key}]}
    first, _, rest = path.partition(".")
    if first:
        return {**told, first: without(told[first], rest, key)}
    return {k: v for k, v in told.items() if k != key}


def answers(told: dict[str, Any], caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """What each verb answers and notes, and what loading notes when it opens the files."""
    found = {}
    for name, verb in VERBS.items():
        caplog.clear()
        try:
            answer = verb(told)
        except NotFoundError as error:
            answer = str(error)
        notes = [r.getMessage() for r in caplog.records]
        found[name] = (answer, notes)
        if name == "load" and not isinstance(answer, str):
            found["open"] = (answer.open().notes, [])
    return found


def test_the_table_has_every_key_that_is_used() -> None:
    assert {p: frozenset(keys) for p, keys in USED.items()} == {
        path: section.used for path, section in SECTIONS.items()
    }


@pytest.mark.parametrize(("path", "key"), KEYS, ids=[f"{path}.{key}" for path, key in KEYS])
def test_a_key_is_used_or_noted_or_concerns_no_weights(
    path: str, key: str, paths: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = SECTIONS[path]
    value = USED[path].get(key, 8)
    told = config(path, **{key: value})
    if key == "type":
        return  # by which the callback is found
    ours, others = answers(told, caplog), answers(without(told, path, key), caplog)
    new = {v: set(ours[v][1]) - set(others[v][1]) for v in VERBS}
    if key in section.used:
        assert ours != others
    elif key in section.idle:
        idle = section.idle[key]
        (note,) = new[idle.verb]
        assert f"{path}.{key}".lstrip(".") + " is 8, which has no effect: " in note
        assert idle.why in note
        usual = [config(path, **{key: value}) for value in idle.usual]
        verb = idle.verb
        assert all(answers(one, caplog)[verb] == others[verb] for one in usual)
    else:
        assert ours == others


@pytest.mark.parametrize(
    ("path", "key", "note"),
    [
        (
            "",
            "load_chekpoint",
            "load_chekpoint is unknown and has no effect. Did you mean",
        ),
        ("", "paralel_config", "Did you mean parallel_config?"),
        ("", "Resume_training", "Did you mean resume_training?"),
        ("", "save_checkpoint_steps", "Move it below callbacks.CheckpointMonitor."),
        ("", "vocab_emb_dp", "vocab_emb_dp has no effect there. Move it below parallel_config."),
        ("parallel_config", "model_paralel", "parallel_config.model_paralel is unknown"),
        ("parallel_config", "tensor_way", "parallel_config.tensor_way is unknown and has no ef"),
        ("parallel_config", "auto_trans_ckpt", "Move it to the top level."),
        ("parallel", "enable_paralel_optimizer", "Did you mean enable_parallel_optimizer?"),
        ("parallel.parallel_optimizer_config", "optimizer_weight_shard_sizes", "Did you mean"),
        ("checkpoint", "load_balance", "Did you mean load_balanced?"),
        ("checkpoint", "keep_checkpoint_max", "Move it below callbacks.CheckpointMonitor."),
        ("trainer", "data_skip_step", "Did you mean data_skip_steps?"),
        ("runner_config", "sink_sizes", "Did you mean sink_size?"),
        (MONITOR, "save_checkpoint_step", "Did you mean save_checkpoint_steps?"),
        (MONITOR, "save_max", "save_max has no effect there. Move it below checkpoint."),
    ],
)
def test_an_unknown_key_is_noted_with_the_nearest_key(
    path: str, key: str, note: str, paths: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = answers(config(path, **{key: 8}), caplog)
    verb = "save" if path == MONITOR else "load"
    assert [n for n in found[verb][1] if note in n]
    if verb == "load":
        assert any(note in n for n in mindformers.from_config(config(path, **{key: 8})).notes)


def test_a_callback_and_a_checkpoint_that_are_misspelt_are_offered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert mindformers.saving({"callbacks": [{"type": "CheckpointMonitors"}]}) == {}
    assert "CheckpointMonitors is unknown. Did you mean CheckpointMonitor?" in caplog.text
    with pytest.raises(NotFoundError, match=r"Did you mean load_checkpoint\?"):
        mindformers.from_config({"load_chekpoint": "."})


@pytest.mark.parametrize(
    "told",
    [
        {"my_key": 1, "train_dataset": {"x": 1}, 3: 4},
        {"trainer": {"type": "CausalLanguageModelingTrainer", "own": 1}},
        {"parallel": {"own": 1}, "runner_config": {"own": 1}},
    ],
)
def test_further_keys_of_open_sections_need_no_note(told: dict[Any, Any], paths: Path) -> None:
    assert mindformers.from_config({"load_checkpoint": "first", **told}).notes == ()


# --- what single keys do ---------------------------------------------------------------------


def saved(**told: Any) -> dict[str, Any]:
    callbacks = [{"type": "CheckpointMonitor", **told.pop("monitor", {})}]
    return mindformers.saving({"callbacks": callbacks, **told})


def test_names_of_steps_count_sinks_as_mindformers_does() -> None:
    """Its guide to resuming: saved every 10 steps in sinks of 2, of which the last 3 are kept."""
    told = saved(
        runner_config={"sink_mode": True, "sink_size": 2},
        monitor={"save_checkpoint_steps": 10, "keep_checkpoint_max": 3},
    )
    assert (told["steps_per_epoch"], told["save_every_steps"], told["keep_max"]) == (2, 10, 3)
    names = [str(step_name(step, told["steps_per_epoch"])) for step in (20, 30, 40)]
    assert names == ["10_2", "15_2", "20_2"]
    CheckpointManager(**told)


@pytest.mark.parametrize(
    ("runner", "steps", "note"),
    [
        ({}, None, None),
        ({"sink_mode": True}, None, "sink_mode is True without a sink_size, whose number"),
        ({"sink_mode": True, "sink_size": 4}, 4, None),
        ({"sink_size": 4}, 4, None),
        ({"sink_mode": True, "sink_size": -1}, None, "sink_size is -1, so names count the steps"),
        ({"sink_mode": False, "sink_size": 2}, None, "sink_mode is False, so names count the st"),
    ],
)
def test_a_sink_is_an_epoch_of_names_if_its_size_is_known(
    runner: dict[str, Any], steps: int | None, note: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert saved(runner_config=runner).get("steps_per_epoch") == steps
    assert [note in r.getMessage() for r in caplog.records if note] == [True] * (note is not None)
    assert bool(caplog.records) == (note is not None)


@pytest.mark.parametrize(
    ("told", "directory"),
    [
        ({}, "./output"),
        ({"output_dir": "runs/a"}, "runs/a"),
        ({"output_dir": "runs/a", "monitor": {"directory": "b"}}, "b"),
        ({"output_dir": "runs/a", "checkpoint": {"prefix": "net"}}, "runs/a"),
        ({"checkpoint": {"save_path": "runs/a/checkpoint"}}, "runs/a"),
        ({"checkpoint": {"save_path": "runs/a"}}, "runs/a"),
    ],
)
def test_steps_are_saved_below_the_output_folder(told: dict[str, Any], directory: str) -> None:
    assert saved(**told)["directory"] == directory


def test_a_callback_beside_the_section_that_decides_is_noted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    both = saved(checkpoint={"prefix": "a"}, monitor={"prefix": "b", "keep_checkpoint_max": 3})
    assert (both["prefix"], both.get("keep_max")) == ("a", None)
    assert "has no effect, because the section checkpoint overrides it: prefix, ke" in caplog.text
    caplog.clear()
    saved(checkpoint={"prefix": "a"})
    assert not caplog.records


def test_an_output_folder_in_which_nothing_is_saved_is_noted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert mindformers.saving({"output_dir": "runs/a"}) == {}
    assert "output_dir is runs/a, but nothing is saved" in caplog.text


@pytest.mark.parametrize(
    ("value", "kept"),
    [({}, None), ({"keep_checkpoint_max": None}, 0), ({"keep_checkpoint_max": 3}, 3)],
)
def test_all_steps_are_kept_where_their_number_is_null(
    value: dict[str, Any], kept: int | None
) -> None:
    assert saved(monitor=value).get("keep_max") == kept
    new = {"save_max" if k == "keep_checkpoint_max" else k: v for k, v in value.items()}
    assert mindformers.saving({"checkpoint": {"prefix": "n", **new}}).get("keep_max") == kept


@pytest.mark.parametrize(
    ("top", "monitor", "form"),
    [
        ({}, {}, "ranks"),
        ({"use_legacy_format": False}, {}, "iteration"),
        ({"ckpt_use_legacy_format": False}, {}, "iteration"),
        ({"use_legacy_format": False}, {"use_legacy_format": True}, "ranks"),
        ({"use_legacy_format": True}, {"use_legacy_format": False}, "iteration"),
    ],
)
def test_the_callback_and_then_the_top_decide_on_the_format(
    top: dict[str, Any], monitor: dict[str, Any], form: str
) -> None:
    assert saved(monitor=monitor, **top)["format"] == form


@pytest.mark.parametrize(
    ("told", "arguments", "skipped"),
    [
        ({}, {}, 40),
        ({"trainer": {"ignore_data_skip": True}}, {"ignore_data_skip": True}, 0),
        ({"data_skip_steps": 3}, {"data_skip_steps": 3}, 3),
        ({"data_skip_steps": 3, "trainer": {"data_skip_steps": 2}}, {"data_skip_steps": 2}, 2),
        (
            {
                "runner_config": {"sink_mode": True},
                "callbacks": [{"type": "CheckpointMonitor", "global_batch_size": 32}],
            },
            {"sink_mode": True, "global_batch_size": 32},
            20,
        ),
    ],
)
def test_keys_of_consumed_data_are_passed_to_the_resume_point(
    told: dict[str, Any], arguments: dict[str, Any], skipped: int
) -> None:
    assert mindformers.resuming(told) == arguments
    assert resume_point(Progress(4, 40, 40, 16), **arguments).data_skip_steps == skipped


@pytest.mark.parametrize(
    ("verb", "told", "why"),
    [
        ("resume", {"trainer": {"data_skip_steps": -1}}, "data_skip_steps: -1 is not a number of"),
        ("resume", {"trainer": {"ignore_data_skip": 1}}, "ignore_data_skip: 1 is not True or"),
        ("resume", {"trainer": 3}, "trainer: 3 is not a mapping"),
        ("save", {"output_dir": 3, "checkpoint": {"prefix": "n"}}, "3 is not the path of a folder"),
        ("save", {"checkpoint": {"prefix": "n", "save_path": "a\0"}}, "is not the path of a fold"),
        (
            "save",
            {"runner_config": {"sink_size": "2"}, "callbacks": [{"type": "CheckpointMonitor"}]},
            "sink_size: '2' is not a number of steps",
        ),
    ],
)
def test_values_of_training_keys_that_mean_nothing_are_refused(
    verb: str, told: dict[str, Any], why: str
) -> None:
    with pytest.raises(FormatError, match=why):
        VERBS[verb](told)


@pytest.mark.parametrize(
    ("shared", "noted"), [("", False), ("{}", False), ("/a,{}", False), ("/a", True)]
)
def test_paths_that_are_not_among_the_shared_ones_are_noted(
    shared: str,
    noted: bool,
    paths: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SHARED_PATHS", shared.format(paths))
    told = mindformers.from_config({"load_checkpoint": "first"})
    assert any("SHARED_PATHS is /a without first" in n for n in told.notes) == noted
    caplog.clear()
    saved()
    assert ("SHARED_PATHS is /a without ./output" in caplog.text) == noted


def test_a_note_of_a_configuration_is_a_warning_with_its_name(
    paths: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("yaml")
    (paths / "run.yaml").write_text("load_checkpoint: first\nnpu_num_per_node: 8\n")
    mindformers.from_config("run.yaml")
    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "jaxshard")
    assert record.getMessage().startswith("run.yaml: npu_num_per_node is 8, which has no effect")
