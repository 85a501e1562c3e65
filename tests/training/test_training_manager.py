"""States saved from devices come back on other devices, bit for bit."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import threading
from pathlib import Path

import golden_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from training_states import SPECS, described, lies_as, mesh, same, state

import jaxshard as js
from jaxshard.devices.host_shards import Snapshot
from jaxshard.errors import FormatError, LayoutError, NotFoundError, StorageError
from jaxshard.training import CheckpointManager, restore_state, resume_point, save_step
from jaxshard.training.state import Roles

FORMATS = ("ranks", "iteration", "huggingface", "orbax")
NUMBERS = {"epoch_num", "step_num", "global_step", "loss_scale", "global_batch_size"}


def _manager(directory: Path, **how: object) -> CheckpointManager:
    return CheckpointManager(directory, **({"prefix": "llama", "fsync": False} | how))


# --- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("remove_redundancy", [False, True])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, format, remove_redundancy):
    before = state(2, 4)
    manager = _manager(tmp_path, format=format, remove_redundancy=remove_redundancy)
    manager.save(10, before, extras={"data": {"file": 3}}, loss_scale=1024.0)
    for target in (state(2, 4, 1), state(4, 2, 1), state(1, 2, 1), described(state(8, 1, 1))):
        found = manager.restore(target, verify=True)
        assert same(found.state, before)
        assert lies_as(found.state["params"], target["params"])
        assert lies_as(found.state["opt_state"][0].mu, target["opt_state"][0].mu)
        assert (found.step, found.extras) == (10, {"data": {"file": 3}})


@pytest.mark.parametrize(
    ("asynchronous", "how"), [(False, "auto"), (True, "auto"), (False, "copy"), (True, "copy")]
)
def test_what_is_saved_is_the_state_of_that_step_though_the_next_step_takes_its_memory(
    tmp_path, asynchronous, how, monkeypatch
):
    gate = threading.Event()
    written = save_step._write_step

    def wait_first(job):
        assert gate.wait(30), "the loop was kept until the files were written"
        return written(job)

    if asynchronous:
        monkeypatch.setattr(save_step, "_write_step", wait_first)
    manager = _manager(tmp_path, async_save=asynchronous, snapshot=how)
    now = state(2, 4)
    kept = jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, now)
    before = {n: np.array(a) for n, a in now["params"].items()}
    step = jax.jit(lambda p: jax.tree.map(lambda x: x * 2 + 1, p), donate_argnums=0)
    manager.save(1, now)
    assert manager._background.is_busy == asynchronous
    params = now["params"]
    for _ in range(3):
        params = step(params)
    jax.block_until_ready(params)
    now["seen"][:] = -1  # NumPy's memory is the loop's own
    gate.set()
    manager.wait()
    found = manager.restore(state(2, 4, 9))
    assert all(np.array_equal(found.state["params"][n], before[n]) for n in before)
    assert np.array_equal(found.state["seen"], kept["seen"])


def test_an_array_that_was_given_away_during_a_save_is_found_out(tmp_path, monkeypatch):
    manager = _manager(tmp_path)
    manager.save(1, state(2, 4))
    now = state(2, 4, 1)
    written = save_step._write_step

    def deleted_meanwhile(job):
        now["params"]["model.norm.weight"].delete()
        return written(job)

    monkeypatch.setattr(save_step, "_write_step", deleted_meanwhile)
    with pytest.raises(StorageError, match="deleted while it was being saved"):
        manager.save(2, now)
    assert manager.latest_step() == 1


@pytest.mark.parametrize("how", ["auto", "copy"])
def test_a_snapshot_holds_each_distinct_shard_once(how):
    arrays = state(2, 4)["params"]
    snapshot = Snapshot(arrays, mode=how)
    assert snapshot.num_bytes == sum(a.nbytes for a in arrays.values())
    shared = [
        any(
            np.shares_memory(memory, np.asarray(shard.data).view(np.uint8))
            for a in arrays.values()
            for shard in a.addressable_shards
        )
        for memory in snapshot._views.values()
    ]
    assert all(shared) == (how == "auto")


@pytest.mark.parametrize("how", ["auto", "copy"])
def test_whole_arrays_are_put_together_from_shards_where_the_host_cannot_look(how, monkeypatch):
    arrays = state(2, 4)["params"]
    if how == "auto":
        monkeypatch.setattr("jaxshard.devices.host_shards.is_on_host", lambda shard: False)
    whole = Snapshot(arrays, mode=how).whole()
    assert all(isinstance(whole[n], np.ndarray) for n in arrays)
    assert all(np.array_equal(whole[n], arrays[n]) for n in arrays)


def test_pipeline_stages_lie_on_devices_of_their_own_and_come_back_without(tmp_path):
    devices = np.array(jax.devices())
    first, second = (Mesh(devices[n : n + 4].reshape(2, 2), ("dp", "mp")) for n in (0, 4))
    params = {
        "model.layers.0.w": jax.device_put(
            jnp.arange(64.0).reshape(8, 8), NamedSharding(first, P("mp"))
        ),
        "model.layers.1.w": jax.device_put(
            jnp.arange(64.0).reshape(8, 8) + 99, NamedSharding(second, P(None, "mp"))
        ),
    }
    manager = _manager(tmp_path)
    manager.save(1, {"params": params})
    ranks = {
        n: set(
            safetensors.numpy.load_file(
                tmp_path / f"checkpoint/rank_{n}/llama_rank_{n}-1_1.safetensors"
            )
        )
        for n in (0, 3, 4, 7)
    }
    assert "model.layers.0.w" in ranks[0] & ranks[3]
    assert "model.layers.1.w" in ranks[4] & ranks[7]
    assert "model.layers.1.w" not in ranks[0] | ranks[3]
    whole = {
        "params": {
            n: jax.device_put(jnp.zeros((8, 8)), NamedSharding(mesh(1, 8), P("mp"))) for n in params
        }
    }
    found = manager.restore(whole).state
    assert same(found, {"params": {n: np.array(a) for n, a in params.items()}}) or all(
        np.array_equal(found["params"][n], params[n]) for n in params
    )


def test_a_strategy_lays_out_what_has_no_sharding(tmp_path):
    manager = _manager(tmp_path)
    before = state(2, 4)
    manager.save(1, before)
    plain = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, before
    )
    found = manager.restore(plain, strategy="dp4mp2").state
    assert same(found, before)
    q = found["params"]["model.layers.0.self_attn.q_proj.weight"]
    moment = found["opt_state"][0].mu["model.layers.0.self_attn.q_proj.weight"]
    assert {s.data.shape for s in q.addressable_shards} == {(16, 16)}
    assert moment.sharding == q.sharding


def test_a_strategy_alone_gives_arrays_by_name(tmp_path):
    manager = _manager(tmp_path)
    before = state(2, 4)
    manager.save(1, before)
    found = manager.restore("mp8").state
    name = "model.embed_tokens.weight"
    assert np.array_equal(found[name], before["params"][name])
    assert np.array_equal(found[f"adam_m.{name}"], before["opt_state"][0].mu[name])


def test_saving_by_a_strategy_cuts_the_files_whatever_the_arrays_layout(tmp_path):
    manager = _manager(tmp_path, strategy="dp1mp2pp1")
    before = state(2, 4)
    manager.save(1, before)
    assert len(list(tmp_path.glob("checkpoint/rank_*"))) == 2
    assert same(manager.restore(state(4, 2, 1)).state, before)


def test_steps_of_several_layouts_lie_in_one_run(tmp_path):
    """A run that goes on with fewer ranks: each step is read by its own strategy."""
    first, second = state(2, 4), state(1, 2, 5)
    _manager(tmp_path).save(1, first)
    manager = _manager(tmp_path)
    manager.save(2, second)
    assert same(manager.restore(state(4, 2, 8), step=1, verify=True).state, first)
    assert same(manager.restore(state(4, 2, 8), step=2, verify=True).state, second)
    assert len(list(tmp_path.glob("strategy/ckpt_strategy_rank_*"))) == 2
    manager = _manager(tmp_path, keep_max=1)
    manager.save(3, second)
    assert len(list(tmp_path.glob(".jaxshard/strategy-*"))) == 1


_DTYPES = [
    *(np.dtype(n) for n in ("bool", "int8", "uint8", "int16", "uint32", "int64", "uint64")),
    *(np.dtype(n) for n in ("float16", "float32", "float64", "complex64")),
    *(np.dtype(getattr(ml_dtypes, n)) for n in ("bfloat16", "float8_e4m3fn", "float8_e5m2")),
]


@st.composite
def _arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype = draw(st.sampled_from(_DTYPES))
    size = int(np.prod(shape)) * dtype.itemsize
    data = (
        bytes(n % 2 for n in range(size))
        if dtype.kind == "b"
        else draw(st.binary(min_size=size, max_size=size))
    )
    return np.frombuffer(data, dtype).reshape(shape)


_LEAVES = st.one_of(
    _arrays(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.integers(0, 255).map(np.uint8),
)
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(
    st.fixed_dictionaries({"params": _TREES, "rest": _TREES}),
    st.sampled_from(["ranks", "huggingface"]),
)
def test_any_tree_of_arrays_and_numbers_comes_back_as_it_was(tree, format):
    if not jax.tree.leaves(tree):
        return
    with tempfile.TemporaryDirectory() as directory:
        manager = _manager(Path(directory), format=format)
        manager.save(1, tree)
        assert same(manager.restore(tree, verify=True).state, tree)


# --- parts, names ------------------------------------------------------------------------------


def test_parts_leave_the_other_leaves_as_they_are(tmp_path):
    manager = _manager(tmp_path)
    saved = state(2, 4)
    manager.save(1, saved)
    target = state(2, 4, 1)
    for parts, there in (
        ("weights", {"params"}),
        ("optimizer", {"opt_state"}),
        ("no_optimizer", set(target) - {"opt_state"}),
        ("all", set(target)),
    ):
        found = manager.restore(target, parts=parts).state
        for key in target:
            assert same(found[key], saved[key] if key in there else target[key]), (parts, key)


def test_without_the_optimizer_a_step_has_weights_and_the_rest(tmp_path):
    manager = _manager(tmp_path, save_optimizer=False)
    manager.save(1, state(2, 4))
    names = safetensors.numpy.load_file(tmp_path / "checkpoint/rank_0/llama_rank_0-1_1.safetensors")
    assert not any(n.startswith(("adam_", "opt_state")) for n in names)
    assert same(
        manager.restore(state(2, 4, 1), parts="no_optimizer").state["params"], state(2, 4)["params"]
    )
    with pytest.raises(NotFoundError, match="parts='weights'"):
        manager.restore(state(2, 4, 1))


def test_nothing_is_lost_in_silence(tmp_path):
    manager = _manager(tmp_path)
    manager.save(1, state(2, 4))
    fewer = state(2, 4, 1)
    for part in (fewer["params"], fewer["opt_state"][0].mu, fewer["opt_state"][0].nu):
        del part["model.norm.weight"]
    with pytest.raises(
        NotFoundError, match=r"3 tensors of the step are not in the target: .*model\.norm\.weight"
    ):
        manager.restore(fewer)
    assert manager.restore(fewer, strict=False).step == 1
    more = state(2, 4, 1) | {"extra": jnp.zeros(3)}
    with pytest.raises(NotFoundError, match="extra"):
        manager.restore(more)
    wrong = state(2, 4, 1)
    wrong["params"]["model.norm.weight"] = jnp.zeros(17, jnp.float32)
    with pytest.raises(LayoutError, match=r"model\.norm\.weight has shape \(17,\)"):
        manager.restore(wrong)


@pytest.mark.parametrize("bad", ["text", object()])
def test_what_no_file_holds_is_refused_by_name(tmp_path, bad):
    with pytest.raises(LayoutError, match="note is a"):
        _manager(tmp_path).save(1, {"params": {"w": np.ones(2)}, "note": bad})


def test_other_keys_may_be_told(tmp_path):
    roles = Roles(weights="model", optimizer="adam")
    tree = {"model": {"w": np.ones(4)}, "adam": {"mu": {"w": np.ones(4)}}, "n": 1}
    manager = _manager(tmp_path, roles=roles, rename=lambda name: f"net.{name}")
    manager.save(1, tree)
    names = set(
        safetensors.numpy.load_file(tmp_path / "checkpoint/rank_0/llama_rank_0-1_1.safetensors")
    )
    assert {"net.w", "adam_m.net.w", "n"} < names
    assert same(manager.restore({**tree, "n": 0}).state, tree)


def test_weights_of_a_complete_step_are_a_hugging_face_folder(tmp_path):
    manager = _manager(tmp_path, format="huggingface", config={"model_type": "llama"})
    before = state(2, 4)
    manager.save(4, before)
    folder = tmp_path / "checkpoint/llama-1_4"
    found = js.open(folder)
    assert found.model.type == "llama"
    assert set(found.tensors) == set(before["params"])
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    assert all(np.array_equal(held[n], a) for n, a in before["params"].items())


# --- MindFormers' directory ----------------------------------------------------------------------


def test_a_run_has_mindformers_names_numbering_and_contents(tmp_path):
    manager = _manager(
        tmp_path, steps_per_epoch=10, keep_max=2, global_batch_size=16, save_network_only=True
    )
    before = state(1, 2)
    for step in (5, 10, 15):
        manager.save(step, before, loss_scale=64.0)
    listed = {
        p.relative_to(tmp_path).as_posix()
        for p in tmp_path.rglob("*")
        if p.is_file() and ".jaxshard" not in p.parts
    }
    assert listed == {
        *(
            f"checkpoint/rank_{r}/llama_rank_{r}-{s}.safetensors"
            for r in (0, 1)
            for s in ("1_10", "2_5")
        ),
        *(
            f"checkpoint_network/rank_{r}/llama_rank_{r}-network-{s}.safetensors"
            for r in (0, 1)
            for s in ("1_10", "2_5")
        ),
        *(f"checkpoint/rank_{r}/meta.json" for r in (0, 1)),
        *(f"strategy/ckpt_strategy_rank_{r}.ckpt" for r in (0, 1)),
    }
    for rank in (0, 1):
        assert (tmp_path / f"checkpoint/rank_{rank}/meta.json").read_text() == (
            '{"last_epoch": 2, "last_step": 5, '
            f'"last_ckpt_file": "llama_rank_{rank}-2_5.safetensors"}}'
        )
    with safetensors.safe_open(
        tmp_path / "checkpoint/rank_1/llama_rank_1-2_5.safetensors", "np"
    ) as f:
        assert f.metadata() == {"format": "ms", "remove_redundancy": "False"}
        numbers = {n: f.get_tensor(n) for n in f.keys() if n in NUMBERS}  # noqa: SIM118
    assert {n: (str(a.dtype), a.shape, a.item()) for n, a in numbers.items()} == {
        "epoch_num": ("int64", (), 2),
        "step_num": ("int64", (), 15),
        "global_step": ("int32", (1,), 15),
        "loss_scale": ("float32", (), 64.0),
        "global_batch_size": ("int64", (), 16),
    }
    found = manager.restore(state(2, 4, 1))
    assert resume_point(found.progress, global_batch_size=32).initial_step == 7


def test_every_step_of_the_run_opens_as_a_checkpoint(tmp_path):
    manager = _manager(tmp_path)
    before = state(2, 4)
    manager.save(7, before)
    found = js.open(tmp_path / "checkpoint")
    assert {"adam_m.model.norm.weight", "model.norm.weight"} < set(found.tensors)
    assert not js.verify(found).problems
    loaded = js.load(found, "dp4mp2") if hasattr(js, "load") else None
    if loaded is not None:
        assert np.array_equal(loaded["model.norm.weight"], before["params"]["model.norm.weight"])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("options", "folder", "kind", "chosen"),
    [
        ({"save_network_only": True}, "checkpoint_network", "network", ""),
        (
            {"save_trainable_only": True, "trainable": ["norm"]},
            "checkpoint_trainable",
            "trainable_params",
            "norm",
        ),
    ],
)
def test_weights_are_saved_once_more_alone_in_every_format(
    tmp_path, format, options, folder, kind, chosen
):
    before = state(1, 2)
    manager = _manager(tmp_path, format=format, keep_max=1, **options)
    for step in (1, 2):
        manager.save(step, before)
    if format in ("ranks", "iteration"):
        names = [f"rank_{r}/llama_rank_{r}-{kind}-1_2.safetensors" for r in (0, 1)]
    else:
        suffix = folder.removeprefix("checkpoint_")
        names = [f"llama-{suffix}-1_2/model.safetensors"]
    found = sorted((tmp_path / folder).rglob("*.safetensors"))
    assert [p.relative_to(tmp_path / folder).as_posix() for p in found] == names
    wanted = {n: a for n, a in before["params"].items() if chosen in n}
    halves = [safetensors.numpy.load_file(path) for path in found]
    assert all(half.keys() >= wanted.keys() for half in halves)
    assert not any(n.startswith(("adam_", "opt_state")) for half in halves for n in half)
    for name, array in wanted.items():
        dim = {P("mp", None): 0, P(None, "mp"): 1}.get(SPECS[name])
        parts = [half[name] for half in halves]
        whole = parts[0] if dim is None or len(parts) == 1 else np.concatenate(parts, dim)
        assert np.array_equal(whole, array), name
    path = found[-1]  # it belongs to the step: damage to it is damage to the step
    path.write_bytes(path.read_bytes()[:-1])
    assert [s.state for s in manager.steps()] == ["corrupt"]


def test_only_trained_weights_are_copied_when_asked(tmp_path):
    manager = _manager(
        tmp_path, save_trainable_only=True, save_network_only=True, trainable=["norm"]
    )
    manager.save(1, state(1, 2))
    place = tmp_path / "checkpoint_trainable/rank_0/llama_rank_0-trainable_params-1_1.safetensors"
    assert all("norm" in n for n in safetensors.numpy.load_file(place))
    assert not (tmp_path / "checkpoint_network").exists()


def test_a_checkpoint_2_0_run_has_mindformers_names_and_contents(tmp_path):
    manager = _manager(tmp_path, format="iteration", steps_per_epoch=8, global_batch_size=16)
    manager.save(10, state(1, 2), loss_scale=64.0)
    listed = {
        p.relative_to(tmp_path / "checkpoint").as_posix()
        for p in (tmp_path / "checkpoint").rglob("*")
        if p.is_file()
    }
    assert listed == {
        "latest_checkpointed_iteration.txt",
        "iteration_00000010/common.json",
        "iteration_00000010/metadata.json",
        *(
            f"iteration_00000010/llama-{kind}-{rank:07d}-0000002.safetensors"
            for kind in ("model", "opt")
            for rank in (0, 1)
        ),
    }
    assert (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").read_text() == "10"
    common = json.loads((tmp_path / "checkpoint/iteration_00000010/common.json").read_text())
    numbers = {"epoch_num": 2, "step_num": 10, "global_step": 10, "loss_scale": 64.0}
    assert {n: common[n] for n in numbers} == numbers


@pytest.mark.parametrize("which", ["balanced", "full_copies"])
def test_mindformers_own_iteration_is_restored(which):
    directory = golden_files.golden("mf_iteration_dir", which)
    truth = golden_files.manifest("mf_iteration_dir")["tensors"]
    _check_golden(directory, truth)
    _check_golden(directory / "checkpoint", truth)


@pytest.mark.parametrize("name", ["dp2mp2pp2", "dp4mp2_opt2", "dp4mp2ep2_moe"])
def test_mindspores_own_rank_files_are_restored(tmp_path, name):
    shutil.copytree(golden_files.golden(name, "src_safetensors"), tmp_path / "checkpoint")
    shutil.copytree(golden_files.golden(name, "strategy"), tmp_path / "strategy")
    _check_golden(tmp_path, golden_files.manifest(name)["tensors"])


def _check_golden(directory: Path, truth: dict[str, dict[str, object]]) -> None:
    kinds = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16, "I32": np.int32}
    told = {n: t for n, t in truth.items() if t["dtype"] in kinds and t["shape"]}
    on = NamedSharding(mesh(2, 4), P())
    target = {
        n: jax.ShapeDtypeStruct(tuple(t["shape"]), kinds[t["dtype"]], sharding=on)
        for n, t in told.items()
    }
    found = _manager(directory).restore(target, strict=False)
    assert found.step == 10
    for name, array in found.state.items():
        digest = hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
        assert digest == told[name]["sha256"], name


def test_a_step_that_others_saved_has_no_checksums_to_verify(tmp_path):
    directory = golden_files.golden("mf_iteration_dir", "balanced")
    with pytest.raises(NotFoundError, match="no checksums"):
        _manager(directory).restore({}, verify=True, strict=False)
    with pytest.raises(FormatError, match="no checksums"):
        _manager(directory).restore({}, step=10, verify=True, strict=False)


def test_mindformers_steps_lacking_a_ranks_file_are_passed_over(tmp_path):
    source = golden_files.golden("dp2mp2pp2", "src_safetensors")
    shutil.copytree(source, tmp_path / "checkpoint")
    shutil.copytree(golden_files.golden("dp2mp2pp2", "strategy"), tmp_path / "strategy")
    for rank in range(8):
        folder = tmp_path / f"checkpoint/rank_{rank}"
        path = folder / f"net_rank_{rank}-1_10.safetensors"
        if rank != 3:
            shutil.copyfile(path, folder / f"net_rank_{rank}-1_20.safetensors")
        (folder / "meta.json").write_text(json.dumps({"last_epoch": 1, "last_step": 20}))
    found = _manager(tmp_path).restore({}, strict=False)
    assert (found.name.step, found.passed_over[0][0]) == (10, "1_20")
    assert "rank 3" in found.passed_over[0][1]


# --- when, and how many --------------------------------------------------------------------------


def test_a_loop_saves_when_it_is_time_and_keeps_what_it_should(tmp_path):
    time = [0.0]
    manager = _manager(
        tmp_path,
        save_every_steps=4,
        save_every_seconds=60,
        keep_max=2,
        keep_every=8,
        clock=lambda: time[0],
    )
    tree = {"params": {"w": np.ones(4)}}
    saved = []
    for step in range(1, 22):
        time[0] += 1 if step != 18 else 100
        if manager.maybe_save(step, tree):
            saved.append(step)
    assert saved == [4, 8, 12, 16, 18, 20]
    assert [s.global_step for s in manager.steps()] == [8, 16, 18, 20]


def test_a_run_resumed_from_an_earlier_step_keeps_what_it_saves(tmp_path):
    manager = _manager(tmp_path, keep_max=2)
    for step in (10, 20, 30):
        manager.save(step, {"params": {"w": np.full(4, step)}})
    manager.save(21, {"params": {"w": np.full(4, 21)}})
    assert [s.global_step for s in manager.steps()] == [30, 20, 21]  # 30 is left behind
    manager.save(30, {"params": {"w": np.full(4, 31)}})  # the step of the run left behind
    assert manager.restore({"params": {"w": np.zeros(4, int)}}).state["params"]["w"][0] == 31


def test_a_run_without_steps_begins_anew(tmp_path):
    manager = _manager(tmp_path / "new")
    assert manager.restore({"params": {"w": np.ones(2)}}, missing_ok=True) is None
    assert manager.latest_step() is None
    assert not (tmp_path / "new").exists()
    with pytest.raises(NotFoundError, match="no steps"):
        manager.restore({"params": {"w": np.ones(2)}})


@pytest.mark.parametrize("wish", [10, "1_10", "llama_rank_0-1_10", "llama_rank_0-1_10.safetensors"])
def test_a_step_may_be_named_in_many_ways(tmp_path, wish):
    manager = _manager(tmp_path)
    for step in (10, 20):
        manager.save(step, {"params": {"w": np.full(2, step)}})
    found = manager.restore({"params": {"w": np.zeros(2, int)}}, step=wish)
    assert found.state["params"]["w"][0] == 10
    with pytest.raises(NotFoundError, match="its steps are 1_20, 1_10"):
        manager.restore({}, step=15)


def test_the_newest_step_is_told_by_what_is_there_and_not_by_a_pointer(tmp_path):
    manager = _manager(tmp_path, format="iteration")
    for step in (1, 2):
        manager.save(step, {"params": {"w": np.ones(2)}})
    (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").write_text("1")
    assert manager.latest_step() == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "huggingfase"}, "Did you mean huggingface"),
        ({"prefix": "../x"}, "prefix"),
        ({"keep_max": -1}, "keep_max"),
        ({"save_every_steps": -1}, "negative"),
        ({"trainable": ["("]}, "regular expression"),
    ],
)
def test_impossible_options_are_refused_at_once(tmp_path, options, said):
    with pytest.raises(LayoutError, match=said):
        CheckpointManager(tmp_path, **options)


def test_there_is_never_more_than_one_writer(tmp_path, monkeypatch):
    at_once, most = [0], [0]
    written = save_step._write_step

    def counted(job):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        try:
            return written(job)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(save_step, "_write_step", counted)
    with _manager(tmp_path, async_save=True) as manager:
        for step in range(1, 8):
            manager.save(step, {"params": {"w": np.full(1000, step)}})
    assert most == [1]
    assert manager.latest_step() == 7


def test_an_interrupted_save_is_gone_on_with_and_said(tmp_path, caplog):
    manager = _manager(tmp_path)
    manager.save(1, {"params": {"w": np.ones(2)}})
    (tmp_path / ".jaxshard/1_2.saving").mkdir()
    with caplog.at_level(logging.INFO, logger="jaxshard.training"):
        assert manager.restore({"params": {"w": np.zeros(2)}}).step == 1
    assert "1_2.saving was never finished" in caplog.text


def test_a_config_that_is_none_is_refused_at_once(tmp_path):
    with pytest.raises(LayoutError, match=r"for config\.json"):
        CheckpointManager(tmp_path, config={"a": object()})


# --- limits, and files that change, for what is restored to the host ------------------------------


@pytest.mark.parametrize("option", ["workers", "host_bytes"])
def test_no_threads_and_no_memory_are_refused_and_are_not_the_default(tmp_path, option):
    with pytest.raises(LayoutError, match=r"at least 1|not a size"):
        _manager(tmp_path, **{option: 0})


def test_host_bytes_limit_what_is_read_to_the_host_too(tmp_path, monkeypatch):
    tree = {"params": {"w": np.ones(1 << 20, np.float32)}}
    _manager(tmp_path).save(1, tree)
    held = []
    run = restore_state.run

    def counted(*given, budget, **how):
        held.append(budget.host_bytes)
        return run(*given, budget=budget, **how)

    monkeypatch.setattr(restore_state, "run", counted)
    assert _manager(tmp_path, host_bytes=1 << 20).restore(tree).step == 1
    assert held
    assert max(held) <= 1 << 20


def test_a_file_that_changes_while_it_is_read_to_the_host_is_not_believed(tmp_path, monkeypatch):
    tree = {"params": {"w": np.ones(8, np.float32)}}
    manager = _manager(tmp_path)
    manager.save(1, tree)
    manager.save(2, tree)
    run, path = restore_state.run, tmp_path / "checkpoint/rank_0/llama_rank_0-1_2.safetensors"
    data = path.read_bytes()

    def changed_meanwhile(*given, **how):
        counts = run(*given, **how)
        path.write_bytes(data)
        return counts

    monkeypatch.setattr(restore_state, "run", changed_meanwhile)
    found = manager.restore(tree)
    assert (found.step, found.passed_over[0][0]) == (1, "1_2")
    assert "changed while being read" in found.passed_over[0][1]
