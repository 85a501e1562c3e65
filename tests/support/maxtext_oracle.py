"""MaxText's own conversion of checkpoints, from its installed distribution.

Its tables and hooks (``param_mapping``), its stacking (``tensor_handling``), and the way back
(``utils.process_maxtext_param``, whose module is loaded with empty modules in place of MaxText's
trainer and of its programs' dependencies).
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

param_mapping = pytest.importorskip("maxtext.checkpoint_conversion.utils.param_mapping")
tensor_handling = pytest.importorskip("maxtext.checkpoint_conversion.utils.tensor_handling")

Arrays = dict[str, np.ndarray]


class Converter:
    """MaxText's conversion of one model.

    Args:
        name: MaxText's name of a model of the family.
        config: ``config.json``.
        scan: whether MaxText scans over layers.
    """

    def __init__(self, name: str, config: Mapping[str, Any], scan: bool) -> None:
        self.settings = types.SimpleNamespace(
            num_experts=config.get("num_local_experts", 0),
            head_dim=config.get("head_dim"),
            scan_layers=scan,
            param_scan_axis=1,
            inhomogeneous_layer_cycle_interval=2 if name.startswith("gpt-oss") else 4,
            weight_dtype=None,
        )
        self._name, self._config, self._scan = name, config, scan
        self._names = param_mapping.PARAM_MAPPING[name](config, self.settings, scan_layers=scan)

    def _hooks(self, *, saving: bool) -> dict[Any, Any]:
        hooks: dict[Any, Any] = param_mapping.HOOK_FNS[self._name](
            self._config, self.settings, scan_layers=self._scan, saving_to_hf=saving
        )
        return hooks

    def names(self, source: Mapping[str, np.ndarray]) -> list[str]:
        """MaxText's names of the weights that ``source`` has by Hugging Face's names."""
        keys = (key for key, names in self._names.items() if _first(names) in source)
        return [_dotted(k) for key in keys for k in (key if isinstance(key, tuple) else (key,))]

    def to_maxtext(self, source: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Convert weights of Hugging Face to MaxText's, which have ``shapes``."""
        made: Arrays = {}
        for key, names in self._names.items():
            if _first(names) not in source:
                continue
            keys = key if isinstance(key, tuple) else (key,)
            shape = shapes[_dotted(keys[0])]
            if len(keys) > 1:  # its hook returns them along a new last dim
                shape = (*shape, len(keys))
            leaf = jax.ShapeDtypeStruct(shape, source[_first(names)].dtype)
            load = tensor_handling.get_hf_loading_function(
                names,
                source.__getitem__,
                self._hooks(saving=False).get(key),
                leaf,
                self.settings,
                key,
            )
            found = np.asarray(load()).astype(leaf.dtype)  # as when MaxText saves it
            for i, k in enumerate(keys):
                made[_dotted(k)] = found if len(keys) == 1 else found[..., i]
        return made

    def to_hf(self, source: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Convert weights of MaxText to Hugging Face's, which have ``shapes``."""
        hooks, made = self._hooks(saving=True), {}
        process = _module("checkpoint_conversion.utils.utils").process_maxtext_param
        for key in self._names:
            keys = [_dotted(k) for k in (key if isinstance(key, tuple) else (key,))]
            if not set(keys) <= source.keys():
                continue
            held = [jax.numpy.asarray(source[k]) for k in keys]
            weight = held if len(held) > 1 else held[0]
            made |= dict(process(key, weight, self._names, hooks, shapes, self.settings))
        return made


def older_to_hf(name: str, config: Mapping[str, Any], source: Arrays) -> Arrays:
    """Convert scanned weights of llama 2, mistral or mixtral to Hugging Face's, in float16.

    By MaxText's script for these, which expects heads to be as wide as the hidden units together.
    """
    script = _module("checkpoint_conversion.standalone_scripts.llama_mistral_mixtral_orbax_to_hf")
    sizes = {
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "dims_per_head": config["hidden_size"] // config["num_attention_heads"],
    }
    if "num_local_experts" in config:
        sizes["num_experts"] = config["num_local_experts"]
    state = types.SimpleNamespace(params=nested(source))
    with mock.patch.dict(script.llama_or_mistral_ckpt.MODEL_PARAMS_DICT, {name: sizes}):
        return {n: x.numpy() for n, x in script.convert_state_to_hf(state, name).items()}


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree whose paths are the dotted names."""
    made: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        inside = made
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[last] = array
    return made


def listed_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of an unscanned model in MaxText's own list.

    Its conversion's settings for agents contain lists of llama3, gemma3 and qwen3.
    """
    files = resources.files("maxtext") / "experimental/agent/ckpt_conversion_agent/context"
    listed = json.loads((files / model / "maxtext_params.json").read_text())
    return {_dotted(name): tuple(shape) for name, shape in listed.items()}


def published_config(model: str) -> dict[str, Any]:
    """Return ``config.json`` of a published model, as MaxText has it."""
    configs = _module("checkpoint_conversion.utils.hf_model_configs").HF_MODEL_CONFIGS
    found: dict[str, Any] = configs[model].to_dict()
    return found


def _first(names: Any) -> str:
    while isinstance(names, list):
        names = names[0] if names else ""
    return str(names)


def _dotted(key: str) -> str:
    return key.replace("-", ".")


#: What the conversion imports of MaxText's trainer.
_ABSENT = (
    "maxtext.common.checkpointing",
    "maxtext.common.gcloud_stub",
    "maxtext.configs.pyconfig",
    "maxtext.utils.elastic_utils",
    "maxtext.utils.gcs_utils",
    "maxtext.utils.generate_param_only_checkpoint",
    "maxtext.utils.max_logging",
    "maxtext.utils.maxtext_utils",
    "maxtext.inference.inference_utils",
)


def _module(name: str) -> types.ModuleType:
    """Import a module of MaxText with mocks in place of what it does not need here."""
    with _mocked(_ABSENT):
        return importlib.import_module(f"maxtext.{name}")


@contextmanager
def _mocked(names: tuple[str, ...]) -> Iterator[None]:
    before = dict(sys.modules)
    try:
        for name in names:
            sys.modules[name] = mock.MagicMock(name=name)
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]
