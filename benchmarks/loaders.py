"""Ways of loading a Hugging Face folder onto a mesh: ours, the baseline and the peers.

Each takes a folder and the sharding of every tensor, and returns ``{name: jax.Array}``,
ready. A peer that is not installed raises ImportError when it is asked for.
"""

# ruff: noqa: PLC0415 - a sample imports what it measures and nothing else

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

Shardings = Mapping[str, Sharding]
Loader = Callable[[Path, Shardings], Mapping[str, jax.Array]]


def ours(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    from jaxshard.loading import load

    return jax.block_until_ready(load(folder, dict(shardings)))


def ours_in_place(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    from jaxshard.loading import load

    return jax.block_until_ready(load(folder, dict(shardings), mmap=True))


def views(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as a view of its mapped file; a header parser of a dozen lines."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            a, b = entry["data_offsets"]
            assert entry["dtype"] == "BF16", entry
            part = data[start + a : start + b].view(ml_dtypes.bfloat16)
            found[name] = part.reshape(entry["shape"])
    return found


def memmap(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    return jax.block_until_ready(jax.device_put(views(folder), dict(shardings)))


def safetensors_numpy(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    from safetensors.numpy import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {k: jax.device_put(v, shardings[k]) for k, v in load_file(path).items()}
    return jax.block_until_ready(found)


def safetensors_flax(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    from safetensors.flax import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {k: jax.device_put(v, shardings[k]) for k, v in load_file(path).items()}
    return jax.block_until_ready(found)


def safetensors_slices(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                found[name] = jax.make_array_from_callback(
                    tuple(part.get_shape()), shardings[name], lambda index, part=part: part[index]
                )
    return jax.block_until_ready(found)


def orbax_safetensors(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import orbax.checkpoint.experimental.v1 as ocp

    layout = ocp.options.CheckpointLayout.SAFETENSORS
    wanted = {
        name: jax.ShapeDtypeStruct(view.shape, view.dtype, sharding=shardings[name])
        for name, view in views(folder).items()
    }
    with ocp.Context(checkpoint_layout=layout):
        return jax.block_until_ready(ocp.load(folder, wanted))


def transformers_torch(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = {}
    for name, value in model.state_dict().items():
        bits = value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        found[name] = jax.device_put(bits, shardings[name])
    return jax.block_until_ready(found)


def torch_checkpoint(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    state = {
        name: torch.empty(view.shape, dtype=torch.bfloat16) for name, view in views(folder).items()
    }
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder), thread_count=2))
    return jax.block_until_ready(
        {
            name: jax.device_put(
                value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16), shardings[name]
            )
            for name, value in state.items()
        }
    )


def fastsafetensors_cpu(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import torch
    from fastsafetensors import fastsafe_open

    paths = [str(p) for p in sorted(folder.glob("*.safetensors"))]
    found = {}
    with fastsafe_open(paths, nogds=True, device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            bits = file.get_tensor(name).view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            found[name] = jax.device_put(bits, shardings[name])
        return jax.block_until_ready(found)


def runai_streamer(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import torch
    from runai_model_streamer import SafetensorsStreamer

    found = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(p) for p in sorted(folder.glob("*.safetensors"))])
        for name, tensor in streamer.get_tensors():
            bits = tensor.clone().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            found[name] = jax.device_put(bits, shardings[name])
    return jax.block_until_ready(found)


BASELINE = "memmap views + one device_put"
OURS = "jaxshard"
IN_PLACE = "jaxshard, mmap=True"
ORBAX = "orbax v1, safetensors layout"

#: What each imports; done before the clock starts.
MODULES: Mapping[Loader, tuple[str, ...]] = {
    ours: ("jaxshard.loading",),
    ours_in_place: ("jaxshard.loading",),
    orbax_safetensors: ("orbax.checkpoint.experimental.v1",),
    safetensors_numpy: ("safetensors.numpy",),
    safetensors_flax: ("safetensors.flax",),
    safetensors_slices: ("safetensors",),
    transformers_torch: ("torch", "transformers.models.llama.modeling_llama"),
    torch_checkpoint: ("torch.distributed.checkpoint",),
    fastsafetensors_cpu: ("torch", "fastsafetensors"),
    runai_streamer: ("torch", "runai_model_streamer"),
}

LOADERS: Mapping[str, Loader] = {
    BASELINE: memmap,
    OURS: ours,
    IN_PLACE: ours_in_place,
    ORBAX: orbax_safetensors,
    "safetensors.numpy load_file + device_put": safetensors_numpy,
    "safetensors.flax load_file + device_put": safetensors_flax,
    "safetensors get_slice + make_array_from_callback": safetensors_slices,
    "transformers from_pretrained + device_put": transformers_torch,
    "torch DCP HuggingFaceStorageReader + device_put": torch_checkpoint,
    "fastsafetensors + device_put": fastsafetensors_cpu,
    "runai-model-streamer + device_put": runai_streamer,
}
