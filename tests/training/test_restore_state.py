"""A run that is restored goes on: with the next jitted step, or from an earlier one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from training_states import OPTIMIZER, SHAPES, described, lies_as, mesh, same, state

from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.mapping import Mapping, Rename, Transpose
from jaxshard.training import CheckpointManager, policy, run_directory
from jaxshard.training.policy import Lineage

FORMATS = ("ranks", "iteration", "huggingface", "orbax")


def _manager(directory: Path, **how: Any) -> CheckpointManager:
    return CheckpointManager(directory, **({"prefix": "llama", "fsync": False} | how))


def _saved(directory: Path, *steps: int, **how: Any) -> CheckpointManager:
    """A manager that has saved ``steps``, each with its number as the state."""
    manager = _manager(directory, **how)
    for step in steps:
        manager.save(step, _number(step))
    return manager


def _number(step: int) -> dict[str, Any]:
    return {"params": {"w": np.full(4, step)}}


def _restored(directory: Path, **how: Any) -> int:
    found = _manager(directory, **how).restore(_number(0))
    assert found.state["params"]["w"][0] == found.step
    return found.step


def _names(manager: CheckpointManager) -> list[str]:
    return [str(step.name) for step in manager.steps()]


# --- the next step of training -------------------------------------------------------------------


@jax.jit
def _train(tree: dict[str, Any]) -> dict[str, Any]:
    """One program over the whole state: weights on a mesh, counters and keys on none."""
    key, used = jax.random.split(tree["key"])
    noise = jax.random.normal(used, ())
    grads = jax.tree.map(lambda w: w * 0.1 + noise.astype(w.dtype), tree["params"])
    updates, after = OPTIMIZER.update(grads, tree["opt_state"], tree["params"])
    params = optax.apply_updates(tree["params"], updates)
    return {"params": params, "opt_state": after, "key": key, "count": tree["count"] + 1}


def _trainable(dp: int, mp: int, seed: int = 0) -> dict[str, Any]:
    """A state as optax makes it: its counters and the key are nowhere in particular."""
    params = state(dp, mp, seed)["params"]
    return {
        "params": params,
        "opt_state": OPTIMIZER.init(params),
        "key": jax.random.key(seed),
        "count": jnp.int32(seed),
    }


@pytest.mark.parametrize("format", FORMATS)
def test_the_next_jitted_step_takes_the_whole_restored_state(tmp_path, format):
    before = _trainable(2, 4)
    manager = _manager(tmp_path, format=format)
    manager.save(1, before)
    found = manager.restore(_trainable(2, 4, 1)).state
    assert not found["count"].committed
    assert not found["key"].committed
    assert same(_train(found), _train(before))
    elsewhere = manager.restore(_trainable(4, 2, 1)).state  # and on another mesh
    assert lies_as(_train(elsewhere)["params"], _trainable(4, 2)["params"])


def test_what_was_put_on_a_device_is_there_again(tmp_path):
    manager = _manager(tmp_path)
    device = jax.devices()[3]
    tree = {"params": {"w": jnp.arange(4.0)}, "count": jax.device_put(jnp.int32(1), device)}
    manager.save(1, tree)
    found = manager.restore(tree).state
    assert found["count"].committed
    assert found["count"].devices() == {device}
    assert not found["params"]["w"].committed


def test_numbers_that_are_only_described_are_put_nowhere_and_weights_are_not_guessed(tmp_path):
    manager = _manager(tmp_path)
    before = _trainable(2, 4)
    manager.save(1, before)
    with_shardings = described(before["params"])
    nowhere = jax.eval_shape(lambda: before)
    found = manager.restore({**nowhere, "params": with_shardings, "opt_state": before["opt_state"]})
    assert not found.state["key"].committed
    assert same(found.state, before)
    with pytest.raises(LayoutError, match=r"have no sharding, and there are 8"):
        manager.restore(nowhere)
    assert same(manager.restore(nowhere, strategy="dp2mp4").state, before)


def test_of_64_bits_no_bit_is_lost_where_jax_would_cut_them(tmp_path):
    with jax.enable_x64(True):
        tree = {"params": {"w": jnp.ones(2)}, "seen": jnp.int64(2**40 + 1)}
    manager = _manager(tmp_path)
    manager.save(1, tree)
    found = manager.restore(tree).state
    assert (found["seen"].dtype, int(found["seen"])) == (np.int64, 2**40 + 1)


# --- what an optimizer keeps for a weight lies as the weight -------------------------------------


def _momentum(dp: int, mp: int) -> dict[str, Any]:
    params = state(dp, mp)["params"]
    return {"params": params, "opt_state": optax.sgd(1e-2, momentum=0.9).init(params)}


@pytest.mark.parametrize("layout", ["dp2mp4", "dp4mp2"])
def test_a_strategy_lays_out_any_optimizers_state_as_the_weights(tmp_path, layout):
    before = _momentum(2, 4)
    manager = _manager(tmp_path)
    manager.save(1, before)
    found = manager.restore(jax.eval_shape(lambda: before), strategy=layout).state
    assert same(found, before)
    assert lies_as(found["opt_state"][0].trace, found["params"])
    by_name = manager.restore(layout).state
    for name in SHAPES:
        kept = by_name[f"opt_state.0.trace.{name}"]
        assert kept.sharding.is_equivalent_to(by_name[name].sharding, kept.ndim)
        assert np.array_equal(kept, before["opt_state"][0].trace[name])


def test_a_strategy_cuts_any_optimizers_state_when_saving_too(tmp_path):
    before = _momentum(1, 1)
    _manager(tmp_path, strategy="mp4").save(1, before)
    found = _manager(tmp_path).restore("mp4")
    name = "model.embed_tokens.weight"
    path = tmp_path / "checkpoint/rank_0/llama_rank_0-1_1.safetensors"
    held = safetensors.numpy.load_file(path)
    assert held[f"opt_state.0.trace.{name}"].shape == held[name].shape == (16, 16)
    assert np.array_equal(found.state[f"opt_state.0.trace.{name}"], before["params"][name] * 0)


def test_what_follows_no_weight_is_whole_everywhere_and_said(tmp_path, caplog):
    before = {**_momentum(1, 1), "table": jnp.zeros((64, 64), jnp.int32)}
    manager = _manager(tmp_path)
    manager.save(1, before)
    with caplog.at_level(logging.WARNING):
        assert manager.restore("mp4").state["table"].sharding.is_fully_replicated
    assert "1 tensors match no rule and no weight" in caplog.text
    assert "table" in caplog.text


@pytest.mark.parametrize(
    ("parts", "there"),
    [
        ("weights", {"model.norm.weight"}),
        ("optimizer", {"adam_m.model.norm.weight", "opt_state.0.count"}),
        ("no_optimizer", {"model.norm.weight", "step"}),
    ],
)
def test_parts_hold_for_arrays_by_name_too(tmp_path, parts, there):
    manager = _manager(tmp_path)
    manager.save(1, state(2, 4))
    every = {"model.norm.weight", "adam_m.model.norm.weight", "opt_state.0.count", "step"}
    found = manager.restore("dp4mp2", parts=parts).state
    assert every & found.keys() == there


# --- going back, and counting anew ---------------------------------------------------------------


def test_a_run_that_went_back_is_resumed_from_what_it_saved_last(tmp_path, caplog):
    _saved(tmp_path, 10, 20, 30)
    again = _manager(tmp_path)
    again.restore(_number(0), step=20)
    with caplog.at_level(logging.INFO):
        again.save(21, _number(21))
    assert "step 1_21 does not continue 1_30, which the run leaves behind" in caplog.text
    assert _names(again) == ["1_30", "1_10", "1_20", "1_21"]
    with caplog.at_level(logging.WARNING):
        assert _restored(tmp_path) == 21
    assert "step 1_21: it is restored instead of 1_30, which the run left behind" in caplog.text
    assert again.latest_step() == 21


def test_if_the_last_step_is_damaged_its_own_past_comes_before_what_was_left_behind(tmp_path):
    _saved(tmp_path, 10, 20, 30)
    again = _manager(tmp_path)
    again.restore(_number(0), step=20)
    again.save(21, _number(21))
    for step, expected in ((21, 20), (20, 10), (10, 30)):
        path = tmp_path / f"checkpoint/rank_0/llama_rank_0-1_{step}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert _restored(tmp_path) == expected


def test_with_a_larger_batch_steps_are_counted_anew_and_the_last_saved_is_the_newest(tmp_path):
    """2_50 is step 150 of 100 an epoch; with twice the batch it is step 75 of 50."""
    _saved(tmp_path, 50, 100, 150, steps_per_epoch=100, keep_max=3)
    larger = _manager(tmp_path, steps_per_epoch=50, keep_max=3)
    assert larger.restore(_number(0)).name.step == 50
    for step in (80, 90):
        larger.save(step, _number(step))
    assert _restored(tmp_path) == 90
    assert _names(larger) == ["2_50", "2_30", "2_40"]  # the two oldest went, and nothing newer
    path = tmp_path / "checkpoint/rank_0/llama_rank_0-2_40.safetensors"
    path.unlink()
    assert _restored(tmp_path) == 80


def test_what_was_left_behind_goes_once_the_run_has_come_further(tmp_path):
    _saved(tmp_path, 10, 20, 30, keep_max=2)
    again = _manager(tmp_path, keep_max=2)
    again.restore(_number(0), step=20)
    again.save(25, _number(25))
    assert _names(again) == ["1_30", "1_20", "1_25"]
    again.save(35, _number(35))
    assert _names(again) == ["1_25", "1_35"]


def test_a_look_at_an_old_steps_weights_is_no_going_back(tmp_path):
    manager = _saved(tmp_path, 10, 20)
    manager.restore(_number(0), step=10, parts="weights")
    manager.save(30, _number(30))
    assert _names(manager) == ["1_10", "1_20", "1_30"]
    assert not any(step.abandoned for step in manager.steps())


def test_a_run_begun_anew_in_the_same_place_is_not_mistaken_for_the_old_one(tmp_path):
    _saved(tmp_path, 10, 20)
    _saved(tmp_path, 5)
    assert _restored(tmp_path) == 5


@pytest.mark.parametrize("seed", range(20))
def test_the_step_saved_last_is_restored_first_whatever_a_run_does(seed):
    """A law of lineages: the last one's past, backwards, and every other save after it."""
    chance = np.random.default_rng(seed)
    lines: list[Lineage] = []
    parents: dict[int, int] = {}
    for _ in range(12):
        after = lines[chance.integers(len(lines))] if lines and chance.random() < 0.9 else None
        lines.append(policy.next_lineage(after, len(lines)))
        parents[lines[-1].order] = after.order if after else 0
    for line in lines:
        past, at = set(), line.order
        while at:
            past.add(at)
            at = parents[at]
        assert {n for n in parents if line.descends_from(n)} == past


# --- what a caller may give ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.int64, np.int32, jnp.int32, np.array])
def test_numbers_of_numpy_and_jax_are_as_good_as_pythons(tmp_path, number):
    manager = _manager(
        tmp_path, global_batch_size=number(16), steps_per_epoch=number(8), async_save=True
    )
    manager.save(number(10), _number(10), loss_scale=jnp.float32(64.0))
    manager.close()
    found = manager.restore(_number(0), step=number(10))
    assert found.numbers["global_batch_size"] == 16
    assert found.numbers["loss_scale"] == 64.0
    assert manager.maybe_save(number(11), _number(11)) is False


@pytest.mark.parametrize(
    ("step", "what", "said"),
    [
        (1.5, {}, "step is 1.5, a float. Pass a whole number"),
        ("3", {}, "step is '3', a str"),
        (1, {"loss_scale": "high"}, "loss_scale is 'high'"),
    ],
)
def test_what_is_no_number_is_refused_before_anything_is_written(tmp_path, step, what, said):
    with pytest.raises(LayoutError, match=said):
        _manager(tmp_path, async_save=True).save(step, _number(1), **what)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_storage_error": "ignore"}, r"on_storage_error='ignore' is not one of"),
        ({"snapshot": "cpy"}, "Did you mean copy"),
        ({"global_batch_size": 1.5}, "global_batch_size is 1.5"),
    ],
)
def test_choices_that_there_are_not_are_refused_at_once(tmp_path, options, said):
    with pytest.raises(LayoutError, match=said):
        _manager(tmp_path, **options)


@pytest.mark.parametrize("target", [_number(0), "mp2"])
def test_parts_that_there_are_not_are_refused(tmp_path, target):
    manager = _saved(tmp_path, 1)
    with pytest.raises(LayoutError, match="Did you mean weights"):
        manager.restore(target, parts="weight")


def test_a_loop_that_would_never_save_is_told_once(tmp_path, caplog):
    manager = _manager(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [manager.maybe_save(step, _number(step)) for step in (1, 2)] == [False, False]
    assert caplog.text.count("maybe_save saves nothing") == 1
    with pytest.raises(NotFoundError):
        manager.restore(_number(0))


def test_a_single_device_is_no_guess(tmp_path):
    """The twin of the refusal: of one device there is no other."""
    manager = _manager(tmp_path)
    before = state(1, 1)["params"]
    manager.save(1, {"params": before})
    nowhere = jax.eval_shape(lambda: {"params": before})
    found = manager.restore(nowhere, devices=jax.devices()[2:3]).state["params"]
    lone = SingleDeviceSharding(jax.devices()[2])
    assert all(a.sharding.is_equivalent_to(lone, a.ndim) for a in found.values())
    on_mesh = NamedSharding(mesh(2, 4), P())
    assert not any(a.sharding.is_equivalent_to(on_mesh, a.ndim) for a in found.values())


# --- a run that went back, and crashed before it saved again -------------------------------------


@pytest.mark.parametrize("format", ["ranks", "iteration"])
def test_a_run_that_went_back_and_crashed_before_a_save_resumes_from_where_it_went_back_to(
    tmp_path, format, caplog
):
    _saved(tmp_path, 10, 20, 30, 40, format=format)
    loop = _manager(tmp_path, format=format, save_every_steps=10)
    loop.restore(_number(0), step=30)
    assert not loop.maybe_save(31, _number(31))  # and now it crashes
    again = _manager(tmp_path, format=format, save_every_steps=10)
    assert _names(again) == ["1_40", "1_10", "1_20", "1_30"]
    assert again.steps()[0].reason == "left behind: the run went back to 1_30"
    assert (again.latest_step(), again.restore(_number(0)).step) == (30, 30)
    assert "instead of 1_40, which the run left behind" in caplog.text
    assert not again.maybe_save(31, _number(31))
    again.save(32, _number(32))
    assert _names(again) == ["1_40", "1_10", "1_20", "1_30", "1_32"]
    assert not list((tmp_path / ".jaxshard").glob("*rollback*"))


def test_a_step_that_is_restored_to_be_evaluated_changes_nothing_in_the_run(tmp_path):
    _saved(tmp_path, 10, 20)
    before = sorted(tmp_path.rglob("*"))
    _manager(tmp_path, save_every_steps=10).restore(_number(0), step=10)
    assert sorted(tmp_path.rglob("*")) == before
    assert _restored(tmp_path) == 20


def test_a_run_that_returns_to_a_step_that_it_had_gone_back_from_resumes_from_that_step(tmp_path):
    _saved(tmp_path, 10, 20)
    for step in (10, 20):
        loop = _manager(tmp_path, save_every_steps=10)
        loop.restore(_number(0), step=step)
        loop.maybe_save(step + 1, _number(step + 1))
        assert _restored(tmp_path) == step


def test_the_rollback_of_one_job_is_none_of_another(tmp_path):
    _saved(tmp_path, 10, 20)
    _saved(tmp_path, 11, 21, prefix="other")
    loop = _manager(tmp_path, save_every_steps=10)
    loop.restore(_number(0), step=10)
    loop.maybe_save(11, _number(11))
    assert (_restored(tmp_path), _restored(tmp_path, prefix="other")) == (10, 21)
    _saved(tmp_path, 31, prefix="other")
    assert _restored(tmp_path) == 10


def test_a_loop_that_starts_without_its_manager_grows_from_the_step_it_went_back_to(tmp_path):
    _saved(tmp_path, 10, 20)
    loop = _manager(tmp_path, save_every_steps=10)
    loop.restore(_number(0), step=10)
    loop.maybe_save(11, _number(11))
    again = _manager(tmp_path)
    again.save(25, _number(25))
    assert [str(s.name) for s in again.steps() if s.abandoned] == ["1_20"]


def test_a_rollback_that_cannot_be_recorded_is_logged_and_training_goes_on(
    tmp_path, monkeypatch, caplog
):
    _saved(tmp_path, 10, 20)
    loop = _manager(tmp_path, save_every_steps=10)
    loop.restore(_number(0), step=10)
    monkeypatch.setattr(run_directory, "WAIT_S", 0.1)
    with run_directory.writer_lock(run_directory.RunDirectory.of(tmp_path)):
        assert not loop.maybe_save(11, _number(11))
    assert "the return to step 1_10 is not recorded: another writer" in caplog.text


def test_a_damaged_record_of_a_rollback_is_ignored(tmp_path):
    _saved(tmp_path, 10, 20)
    (tmp_path / ".jaxshard/rollback-llama.json").write_bytes(b"{}\n00000000\n")
    assert _restored(tmp_path) == 20


# --- names=: a state whose tree changed


@pytest.mark.parametrize("format", ["ranks", "huggingface", "orbax", "iteration"])
def test_a_state_is_restored_into_a_tree_that_changed(tmp_path, format):
    random = np.random.default_rng(0)
    linen = {
        "layers_0": {"dense": {"kernel": random.normal(size=(4, 6)).astype("f4")}},
        "layers_1": {"dense": {"kernel": random.normal(size=(4, 6)).astype("f4")}},
    }
    adam = optax.adam(0.1)
    params = jax.tree.map(jnp.asarray, linen)
    state = adam.init(params)
    gradients = jax.tree.map(lambda x: x * 0.5 + 1, params)
    updates, state = adam.update(gradients, state, params)
    before = {"params": optax.apply_updates(params, updates), "opt_state": state, "step": 3}
    with _manager(tmp_path, format=format) as manager:
        manager.save(3, before)

    def turned(tree):  # matrices (out, in), in a list
        return {"blocks": [{"weight": tree[f"layers_{i}"]["dense"]["kernel"].T} for i in (0, 1)]}

    moments = state[0]
    new = {"params": turned(before["params"]), "opt_state": adam.init(turned(params)), "step": 0}
    names = Mapping(
        (
            Transpose(("layers_{layer}.dense.kernel",)),
            Rename((("layers_{layer}.dense.kernel", "blocks.{layer}.weight"),)),
        )
    )
    target = jax.tree.map(lambda x: jnp.zeros_like(x) if isinstance(x, jax.Array) else x, new)
    with _manager(tmp_path, format=format) as manager:
        found = manager.restore(target, names=names)
        with pytest.raises(NotFoundError, match="blocks"):
            manager.restore(target, step=3)
    assert found.step == found.state["step"] == 3
    want = {"params": new["params"], "mu": turned(moments.mu), "nu": turned(moments.nu)}
    got = found.state["opt_state"][0]
    for key, tree in (("params", found.state["params"]), ("mu", got.mu), ("nu", got.nu)):
        jax.tree.map(np.testing.assert_array_equal, tree, want[key])
    assert got.count == moments.count
