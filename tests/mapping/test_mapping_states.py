"""Optimizer states of weights with other values: as optax computes them in the other model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mapping_worlds import Memory, read_all, same

from jaxshard.errors import LayoutError
from jaxshard.loader import load
from jaxshard.mapping import Affine, Cast, Mapping, Pad, Rename, Transpose
from jaxshard.rules import Rules
from jaxshard.rules.match import STATE_ORDERS
from jaxshard.saver import save
from jaxshard.training.state import take_apart

INTO = 6
STEPS = 4
ADAM = optax.adam(3e-2)


def mapping_of(head: int) -> Mapping:
    """From the queries and the norm of one program to those of another that scales neither."""
    return Mapping(
        (
            Affine(("layers.{layer}.q",), head**-0.5),
            Affine(("layers.{layer}.norm",), 1, 1),
            Transpose(("layers.{layer}.q",)),
            Rename(
                (("layers.{layer}.q", "h.{layer}.query"), ("layers.{layer}.norm", "h.{layer}.n"))
            ),
        )
    )


def loss_here(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    q, norm = params["layers.0.q"], params["layers.0.norm"]
    scores = (x * (1 + norm)) @ (q.T * np.float32(q.shape[0] ** -0.5))
    return jnp.mean((scores - y) ** 2)


def loss_there(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(((x * params["h.0.n"]) @ params["h.0.query"] - y) ** 2)


def trained(head: int) -> tuple[Any, Any, Any]:
    """A state of the first model, its weights in the other, and the other's own Adam.

    The other one's Adam sees the gradients of its own loss at the same functions.
    """
    random, mapping = np.random.default_rng(head), mapping_of(head)
    params = {
        "layers.0.q": jnp.asarray(random.normal(size=(head, INTO)), jnp.float32),
        "layers.0.norm": jnp.asarray(random.normal(size=INTO) / 8, jnp.float32),
    }
    here, there = ADAM.init(params), ADAM.init(mapping.apply_arrays(params))
    for _ in range(STEPS):
        x, y = (jnp.asarray(random.normal(size=(5, n)), jnp.float32) for n in (INTO, head))
        others = mapping.apply_arrays(params)
        np.testing.assert_allclose(loss_here(params, x, y), loss_there(others, x, y), rtol=1e-5)
        _, there = ADAM.update(jax.grad(loss_there)(others, x, y), there)
        updates, here = ADAM.update(jax.grad(loss_here)(params, x, y), here)
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": here}, mapping.apply_arrays(params), there


def named(state: Any) -> dict[str, Any]:
    """The arrays of a state by their names in files."""
    return {x.name: np.asarray(x.value) for x in take_apart(state).leaves if x.value.ndim}


@pytest.mark.parametrize("head", [4, 16, 3])
def test_moments_are_what_adam_makes_of_the_other_models_gradients(tmp_path, head) -> None:
    state, params, adam = trained(head)
    want = named({"params": params, "opt_state": adam})
    assert {"h.0.query", "adam_m.h.0.query", "adam_v.h.0.query", "adam_v.h.0.n"} <= want.keys()
    arrays, mapping = named(state), mapping_of(head)
    save(arrays, tmp_path / "step", fsync=False, workers=1)
    memory = Memory(arrays)
    found = {
        "from files": load(tmp_path / "step", jax.devices()[0], names=mapping),
        "from bytes": read_all(memory, mapping.apply(memory.catalog)),
        "with NumPy": mapping.apply_arrays(arrays),
        "with JAX": mapping.apply_arrays({n: jnp.asarray(x) for n, x in arrays.items()}),
    }
    for one in found.values():
        made = {n: np.asarray(x) for n, x in one.items()}
        assert same(made, found["with NumPy"])
        for name in want:
            np.testing.assert_allclose(made[name], want[name], rtol=2e-6, err_msg=name)
        if head != 3:  # factors 1/2 and 1/4: every product is exact
            assert same(made, want)
    back = mapping.inverse().apply_arrays(want)
    for name, x in arrays.items():
        if name.startswith("adam_"):
            np.testing.assert_allclose(back[name], x, rtol=2e-6)


def test_training_goes_on_from_a_mapped_state_as_in_the_other_program() -> None:
    state, params, adam = trained(4)
    made = mapping_of(4).apply_arrays(named(state))
    moments = [{n: jnp.asarray(made[f"adam_{k}.{n}"]) for n in params} for k in "mv"]
    mapped = (adam[0]._replace(mu=moments[0], nu=moments[1]), *adam[1:])
    x, y = jnp.ones((2, INTO)), jnp.zeros((2, 4))
    gradients = jax.grad(loss_there)(params, x, y)
    (one, _), (other, _) = (ADAM.update(gradients, s) for s in (mapped, adam))
    assert same(*({n: np.asarray(u) for n, u in x.items()} for x in (one, other)))


ORDERS = [
    *STATE_ORDERS.items(),
    ("opt_state.0.trace.", 1),
    ("opt_state.inner_states.adam.inner_state.0.mu.", 1),
    ("opt_state.1.nu.", 2),
]


@pytest.mark.parametrize(("prefix", "order"), ORDERS)
def test_each_state_is_divided_by_a_power_of_the_factor(prefix, order) -> None:
    arrays = {n: np.full(2, 3, np.float32) for n in ("w", f"{prefix}w")}
    mapping = Mapping((Affine(("w",), -0.25, 5), Rename((("w", "v"),))))
    want = {"v": np.full(2, 4.25, np.float32), f"{prefix}v": np.full(2, 3 * (-4.0) ** order)}
    want = {n: x.astype(np.float32) for n, x in want.items()}
    assert same(mapping.apply_arrays(arrays), want)
    memory = Memory(arrays)
    assert same(read_all(memory, mapping.apply(memory.catalog)), want)
    back = mapping.inverse().apply_arrays(want)
    assert same(back, {**arrays, "w": np.full(2, 3, np.float32)})


UNKNOWN = ["opt_state.0.v_row.w", "opt_state.0.ema.w", "opt_state.0.mu.gone", "opt_state.z.w"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_state_of_unknown_order_is_refused_where_values_change(name) -> None:
    arrays = {"w": np.ones(2, np.float32), name: np.ones(2, np.float32)}
    count = {"opt_state.0.count": np.array(3, np.int32)}
    mapping = Mapping((Affine(("w",), 2),))
    assert same(mapping.apply_arrays({"w": arrays["w"], **count}), {"w": arrays["w"] * 2, **count})
    for apply in (mapping.apply_arrays, lambda a: mapping.apply(Memory(a).catalog)):
        with pytest.raises(LayoutError, match=rf"{name}\. This mapping scales weights.*exclude="):
            apply({**arrays, **count})
    only_shapes = Mapping((Transpose(("w",), (0,)),))
    assert same(only_shapes.apply_arrays(arrays), arrays)


def test_padding_of_a_moment_is_not_shifted_and_casts_are_as_before() -> None:
    mapping = Mapping((Pad(("w",), 0, 2, 3), Affine(("w",), 2, 1), Cast(("w",), "BF16")))
    made = mapping.apply_arrays({n: np.full(2, 4, np.float32) for n in ("w", "adam_m.w")})
    assert made["w"].tolist() == [9, 9, 1]
    assert made["adam_m.w"].tolist() == [2, 2, 0]
    assert {x.dtype.name for x in made.values()} == {"bfloat16"}


def test_a_moment_of_integers_is_refused_by_name() -> None:
    arrays = {"w": np.ones(2, np.float32), "adam_v.w": np.ones(2, np.int8)}
    with pytest.raises(LayoutError, match=r"begin with adam_v\.: affine w: I8 values cannot"):
        Mapping((Affine(("w",), 2),)).apply_arrays(arrays)


def test_states_are_laid_out_like_their_weights(tmp_path) -> None:
    state, _, _ = trained(4)
    arrays, mapping = named(state), mapping_of(4)
    folder = tmp_path / "step"
    save(arrays, folder, fsync=False, workers=1)
    rules = Rules("two", (("h.*.query", "-,mp"), ("h.*.n", "-")))
    made = load(folder, "dp2mp2", names=mapping, rules=rules)
    want = mapping.apply_arrays(arrays)
    assert same({n: np.asarray(x) for n, x in made.items()}, want)
    for name in ("h.0.query", "adam_m.h.0.query", "adam_v.h.0.query"):
        assert made[name].addressable_shards[0].data.shape == (INTO, 2)
