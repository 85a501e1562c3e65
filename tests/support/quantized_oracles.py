"""Weights quantized at random, and their true values by the libraries that define the formats.

``python tests/support/quantized_oracles.py`` records small ones in ``tests/golden/quantized``.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "quantized"
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


class Oracle(NamedTuple):
    """A weight as stored, by the ends of its names, and its true values."""

    stored: dict[str, np.ndarray[Any, Any]]
    config: dict[str, Any]  # quantization_config
    true: np.ndarray[Any, Any]
    by: str  # the library and its version


def bits_of(tensor: Any) -> Any:
    """A NumPy array of a torch tensor, with its bits."""
    import torch  # noqa: PLC0415 - only for the oracles

    kinds = {
        torch.bfloat16: (torch.uint16, BF16),
        torch.float8_e4m3fn: (torch.uint8, FP8),
    }
    plain, kind = kinds.get(tensor.dtype, (None, None))
    tensor = tensor.detach()
    return tensor.contiguous().numpy() if plain is None else tensor.view(plain).numpy().view(kind)


def _torch(array: Any) -> Any:
    import torch  # noqa: PLC0415

    kinds = {"bfloat16": (np.uint16, torch.bfloat16), "float8_e4m3fn": (np.uint8, None)}
    if array.dtype.name not in kinds:
        return torch.tensor(array)
    plain, kind = kinds[array.dtype.name]
    return torch.tensor(array.view(plain)).view(kind or torch.float8_e4m3fn)


def mxfp4(rows: int, columns: int, seed: int = 0) -> Oracle:
    """gpt-oss: two experts, by transformers; the true values are (expert, in, out)."""
    from transformers.integrations import mxfp4 as library  # noqa: PLC0415

    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (2, rows, columns // 32, 16), np.uint8)
    scales = random.integers(90, 150, (2, rows, columns // 32), np.uint8)
    scales[0, 0, 0], scales[1, -1, -1] = 0, 254  # the ends of the range
    true = library.convert_moe_packed_tensors(_torch(blocks), _torch(scales))
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return Oracle(
        {"_blocks": blocks, "_scales": scales}, config, bits_of(true), _version("transformers")
    )


def _compressed(
    rows: int, columns: int, seed: int, format: str, scale_dtype: str, **weights: Any
) -> Oracle:
    """A weight quantized and restored by compressed-tensors' own compressor of ``format``."""
    import torch  # noqa: PLC0415
    from compressed_tensors.compressors import BaseCompressor  # noqa: PLC0415
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: PLC0415

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    library = BaseCompressor.get_value_from_registry(format)
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns).to(torch.bfloat16)
    strategy, group = weights["strategy"], weights.get("group_size") or columns
    shape = {"tensor": (1,), "channel": (rows, 1)}.get(strategy, (rows, columns // group))
    span = 7.0 if args.num_bits == 4 and args.type == "int" else 6.0 if args.num_bits == 4 else 100
    scale = (torch.rand(shape) + 0.5) * 3 / span
    state: dict[str, Any] = {"weight": weight, "weight_scale": scale.to(torch.bfloat16)}
    if format == "nvfp4-pack-quantized":
        largest = torch.tensor([37.3])
        state["weight_global_scale"] = largest
        state["weight_scale"] = (scale * largest).to(torch.float8_e4m3fn).to(torch.bfloat16)
    if scale_dtype == "uint8":
        state["weight_scale"] = 2.0 ** torch.floor(torch.log2(scale))
    stored = library.compress(state, scheme)
    true = library.decompress(stored, scheme)["weight"].to(torch.bfloat16)
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": format}},
    }
    by = _version("compressed-tensors")
    return Oracle({f".{n}": bits_of(x) for n, x in stored.items()}, config, bits_of(true), by)


def _maker(format: str, scale_dtype: str = "", **weights: Any) -> Callable[..., Oracle]:
    return lambda rows, columns, seed=0: _compressed(
        rows, columns, seed, format, scale_dtype, **weights
    )


def modelopt_nvfp4(rows: int, columns: int, seed: int = 0) -> Oracle:
    """NVFP4 as ModelOpt exports it: ``weight``, ``weight_scale`` and ``weight_scale_2``."""
    import torch  # noqa: PLC0415
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor  # noqa: PLC0415

    torch.manual_seed(seed)
    weight = torch.randn(rows, columns).to(torch.bfloat16)
    packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    true = packed.dequantize(
        torch.bfloat16, scale=scale, double_scale=scale_2, block_sizes={-1: 16}
    )
    stored = {
        ".weight": bits_of(packed._quantized_data),
        ".weight_scale": bits_of(scale),
        ".weight_scale_2": bits_of(scale_2),
        ".input_scale": np.array(0.5, np.float32),
    }
    config = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            }
        },
    }
    return Oracle(stored, config, bits_of(true), _version("nvidia-modelopt"))


_INT = {"type": "int", "symmetric": True}
_FLOAT = {"type": "float", "symmetric": True}

#: Each kind of a quantized linear layer, by a name of ours.
LINEAR: dict[str, Callable[..., Oracle]] = {
    "nvfp4": _maker(
        "nvfp4-pack-quantized", **_FLOAT, num_bits=4, strategy="tensor_group", group_size=16
    ),
    "mxfp4-packed": _maker(
        "mxfp4-pack-quantized", "uint8", **_FLOAT, num_bits=4, strategy="group", group_size=32
    ),
    "int4-groups": _maker("pack-quantized", **_INT, num_bits=4, strategy="group", group_size=32),
    "int4-rows": _maker("pack-quantized", **_INT, num_bits=4, strategy="channel"),
    "int8-groups": _maker("pack-quantized", **_INT, num_bits=8, strategy="group", group_size=16),
    "int8-rows": _maker("int-quantized", **_INT, num_bits=8, strategy="channel"),
    "int8-tensor": _maker("int-quantized", **_INT, num_bits=8, strategy="tensor"),
    "fp8-rows": _maker("float-quantized", **_FLOAT, num_bits=8, strategy="channel"),
    "fp8-tensor": _maker("float-quantized", **_FLOAT, num_bits=8, strategy="tensor"),
    "modelopt-nvfp4": modelopt_nvfp4,
}
ORACLES = {"mxfp4": mxfp4, **LINEAR}
LIBRARY = {
    **dict.fromkeys(ORACLES, "compressed_tensors.compressors"),
    "mxfp4": "transformers.integrations.mxfp4",
    "modelopt-nvfp4": "modelopt.torch.quantization.qtensor.nvfp4_tensor",
}


def _version(library: str) -> str:
    return f"{library} {importlib.metadata.version(library)}"


def recorded(name: str) -> Oracle:
    """A small weight that was recorded."""
    from safetensors import deserialize, safe_open  # noqa: PLC0415

    path = GOLDEN / f"{name}.safetensors"
    kinds = {"BF16": BF16, "F8_E4M3": FP8, "U8": np.uint8, "I8": np.int8, "I32": np.int32}
    kinds |= {"F32": np.float32, "I64": np.int64}
    stored = {
        name: np.frombuffer(bytes(x["data"]), kinds[x["dtype"]]).reshape(x["shape"])
        for name, x in deserialize(path.read_bytes())
    }
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    return Oracle(stored, json.loads(metadata["config"]), stored.pop("true"), metadata["by"])


def _record() -> None:
    from safetensors.numpy import save_file  # noqa: PLC0415

    GOLDEN.mkdir(exist_ok=True)
    for name, make in ORACLES.items():
        made = make(8, 64)
        metadata = {"by": made.by, "config": json.dumps(made.config)}
        save_file({**made.stored, "true": made.true}, GOLDEN / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    _record()
