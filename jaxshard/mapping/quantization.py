"""Quantized checkpoints: the operations that turn their weights into true values.

``config.json`` and the names and shapes of the factors determine them; no data is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping as Dict

from ..core.catalog import Catalog, Tensor
from ..core.dtypes import BY_NUMPY, DType
from ..errors import FormatError, LayoutError
from ..models.facts import text_config
from ..rules.tensor_dims import Factors, settings
from .group_ops import WITHOUT_BLOCKS, Dequantize
from .mapping import Mapping

CONFIG = "config.json"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_QUANTIZED = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
_SCALES = ("_scale_inv", "_scale")


def dequantized(catalog: Catalog, dtype: str | None = None) -> Mapping | None:
    """Return the mapping that dequantizes weights, or None without quantized weights.

    Supported are FP8, and int8 without zero points, with a factor for each block, for each row or
    for the tensor. The result is of ``dtype`` (NumPy's name), if that is a float of 16 bits or
    more, otherwise of the dtype in ``config.json``, otherwise BF16.

    Raises:
        FormatError: ``config.json`` has an invalid block size.
        LayoutError: another kind of quantization.
    """
    config = catalog.model.config
    shapes = {n: t.shape for n, t in catalog.tensors.items() if n not in catalog.scalars}
    weights = Factors(shapes, config).weights
    if not weights:
        return None
    ends: dict[str, tuple[int, int]] = {}
    for name, weight in weights.items():
        end = name.removeprefix(weight) if weight.endswith(".weight") else ""
        block = _block_of(config) if end == "_scale_inv" else WITHOUT_BLOCKS
        if end not in _SCALES or catalog[weight].dtype.name not in _QUANTIZED:
            raise _unknown_factor(catalog[name], catalog[weight])
        if end == "_scale" and len(shapes[name]) == 2 and 1 not in shapes[name]:
            block = _block_of(config, "block_structure")
        if block == WITHOUT_BLOCKS and shapes[name] not in _lone(shapes[weight]):
            raise _unknown_factor(catalog[name], catalog[weight])
        ends[end] = max(block, ends.get(end, block))
    inner = text_config(config)
    words = (dtype, *(c.get(key) for c in (config, inner) for key in ("dtype", "torch_dtype")))
    kind = next((k for k in map(_float, words) if k), None)
    return Mapping(
        tuple(
            Dequantize(
                scale="{name*}.weight" + end, block=block, dtype=kind.name if kind else "BF16"
            )
            for end, block in ends.items()
        )
    )


def _lone(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of one factor for a weight of ``shape``, or one for each row."""
    return ((), (1,), (1, 1), shape[:1], (*shape[:1], 1))


def _unknown_factor(factor: Tensor, weight: Tensor) -> LayoutError:
    return LayoutError(
        f"{factor.name}: unsupported factors of {factor.dtype} and shape {factor.shape} for "
        f"{weight.name} of {weight.dtype} and shape {weight.shape} (supported for FP8 and I8: one "
        "for the tensor, for each row, or for each block of weight_block_size). Dequantize the "
        "model with the library that quantized it, or pass a mapping in TOML."
    )


def _float(word: object) -> DType | None:
    kind = BY_NUMPY.get(word) if isinstance(word, str) else None
    return kind if kind and kind.name in _FLOATS else None


def _block_of(config: Dict[str, object], key: str = "weight_block_size") -> tuple[int, int]:
    """Return the rows and columns that share a factor, by default 128 of each."""
    stated = [value for name, value in settings(config) if name == key]
    if not stated:
        return 128, 128
    block = stated[0]
    if block is None:
        return WITHOUT_BLOCKS
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or any(type(n) is not int or n < 1 for n in block)
    ):
        raise FormatError(
            f"config.json: {key} is {str(block)[:40]}, expected two numbers of 1 or more "
            "(rows, columns). Fetch it again."
        )
    return block[0], block[1]


def true_config(mapped: Catalog) -> dict[str, bytes]:
    """Return a ``config.json`` without quantization, if the mapping dequantized the tensors."""
    before = mapped.origin.catalog if mapped.origin else mapped
    if CONFIG not in mapped.extras or "quantization_config" not in before.model.config:
        return {}
    shapes = {n: t.shape for n, t in before.tensors.items()}
    factors = Factors(shapes, before.model.config).weights.keys()
    views = (p.view for t in mapped.tensors.values() for p in t.shards if p.view)
    if not factors or not factors <= {t.name for view in views for t in view.operands}:
        return {}
    left = {k: v for k, v in before.model.config.items() if k != "quantization_config"}
    return {CONFIG: json.dumps(left, indent=2).encode()}
