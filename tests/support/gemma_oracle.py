"""The models of DeepMind's package ``gemma``, from its installed distribution.

Their modules import Kauldron (a training library), tokenizers and images. None of these takes part
in a text model's computation, so others stand in their places.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any
from unittest import mock

import jax.numpy as jnp
from flax import linen

_UNUSED = (
    "kauldron",
    "kauldron.kd",
    "kauldron.kontext",
    "gemma.gm.ckpts",
    "gemma.gm.ckpts._paths",
    "gemma.gm.data._functional",
    "gemma.gm.nn.vision._vision",
    "gemma.gm.text._tokenizer",
    "gemma.gm.vision._token_utils",
)


class _Identity(linen.Module):
    def __call__(self, x: Any) -> Any:
        return x


class _Annotation:
    def __class_getitem__(cls, key: Any) -> type:
        return cls


def is_installed() -> bool:
    """Whether the models can be imported."""
    try:
        distribution("gemma")
    except PackageNotFoundError:
        return False
    return find_spec("einops") is not None


def _stands_in(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


def _models() -> Any:
    """Import the module of the models."""
    unused = {name: mock.MagicMock(name=name) for name in _UNUSED}
    unused["kauldron"].kd.nn.Identity = _Identity
    names = ("Array", "Bool", "Float", "Int", "PyTree", "UInt8")
    typing = _stands_in(
        "kauldron.ktyping",
        typechecked=lambda function: function,
        **dict.fromkeys(names, _Annotation),
    )
    text = _stands_in(
        "gemma.gm.utils._types",
        Input=lambda text, images, config: types.SimpleNamespace(
            tokens_with_mm=text, images=images, inputs_mask=None
        ),
        InputConfig=mock.MagicMock(),
    )
    batches = _stands_in(
        "gemma.gm.utils._jax_utils", flatten_unflatten_batch_dim=lambda: lambda function: function
    )
    others = {m.__name__: m for m in (typing, text, batches)}
    with mock.patch.dict(sys.modules, unused | others):
        return importlib.import_module("gemma.gm.nn._gemma")


def model(name: str, config: Any) -> linen.Module:
    """Make the model ``name`` with the sizes of a configuration of transformers."""
    made = getattr(_models(), name)
    kinds = made.config.attention_types
    settings = dataclasses.replace(
        made.config,
        num_embed=config.vocab_size,
        embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_key_value_heads,
        attention_types=kinds[: config.num_hidden_layers],
        sliding_window_size=16,
        vision_encoder=None,
    )
    return made(config=settings, dtype=jnp.float32)


def inputs(ids: Any) -> dict[str, Any]:
    """Return the arguments of a model for token ids of shape (batch, length)."""
    batch, length = ids.shape
    return {
        "tokens": jnp.asarray(ids),
        "positions": jnp.broadcast_to(jnp.arange(length), (batch, length)),
        "attention_mask": jnp.broadcast_to(
            jnp.tril(jnp.ones((length, length), bool)), (batch, length, length)
        ),
    }
