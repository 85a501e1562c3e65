"""MaxText's own conversion of checkpoints, from its installed distribution.

Its tables and hooks (``param_mapping``), its stacking (``tensor_handling``), and the way back
(``utils.process_maxtext_param``, whose module is loaded with empty modules in place of MaxText's
trainer and of its programs' dependencies).
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
            found = np.asarray(load())
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
