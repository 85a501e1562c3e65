"""Quantized checkpoints: the operations that turn their weights into true values.

``config.json`` and the names and shapes of the factors determine them; no data is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping as Dict
from dataclasses import replace
from typing import Any, NamedTuple

from ..core.catalog import Catalog, Tensor
from ..core.dtypes import BY_NUMPY, CODES, DType
from ..core.patterns import match
from ..errors import FormatError, LayoutError
from ..models.facts import text_config
from ..rules.tensor_dims import Factors, settings
from .group_ops import WITHOUT_BLOCKS, Dequantize
from .mapping import Mapping
from .ops import Drop, Op, Rename, Transpose

CONFIG = "config.json"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_PLAIN = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
_STATED = "quantization_config"


class _Kind(NamedTuple):
    """A kind of quantization, recognized by the names and dtypes of a weight and its factors.

    Attributes:
        op: the operation; its patterns are the names.
        dtypes: of the weights.
        scales: dtypes of the factors; empty for any float.
        group: columns that share a factor, unless ``config.json`` states others; 0 for any.
    """

    op: Dequantize
    dtypes: frozenset[str]
    scales: frozenset[str] = frozenset()
    group: int = 0


def _op(weight: str, scale: str, code: str = "", scale_dtype: str = "", **outer: Any) -> Dequantize:
    names = ("{name*}" + weight, "{name*}" + scale)
    return Dequantize(*names, WITHOUT_BLOCKS, "BF16", code, scale_dtype, **outer)


_U8, _E8M0 = frozenset({"U8"}), frozenset({"U8", "F8_E8M0"})
_KINDS = (
    _Kind(_op("_blocks", "_scales", "e2m1", "F8_E8M0"), _U8, _E8M0, 32),
    _Kind(
        _op(
            *(".weight_packed", ".weight_scale", "e2m1"),
            outer="{name*}.weight_global_scale",
            divides=True,
        ),
        _U8,
        group=16,
    ),
    _Kind(_op(".weight_packed", ".weight_scale", "e2m1", "F8_E8M0"), _U8, _E8M0, 32),
    _Kind(_op(".weight_packed", ".weight_scale", "int4"), frozenset({"I32"})),
    _Kind(_op(".weight_packed", ".weight_scale", "int8"), frozenset({"I32"})),
    _Kind(
        _op(".weight", ".weight_scale", "e2m1", outer="{name*}.weight_scale_2"),
        _U8,
        group=16,
    ),
    _Kind(_op(".weight", ".weight_scale_inv"), _PLAIN),
    _Kind(_op(".weight", ".weight_scale"), _PLAIN),
)

#: What only computation in the quantized format needs: factors of activations and of caches of
#: keys and values; and the shape of a weight, which its factors have.
_UNUSED = (
    *(f"{{name*}}.{end}" for end in ("input_scale", "input_global_scale", "weight_shape")),
    *(f"{{name*}}.{end}" for end in ("k_scale", "v_scale")),
)

#: Weights that transformers keeps as (expert, in, out), and its MXFP4 checkpoints as
#: (expert, out, in).
_TURNED = ("gate_up_proj", "down_proj")


def dequantized(catalog: Catalog, dtype: str | None = None) -> Mapping | None:
    """Return the mapping that dequantizes weights, or None without quantized weights.

    The result is of ``dtype`` (NumPy's name), if that is a float of 16 bits or more, otherwise of
    the dtype in ``config.json``, otherwise BF16. ``docs/mapping.md`` lists the supported kinds.

    Raises:
        FormatError: ``config.json`` has an invalid block size.
        LayoutError: another kind of quantization.
    """
    config = catalog.model.config
    shapes = {n: t.shape for n, t in catalog.tensors.items() if n not in catalog.scalars}
    factors: dict[str, list[str]] = {}
    for factor, weight in Factors(shapes, config).weights.items():
        factors.setdefault(weight, []).append(factor)
    if not factors:
        _refuse_unknown(catalog)
        return None
    inner = text_config(config)
    words = (dtype, *(c.get(key) for c in (config, inner) for key in ("dtype", "torch_dtype")))
    kind = next((k for k in map(_float, words) if k), None)
    found: dict[_Kind, tuple[int, int]] = {}
    for weight, names in factors.items():
        what, block = _kind_of(catalog, weight, names)
        found[what] = max(block, found.get(what, block))
    ops: list[Op] = [
        replace(what.op, block=found[what], dtype=kind.name if kind else "BF16")
        for what in _KINDS
        if what in found
    ]
    ends = {end for what in found if (end := what.op.weight.removeprefix("{name*}")) in _NEW_ENDS}
    if ends:
        ops.append(Rename(tuple(("{name*}" + e, "{name*}" + _NEW_ENDS[e]) for e in sorted(ends))))
    if "_blocks" in ends:
        ops.append(Transpose(tuple(f"{{name*}}.{end}" for end in _TURNED), (0, 2, 1)))
    if any(match(p, n) is not None for n in shapes for p in _UNUSED):
        ops.append(Drop(_UNUSED))
    return Mapping(tuple(ops))


_NEW_ENDS = {"_blocks": "", ".weight_packed": ".weight"}


def _kind_of(catalog: Catalog, weight: str, names: list[str]) -> tuple[_Kind, tuple[int, int]]:
    """Return the kind of a weight with the factors ``names``, and the block of its operation."""
    tensor = catalog[weight]
    for kind in _KINDS:
        if tensor.dtype.name not in kind.dtypes or match(kind.op.weight, weight) is None:
            continue
        stem = weight.removesuffix(kind.op.weight.removeprefix("{name*}"))
        scale, outer = (p.replace("{name*}", stem) for p in (kind.op.scale, kind.op.outer))
        if sorted(names) != sorted(filter(None, (scale, outer))):
            continue
        block = _block_for(kind, tensor, catalog[scale], catalog.model.config)
        outer_shape = catalog[outer].shape if outer else ()
        if block is not None and outer_shape in ((), (1,)):
            return kind, block
    raise _unsupported(catalog, weight, names)


def _block_for(
    kind: _Kind, weight: Tensor, scale: Tensor, config: Dict[str, object]
) -> tuple[int, int] | None:
    """Return the block of the operation of ``kind``, or None if the factors are of another."""
    if not kind.op.code:
        return _block_of_plain(weight, scale, config)
    code, own = CODES[kind.op.code], scale.shape
    rows = weight.shape
    if len(rows) == len(own) + 1 > 1:  # in groups
        rows = (*rows[:-2], rows[-2] * rows[-1])
    if not rows or scale.dtype.name not in (kind.scales or {*_FLOATS, "F8_E4M3"}):
        return None
    if kind.op.code.startswith("int") and _bits_stated(config) != {code.bits}:
        return None
    if not kind.group and own in _lone(rows):
        return WITHOUT_BLOCKS
    columns, groups = rows[-1] * code.num_values, own[-1] if own else 0
    if own[:-1] != rows[:-1] or not groups or columns % groups:
        return None
    allowed = _groups_stated(config) or {kind.group or columns // groups}
    return WITHOUT_BLOCKS if columns // groups in allowed else None


def _block_of_plain(
    weight: Tensor, scale: Tensor, config: Dict[str, object]
) -> tuple[int, int] | None:
    own, shape = scale.shape, weight.shape
    if scale.name.endswith("_inv"):
        block = _block_of(config)
    elif len(own) < 2 or 1 in own:
        block = WITHOUT_BLOCKS
    elif own[:-1] == shape[:-1] and shape[-1] / own[-1] in _groups_stated(config):
        return WITHOUT_BLOCKS
    else:
        block = _block_of(config, "block_structure")
    return None if block == WITHOUT_BLOCKS and own not in _lone(shape) else block


def _lone(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of one factor for a matrix of ``shape``, or one for each row."""
    return ((), (1,), (1, 1), shape[:1], (*shape[:1], 1)) if len(shape) == 2 else ()


def _groups_stated(config: Dict[str, object]) -> set[int]:
    """Return the columns of a weight that share a factor, if the settings state any."""
    found = (value for name, value in settings(config) if name == "group_size")
    return {n for n in found if type(n) is int and n > 0}


def _bits_stated(config: Dict[str, object]) -> set[object]:
    """Return the widths of the integers that weights of several settings become."""
    tables = [value for name, value in settings(config) if name == "weights"]
    kinds = [t for t in tables if isinstance(t, Dict) and t.get("type") == "int"]
    return {table.get("num_bits") for table in kinds}


def _refuse_unknown(catalog: Catalog) -> None:
    """Refuse weights of integers that ``config.json`` states are quantized."""
    stated = catalog.model.config.get(_STATED)
    if not isinstance(stated, Dict) or not stated.get("quant_method"):
        return
    for name, tensor in catalog.tensors.items():
        is_matrix = len(tensor.shape) > 1 and tensor.dtype.name in {*_PLAIN, "U8", "I32", "I16"}
        if is_matrix and name not in catalog.scalars:
            raise LayoutError(
                f"{name}: {tensor.dtype} of shape {tensor.shape} is a weight in a format that "
                f"jaxshard does not dequantize{_method(catalog)}. {_REMEDY}"
            )


_REMEDY = (
    "Dequantize the model with the library that quantized it (for bitsandbytes: transformers, "
    "model.dequantize()), or pass a mapping in TOML. Without names= it is moved as it is."
)


def _method(catalog: Catalog) -> str:
    """Return what ``config.json`` states about the quantization, for messages."""
    stated = catalog.model.config.get(_STATED)
    table = stated if isinstance(stated, Dict) else {}
    said = [f"{k} {table[k]!r}" for k in ("quant_method", "quant_algo", "format") if k in table]
    return f" (config.json: {', '.join(said)[:200]})" if said else ""


def _unsupported(catalog: Catalog, weight: str, names: list[str]) -> LayoutError:
    tensor, first, *others = map(catalog.__getitem__, (weight, *sorted(names)))
    more = "".join(
        f", {t.name.rpartition('.')[2]} of {t.dtype} and shape {t.shape}" for t in others
    )
    return LayoutError(
        f"{first.name}: unsupported factors of {first.dtype} and shape {first.shape}{more}, for "
        f"{weight} of {tensor.dtype} and shape {tensor.shape}{_method(catalog)}. {_REMEDY}"
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
    if CONFIG not in mapped.extras or _STATED not in before.model.config:
        return {}
    shapes = {n: t.shape for n, t in before.tensors.items()}
    factors = Factors(shapes, before.model.config).weights.keys()
    views = (p.view for t in mapped.tensors.values() for p in t.shards if p.view)
    if not factors or not factors <= {t.name for view in views for t in view.operands}:
        return {}
    left = {k: v for k, v in before.model.config.items() if k != _STATED}
    return {CONFIG: json.dumps(left, indent=2).encode()}
