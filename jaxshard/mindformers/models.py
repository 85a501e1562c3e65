"""MindFormers' model configurations in the terms of ``config.json``.

    num_layers, num_heads, n_kv_heads, multiple_of …   →   num_hidden_layers, intermediate_size …

Only of the older models of the Llama family, whose names are known. This module opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.catalog import Model
from ..errors import FormatError, NotFoundError, quote_name
from ..formats.huggingface import model_of
from .keys import Config, section

_WORDS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    **{x: x for x in ("hidden_size", "vocab_size", "intermediate_size", "head_dim")},
    **{x: x for x in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")},
}
_NEEDED = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
_TYPES = ("LlamaConfig",)
_MULTIPLE_OF = 256  # MindFormers' own default
_MOST = 1 << 40
_WHERE = "model.model_config"


def hf_model_of(model: Config) -> tuple[Model, str]:
    """The model of a configuration, and the mapping from Hugging Face's names to its own.

    Raises:
        NotFoundError: it is none of those, or says too little.
        FormatError: a number means nothing.

    >>> small = {"hidden_size": 32, "vocab_size": 64, "num_layers": 2, "num_heads": 4}
    >>> hf_model_of({"model_config": {"type": "LlamaConfig", **small}})[1]
    'llama-hf:llama-mindformers'
    """
    told = section(model, "model_config")
    kind = told.get("type")
    if kind not in _TYPES:
        what = f"the type {quote_name(repr(kind))}" if told else "nothing"
        raise NotFoundError(
            f"no checkpoint is named, and {_WHERE} says {what}, from which the names of tensors do "
            f"not follow (known are {', '.join(_TYPES)}). Name a checkpoint, or the folder of a "
            "config.json: load_checkpoint or pretrained_model_dir."
        )
    config: dict[str, Any] = {theirs: told[ours] for ours, theirs in _WORDS.items() if ours in told}
    config = {key: value for key, value in config.items() if value is not None}
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise NotFoundError(f"{_WHERE} has no {missing[0]}. Add it.")
    config["tie_word_embeddings"] = bool(told.get("tie_word_embeddings"))
    config["model_type"] = "qwen2" if told.get("qkv_has_bias") else "llama"
    config.setdefault("intermediate_size", _width(told, config["hidden_size"]))
    form = "mindformers-concat" if told.get("qkv_concat") else "mindformers"
    return model_of(config), f"llama-hf:llama-{form}"


def _width(told: Mapping[str, Any], hidden: Any) -> int:
    """The inner width of a layer, which follows from the outer one."""
    factor, step = told.get("ffn_dim_multiplier"), told.get("multiple_of") or _MULTIPLE_OF
    numbers = (hidden, step, 1 if factor is None else factor)
    if any(
        isinstance(n, bool) or not isinstance(n, int | float) or not 0 < n < _MOST for n in numbers
    ):
        raise FormatError(
            f"{_WHERE}: hidden_size, multiple_of and ffn_dim_multiplier are {numbers}, not numbers "
            "above 0."
        )
    width = 4 * hidden if factor is None else int((factor + 0.01) * 4 * hidden)  # as theirs is
    return int(-(-int(2 * width / 3) // step) * step)
