"""Random keys: typed PRNG keys of JAX, and the integers that a file holds for them.

A key has a generator and a shape; its data has one more dim, or several. A sharding of the keys
is one of the data too, whose last dims no spec names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True, slots=True)
class Keys:
    """Describes random keys: their generator by JAX's name, and their data."""

    generator: Any
    data: jax.ShapeDtypeStruct


def is_key(value: Any) -> bool:
    """Whether ``value`` is a random key or describes one."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def keys_of(value: Any) -> Keys:
    """What the keys ``value`` are, or those that it describes.

    >>> keys_of(jax.random.key(0)).generator
    'threefry2x32'
    """
    generators = []

    def data_of(keys: jax.Array) -> jax.Array:  # a description has no public way to say it
        generators.append(jax.random.key_impl(keys))
        return jax.random.key_data(keys)

    described = jax.ShapeDtypeStruct(value.shape, value.dtype)
    data = jax.eval_shape(data_of, described)
    sharding = getattr(value, "sharding", None)
    return Keys(generators[0], jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding))
