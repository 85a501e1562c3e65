"""What MindFormers' configurations ask for, and that it is what is loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import mindspore_files as ms
import numpy as np
import pytest
from golden_files import golden, manifest
from jax.sharding import NamedSharding, PartitionSpec
from mindspore_ranks import (
    ARRAYS,
    LAYOUT,
    NUMBERS,
    QUICK,
    as_ckpt,
    held_by,
    write_ranks,
    write_strategy,
)

import jaxshard as js
from jaxshard import mindformers
from jaxshard.cli.parsing import parser
from jaxshard.conversion.open import open_strategy
from jaxshard.core.layout import Layout, Placement, Strategy
from jaxshard.errors import CoverageError, FormatError, LayoutError, NotFoundError, StorageError
from jaxshard.training import CheckpointManager

TWO = {"data_parallel": 1, "model_parallel": 2, "pipeline_stage": 1}
WQ = "model.layers.1.attention.wq.weight"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The output folder of a real job: two stages of four ranks."""
    out = tmp_path / "output"
    shutil.copytree(golden("dp2mp2pp2", "src_safetensors_dedup"), out / "checkpoint")
    shutil.copytree(golden("dp2mp2pp2", "strategy"), out / "strategy")
    return out


def config(job: Path, **values: Any) -> dict[str, Any]:
    return {
        "load_checkpoint": str(job / "checkpoint"),
        "use_parallel": True,
        "auto_trans_ckpt": True,
        "parallel_config": TWO,
        **values,
    }


# --- loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_job_of_another_strategy_is_loaded_onto_the_devices(job: Path, resume: bool) -> None:
    """MindFormers merges it to disk first, and cuts it again."""
    arrays = mindformers.load(config(job, resume_training=resume))
    wanted = {
        n: t
        for n, t in ms.weights(golden("dp2mp2pp2", "full", "full.safetensors")).items()
        if resume or (not n.startswith("adam_") and n not in manifest("dp2mp2pp2")["hyper"])
    }
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        assert (array.shape, np.asarray(array).tobytes()) == (wanted[name][1], wanted[name][2])
    assert len(arrays[WQ].sharding.device_set) == 2
    assert arrays[WQ].addressable_shards[1].index == (slice(16, 32), slice(None))


def test_ckpt_ranks_and_iterations_are_loaded_onto_a_mesh_of_another_layout(tmp_path: Path) -> None:
    """Tensors that a ``.ckpt`` has in parts, too, which have nothing to do with rows."""
    write_strategy(tmp_path / "strategy")
    for rank in range(4):
        place = tmp_path / "c" / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt"
        place.parent.mkdir(parents=True)
        place.write_bytes(as_ckpt({**held_by(rank), **NUMBERS}, chunk_bytes=12))
    js.convert(tmp_path / "c", tmp_path / "i", "same", format="iteration", **QUICK)
    eight = Placement((("dp", 4), ("mp", 2)), ((), ("mp",)))
    columns = Layout(8, {"wq": (eight,), "wo": (eight,), "norm": (Placement((("all", 8),)),)})
    for source in ("c", "i"):
        arrays = js.load(tmp_path / source, columns)
        for name, array in {**ARRAYS, **NUMBERS}.items():
            found = arrays[name]
            assert (found.shape, found.dtype) == (array.shape, array.dtype)
            assert len(found.sharding.device_set) == 8
            for shard in found.addressable_shards:
                assert np.array_equal(shard.data, array[shard.index]), name
        assert arrays["wo"].addressable_shards[1].index == (slice(None), slice(4, 8))


@pytest.mark.parametrize("kind", ["full_copies", "balanced"])
def test_a_real_iteration_is_loaded_onto_a_mesh(kind: str) -> None:
    source = golden("mf_iteration_dir", kind, "checkpoint")
    mesh = jax.make_mesh((2, 2), ("dp", "mp"))

    def place(name: str) -> NamedSharding:
        shape = catalog[name].shape
        split = bool(shape) and shape[0] % 2 == 0
        return NamedSharding(mesh, PartitionSpec("mp") if split else PartitionSpec())

    catalog = js.open(source)
    arrays, whole = js.load(catalog, place), js.load_rank(catalog, "full")
    assert arrays.keys() == whole.keys()
    for name, array in arrays.items():
        assert np.asarray(array).tobytes() == whole[name].tobytes(), name


def test_the_share_of_one_rank_is_what_its_file_would_hold(job: Path, tmp_path: Path) -> None:
    strategy = golden("dp2mp2pp2", "targets", "dp4mp2_opt2_strategy.ckpt")
    js.convert(job / "checkpoint", tmp_path / "o", strategy, **QUICK)
    files = ms.rank_weights_of(tmp_path / "o")
    for rank in (0, 5):
        share = js.load_rank(job / "checkpoint", strategy, rank)
        assert share.keys() == files[rank].keys()
        for name, (_, shape, data) in files[rank].items():
            assert (share[name].shape, share[name].tobytes()) == (shape, data), name
    assert open_strategy(strategy).num_ranks == 8
    with pytest.raises(LayoutError, match="the target has ranks 0 to 7"):
        js.load_rank(job / "checkpoint", strategy, 8)


def test_the_share_of_a_complete_checkpoint_is_all_of_it(ranks: Path) -> None:
    whole = js.load_rank(ranks, "full")
    assert {n: a.tobytes() for n, a in whole.items()} == {n: a.tobytes() for n, a in ARRAYS.items()}
    with pytest.raises(LayoutError, match="there is rank 0 only"):
        js.load_rank(ranks, "full", 1)


def test_a_rank_of_the_configured_job_is_loaded_as_numpy(job: Path) -> None:
    whole = ms.weights(golden("dp2mp2pp2", "full", "full.safetensors"))
    share = mindformers.load_rank(config(job), rank=1)
    _, shape, data = whole[WQ]
    rows = np.frombuffer(data, np.uint16).reshape(shape)[shape[0] // 2 :]
    assert share[WQ].tobytes() == rows.tobytes()
    assert not any(n.startswith("adam_") for n in share)


def test_ranks_with_their_own_files_are_chosen_by_the_name_to_resume(
    training: Path,
) -> None:
    newer = {n: a + 1 for n, a in ARRAYS.items()}
    write_ranks(
        training, lambda r: {**held_by(r, newer), **NUMBERS}, "net_rank_{r}-1_20.safetensors"
    )
    for name in ("net_rank_3-1_10.safetensors", "net_rank_k-1_10", "net_rank_0-1_10"):
        asked = mindformers.from_config(
            {"load_checkpoint": str(training), "resume_training": name, "use_parallel": True}
        )
        assert (asked.suffix, asked.with_states) == ("-1_10", True)
        share = js.load_rank(
            asked.open(), LAYOUT, 0, exclude=asked.exclude(asked.open()), include="^wq"
        )
        assert share["wq"].tobytes() == held_by(0)["wq"].tobytes()


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("name", ["net_rank_0-1_20.safetensors", "other-1_10", True])
def test_a_file_to_resume_from_counts_and_not_the_name_beside_it(
    kind: str, name: str | bool, tmp_path: Path
) -> None:
    """MindFormers' guide: the weights of load_checkpoint count, the name has no effect."""
    (tmp_path / "rank_0").mkdir()
    place = write_ranks(tmp_path, held_by, f"net_rank_{{r}}-1_10.{kind}", ranks=(0,))
    file = place / "rank_0" / f"net_rank_0-1_10.{kind}"
    found = asked({"load_checkpoint": str(file), "resume_training": name})
    assert (found.suffix, found.with_states) == (None, True)
    assert [f"resume_training is {name}, which has no effect" in n for n in found.notes] == (
        [True] if isinstance(name, str) else []
    )
    assert js.load_rank(found.open(), "full")["wq"].tobytes() == held_by(0)["wq"].tobytes()


def test_gradients_that_are_not_loaded_are_noted(training: Path) -> None:
    told = {"load_checkpoint": str(training), "resume_training": True, "use_parallel": True}
    catalog = asked(told).open()
    (note,) = [n for n in catalog.notes if "gradients" in n]
    assert note == (
        "3 accumulated gradients are not loaded: accu_grads.norm, accu_grads.wo, accu_grads.wq."
    )


# --- the keys ------------------------------------------------------------------------------


def asked(told: Mapping[str, Any]) -> mindformers.Loading:
    return mindformers.from_config(told)


def test_load_checkpoint_wins_over_the_pretrained_model(job: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    both = asked(config(job, pretrained_model_dir=str(tmp_path / "hf")))
    assert both.path == job / "checkpoint"
    assert both.notes == (
        f"load_checkpoint is loaded, not pretrained_model_dir ({tmp_path / 'hf'}).",
    )
    alone = asked({"load_checkpoint": "", "pretrained_model_dir": str(tmp_path / "hf")})
    assert (alone.path, alone.notes) == (tmp_path / "hf", ())
    new = asked({"checkpoint": {"load_path": str(job)}, "load_checkpoint": str(job)})
    assert (new.path, new.notes) == (job, ())


@pytest.mark.parametrize(
    ("values", "strategy", "note"),
    [
        ({}, "dp1mp2vocabdp", None),  # vocab_emb_dp is on where nothing is said
        ({"parallel_config": {"data_parallel": 2, "pipeline_stage": 2}}, "dp2mp1pp2", None),
        ({"parallel_config": {**TWO, "vocab_emb_dp": True}}, "dp1mp2vocabdp", None),
        ({"parallel_config": {**TWO, "vocab_emb_dp": False}}, "dp1mp2", None),
        ({"parallel_config": {"data_parallel": 4, "expert_parallel": 2}}, "dp4mp1ep2", None),
        ({"parallel": {"enable_parallel_optimizer": True}}, "dp1mp2optallvocabdp", None),
        (
            {
                "parallel": {
                    "enable_parallel_optimizer": True,
                    "parallel_optimizer_config": {"optimizer_weight_shard_size": 2},
                }
            },
            "dp1mp2opt2vocabdp",
            None,
        ),
        (
            {"use_parallel": None},
            "dp1mp2vocabdp",
            "use_parallel is absent, but parallel_config has 2",
        ),
        ({"use_parallel": False}, "dp1mp1", r"parallel_config \(dp1mp2vocabdp\) is not used"),
        ({"use_parallel": False, "parallel_config": {}}, "dp1mp1", None),
        (
            {
                "parallel_config": {"pipeline_stage": 2},
                "model": {"model_config": {"offset": [1, -1]}},
            },
            "dp1mp1pp2",
            r"offset is \[1, -1\], but layers are assigned to the 2 stages in order and evenly",
        ),
        (
            {
                "parallel_config": {"pipeline_stage": 2},
                "model": {"model_config": {"offset": [[0, 0]], "pp_interleave_num": 2}},
            },
            "dp1mp1pp2",
            "pp_interleave_num is 2, but layers",
        ),
        ({"model": {"model_config": {"offset": 1, "pp_interleave_num": 2}}}, "dp1mp2vocabdp", None),
        (
            {"parallel_config": {"data_parallel": 2, "expert_model_parallel": 2}},
            "dp2mp1",
            "expert_model_parallel is 2, but experts are sharded over mp",
        ),
    ],
)
def test_the_strategy_is_that_of_the_parallel_config(
    job: Path, values: dict[str, Any], strategy: str, note: str | None
) -> None:
    found = asked(config(job, **values))
    assert found.strategy == Strategy.parse(strategy)
    assert bool(found.notes) == (note is not None)
    if note:
        with pytest.raises(AssertionError, match=note):
            raise AssertionError(found.notes[0])


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"remove_redundancy": False}, "remove_redundancy is False, but shards are stored once"),
        ({"remove_redundancy": True}, None),
        ({}, None),
        ({"load_ckpt_format": "ckpt"}, "load_ckpt_format is ckpt, but the files are safetensors"),
        ({"load_ckpt_format": "safetensors"}, None),
        ({"auto_trans_ckpt": False}, "but the checkpoint has 8 ranks and the job has 2"),
    ],
)
def test_contradictions_are_noted_and_the_files_decide(
    job: Path, values: dict[str, Any], note: str | None
) -> None:
    catalog = asked(config(job, **values)).open()
    said = [n for n in catalog.notes if n.split()[0] in {*values, "the"}]
    assert len(said) == (note is not None), catalog.notes
    assert note is None or note in said[0]


def test_ckpt_files_with_all_replicas_are_recognised_too(tmp_path: Path, job: Path) -> None:
    shutil.copytree(golden("dp4mp2_opt2", "src_ckpt"), tmp_path / "c" / "checkpoint")
    shutil.copytree(golden("dp4mp2_opt2", "strategy"), tmp_path / "c" / "strategy")
    told = config(tmp_path / "c", remove_redundancy=True, load_ckpt_format="safetensors")
    notes = " ".join(asked(told).open().notes)
    assert "load_ckpt_format is safetensors, but the files are ckpt; they are read." in notes
    assert "remove_redundancy is True, but shards are stored by every replica" in notes


def test_the_source_strategy_may_be_named(tmp_path: Path, ranks: Path) -> None:
    (ranks.parent / "strategy").rename(tmp_path / "elsewhere")
    told = {"load_checkpoint": str(ranks), "src_strategy_path_or_dir": str(tmp_path / "elsewhere")}
    assert asked(told).open().layout.num_ranks == 4
    with pytest.raises(NotFoundError, match="src_strategy_path_or_dir: nowhere does not exist"):
        asked({**told, "src_strategy_path_or_dir": "nowhere"})


def test_states_are_loaded_when_training_goes_on(job: Path) -> None:
    for values, with_states in (
        ({}, False),
        ({"resume_training": True}, True),
        ({"checkpoint": {"no_load_optim": False}}, True),
        ({"checkpoint": {"no_load_optim": True}, "resume_training": True}, False),
    ):
        assert asked(config(job, **values)).with_states == with_states


@pytest.mark.parametrize(
    ("values", "error", "why"),
    [
        ({"load_checkpoint": ""}, NotFoundError, "names no checkpoint"),
        ({"load_checkpoint": "nowhere"}, NotFoundError, "load_checkpoint: nowhere does not exist"),
        ({"load_checkpoint": True}, FormatError, "load_checkpoint: True is not a path"),
        ({"parallel_config": {"model_parallel": "2"}}, FormatError, "'2' is not a number of ranks"),
        ({"parallel_config": {"model_parallel": 0}}, LayoutError, "mp=0"),
        ({"parallel_config": 3}, FormatError, "parallel_config: 3 is not a mapping"),
        ({"resume_training": 1.5}, FormatError, "not True, False or a file's name"),
    ],
)
def test_values_that_mean_nothing_are_refused(
    job: Path, values: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        asked(config(job, **values))


def test_only_save_strategy_is_pointed_elsewhere(job: Path) -> None:
    assert "jaxshard strategy make" in asked(config(job, only_save_strategy=True)).notes[0]


def test_balanced_loading_and_its_threads_are_passed_to_load(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {"load_path": str(job), "load_balanced": True, "reshard_worker_num": 3}
    for values in ({"checkpoint": new}, {"balanced_load": True, "reshard_worker_num": 3}):
        assert asked(config(job, **values)).how == {"balanced": True, "workers": 3}
    assert asked(config(job)).how == {}
    given = {}
    monkeypatch.setattr("jaxshard.loader.load", lambda *a, **how: given.update(how))
    mindformers.load(config(job, checkpoint=new), workers=1)
    assert (given["balanced"], given["workers"]) == (True, 1)


def test_the_named_format_decides_if_both_exist(ranks: Path) -> None:
    newer = {n: a + 1 for n, a in ARRAYS.items()}
    write_ranks(ranks, lambda r: held_by(r, newer), "net_rank_{r}-1_10.ckpt")
    told = {"load_checkpoint": str(ranks), "use_parallel": True}
    with pytest.raises(
        CoverageError, match=r"Choose with suffix= \(--suffix\): \.ckpt or \.safetensors"
    ):
        asked(told).open()
    for kind in ("ckpt", "safetensors"):
        for resume in (False, "net_rank_0-1_10"):
            found = asked({**told, "load_ckpt_format": kind, "resume_training": resume}).open()
            assert {f.path.rsplit(".")[-1] for f in found.files} == {kind}
    with pytest.raises(CoverageError, match="expected one file type"):
        asked({**told, "load_ckpt_format": "other"}).open()


def test_the_monitor_of_a_configuration_becomes_a_manager(tmp_path: Path) -> None:
    monitor = {
        "type": "CheckpointMonitor",
        "prefix": "llama",
        "save_checkpoint_steps": 100,
        "keep_checkpoint_max": 3,
        "async_save": "thread",
        "save_network_params": True,
        "checkpoint_format": "safetensors",
    }
    told = {"callbacks": [{"type": "MFLossMonitor"}, monitor]}
    wanted = {
        "directory": "./output",
        "prefix": "llama",
        "save_every_steps": 100,
        "keep_max": 3,
        "async_save": True,
        "save_network_only": True,
        "format": "ranks",
    }
    assert mindformers.saving(told) == wanted
    section = {"save_path": str(tmp_path), "save_max": 2, "no_save_optim": True, "prefix": "llama"}
    new = mindformers.saving({**told, "checkpoint": section})
    assert new == {
        "directory": str(tmp_path),
        "prefix": "llama",
        "keep_max": 2,
        "save_optimizer": False,
        "format": "iteration",
    }
    for arguments in (wanted, new):
        CheckpointManager(**arguments)
    assert mindformers.saving({}) == {}
    with pytest.raises(FormatError, match="callbacks: 3 is not a list"):
        mindformers.saving({"callbacks": 3})


# --- YAML ----------------------------------------------------------------------------------


def test_a_yaml_file_equals_a_mapping(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    place = tmp_path / "run.yaml"
    place.write_text(
        f"""seed: 0
load_checkpoint: '{job / "checkpoint"}'
auto_trans_ckpt: True  # comments and anchors are YAML's
use_parallel: True
parallel_config: &parallel
  data_parallel: 1
  model_parallel: 2
  pipeline_stage: 1
callbacks:
  - type: CheckpointMonitor
    prefix: "llama"
"""
    )
    assert asked(place) == asked(config(job))
    share = mindformers.load_rank(place, 0)
    assert WQ in share


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_configuration_is_refused(text: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(FormatError, match=r"run.yaml(: not YAML| is not a mapping)"):
        asked(tmp_path / "run.yaml")


def test_a_missing_file_and_a_missing_library_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        mindformers.read_yaml(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("a: 1")
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(StorageError, match=r"Install jaxshard\[yaml\], or pass the configuration"):
        mindformers.read_yaml(tmp_path / "run.yaml")


# --- the page ------------------------------------------------------------------------------

SECTIONS = ("checkpoint", "parallel", "model.model_config")
NAMED = (
    *("load_checkpoint", "load_ckpt_format", "auto_trans_ckpt", "src_strategy_path_or_dir"),
    *("remove_redundancy", "pretrained_model_dir", "transform_process_num", "resume_training"),
    *("transform_checkpoint.py", "unified_safetensors.py", "convert_reversed.py", ".sh"),
    *("transform_ckpt_lora.py", "merge_pipeline_strategys", "load_distributed_checkpoint"),
    *("ckpt_to_safetensors", "safetensors_to_ckpt", "CheckpointMonitor", "only_save_strategy"),
    *("callbacks", "load_balanced", "reshard_worker_num", "no_load_optim", "vocab_emb_dp"),
    *("pp_interleave_num", "offset", "expert_model_parallel", "use_parallel", "file_suffix"),
    *("transform_checkpoints", "unified_safetensors", "choice_func", "name_map", "crc_check"),
)


def test_the_page_tells_of_every_script_key_and_function_that_is_replaced() -> None:
    page = (Path(__file__).parents[2] / "docs" / "mindformers.md").read_text()
    words = set(re.findall(r"[.\w]+", " ".join(re.findall(r"`([^`\n]+)`", page))))
    assert [n for n in NAMED if not words & {n, *(f"{s}.{n}" for s in SECTIONS)}] == []


def test_the_commands_of_the_page_are_commands() -> None:
    page = (Path(__file__).parents[2] / "docs" / "mindformers.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```sh\n")[1:]]
    commands = [
        line.split()[1:]
        for block in blocks
        for line in block.splitlines()
        if line.startswith("jaxshard ")
    ]
    assert len(commands) >= 5
    for command in commands:
        assert parser().parse_args(command).command
    with pytest.raises(SystemExit):
        parser().parse_args(["convert", "a", "b", "--no-such-flag"])
