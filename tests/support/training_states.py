"""Training states on devices for the tests: weights, Adam's moments, a key, counters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from training_weights import SHAPES, SPECS

__all__ = ["SHAPES", "SPECS"]
OPTIMIZER = optax.adamw(1e-2)


def mesh(dp: int, mp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: dp * mp]).reshape(dp, mp), ("dp", "mp"))


def state(dp: int, mp: int, seed: int = 0) -> dict[str, Any]:
    """A state whose arrays lie on ``dp`` x ``mp`` devices, with moments that are no zeros."""
    on, chance = mesh(dp, mp), np.random.default_rng(seed)

    def arrays(dtype: Any) -> dict[str, jax.Array]:
        return {
            name: jax.device_put(
                chance.standard_normal(SHAPES[name]).astype(dtype), NamedSharding(on, spec)
            )
            for name, spec in SPECS.items()
        }

    params = arrays(ml_dtypes.bfloat16)
    adam = optax.ScaleByAdamState(jnp.int32(seed + 7), arrays(np.float32), arrays(np.float32))
    return {
        "params": params,
        "opt_state": (adam, optax.EmptyState()),
        "step": seed + 3,
        "key": jax.random.key(seed),
        "loss_scale_log2": 15.5,
        "seen": np.arange(seed, seed + 5),
        "done": False,
    }


def described(tree: Any) -> Any:
    """The same tree with descriptions for arrays on devices."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        tree,
    )


def bits(leaf: Any) -> tuple[Any, ...]:
    """What a leaf is, apart from where it lies."""
    kind = jax.Array if isinstance(leaf, jax.Array) else type(leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (kind, str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes())
    array = np.asarray(leaf)
    return (kind, str(array.dtype), array.shape, array.tobytes())


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal in structure, kinds and every bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(bits(x) == bits(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: B905


def lies_as(a: Any, b: Any) -> bool:
    """Whether the arrays of two trees lie on the devices alike."""
    return all(
        x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        if isinstance(x, jax.Array)
    )
