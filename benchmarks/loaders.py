"""Ways of loading a Hugging Face folder onto a mesh: ours, the baseline and the peers.

Each takes a folder and the sharding of every tensor, and returns ``{name: jax.Array}``,
ready. A peer that is not installed raises ImportError when it is asked for.
"""

# ruff: noqa: PLC0415 - a sample imports what it measures and nothing else

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

Shardings = Mapping[str, Sharding]
Loader = Callable[[Path, Shardings], Mapping[str, jax.Array]]


def ours(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    from jaxshard.loader import load

    return jax.block_until_ready(load(folder, dict(shardings)))


def ours_in_place(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    from jaxshard.loader import load

    return jax.block_until_ready(load(folder, dict(shardings), mmap=True))


class Entry(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return 2 * math.prod(self.shape)


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor's place, all of them bfloat16; a header parser of a dozen lines."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert entry["dtype"] == "BF16", entry
            found[name] = Entry(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return found


def views(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as a view of its mapped file."""
    maps: dict[Path, np.ndarray] = {}
    found = {}
    for name, entry in entries(folder).items():
        if entry.path not in maps:
            with open(entry.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            maps[entry.path] = np.frombuffer(mapped, np.uint8)
        part = maps[entry.path][entry.offset : entry.offset + entry.num_bytes]
        found[name] = part.view(ml_dtypes.bfloat16).reshape(entry.shape)
    return found


def hand_preadv(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    """What one writes by hand: two threads read whole tensors, and each device gets its view."""

    def one(item: tuple[str, Entry]) -> tuple[str, jax.Array]:
        name, entry = item
        memory, done = np.empty(entry.num_bytes, np.uint8), 0
        with open(entry.path, "rb", buffering=0) as file:
            while done < memory.size:
                done += os.preadv(file.fileno(), [memory[done:].data], entry.offset + done)
        whole = memory.view(ml_dtypes.bfloat16).reshape(entry.shape)
        found = jax.make_array_from_callback(
            entry.shape, shardings[name], lambda index: np.ascontiguousarray(whole[index])
        )
        return name, found

    with ThreadPoolExecutor(2) as pool:
        return jax.block_until_ready(dict(pool.map(one, entries(folder).items())))


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
    return _slices(folder, shardings, backend="mmap")


def _slices(folder: Path, shardings: Shardings, backend: str) -> Mapping[str, jax.Array]:
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy", backend=backend) as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                found[name] = jax.make_array_from_callback(
                    tuple(part.get_shape()), shardings[name], lambda index, part=part: part[index]
                )
    return jax.block_until_ready(found)


def safetensors_pread(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                found[name] = jax.device_put(file.get_tensor(name), shardings[name])
    return jax.block_until_ready(found)


def safetensors_pread_slices(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    return _slices(folder, shardings, backend="pread")


def tensorstore_ranges(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
    reads = {
        name: store.read(
            entry.path.name, byte_range=slice(entry.offset, entry.offset + entry.num_bytes)
        )
        for name, entry in entries(folder).items()
    }
    found = {}
    for name, entry in entries(folder).items():
        data = np.frombuffer(reads.pop(name).result().value, ml_dtypes.bfloat16)
        found[name] = jax.device_put(data.reshape(entry.shape), shardings[name])
    return jax.block_until_ready(found)


def native_of(folder: Path) -> Path:
    """Where the checkpoint of ``folder`` lies in Orbax's own format."""
    return folder.with_name(f"{folder.name}-orbax")


def orbax_native(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import orbax.checkpoint as ocp

    wanted = {
        name: jax.ShapeDtypeStruct(entry.shape, ml_dtypes.bfloat16, sharding=shardings[name])
        for name, entry in entries(folder).items()
    }
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return jax.block_until_ready(
            reader.restore(
                native_of(folder), args=ocp.args.PyTreeRestore(wanted, restore_args=arguments)
            )
        )


def orbax_safetensors(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import orbax.checkpoint.experimental.v1 as ocp

    layout = ocp.options.CheckpointLayout.SAFETENSORS
    wanted = {
        name: jax.ShapeDtypeStruct(entry.shape, ml_dtypes.bfloat16, sharding=shardings[name])
        for name, entry in entries(folder).items()
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


def accelerate_torch(folder: Path, shardings: Shardings) -> Mapping[str, jax.Array]:
    import torch
    from accelerate import init_empty_weights, load_checkpoint_in_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model = model.to(torch.bfloat16)
    load_checkpoint_in_model(model, str(folder), device_map={"": "cpu"}, dtype=torch.bfloat16)
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
        name: torch.empty(entry.shape, dtype=torch.bfloat16)
        for name, entry in entries(folder).items()
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
ORBAX_NATIVE = "orbax, its own format (OCDBT)"

#: Peers that cannot take part, and why: nobody should wonder whether they were forgotten.
NOT_TRIED: Mapping[str, str] = {
    "tunix": "its loader imports metrax, which no index here has, and fills its own models only",
    "InstantTensor": "CUDA only",
    "levanter": "its releases do not import with this JAX",
    "MaxText, EasyDeL, tpu-inference": "not installable beside this JAX",
}

#: What each imports; done before the clock starts.
MODULES: Mapping[Loader, tuple[str, ...]] = {
    ours: ("jaxshard.loader",),
    ours_in_place: ("jaxshard.loader",),
    orbax_safetensors: ("orbax.checkpoint.experimental.v1",),
    orbax_native: ("orbax.checkpoint",),
    tensorstore_ranges: ("tensorstore",),
    safetensors_pread: ("safetensors",),
    safetensors_pread_slices: ("safetensors",),
    accelerate_torch: ("torch", "accelerate", "transformers.models.llama.modeling_llama"),
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
    ORBAX_NATIVE: orbax_native,
    "preadv by hand, 2 threads + views": hand_preadv,
    "tensorstore byte ranges + device_put": tensorstore_ranges,
    "safetensors pread get_tensor + device_put": safetensors_pread,
    "safetensors pread get_slice + make_array_from_callback": safetensors_pread_slices,
    "accelerate load_checkpoint_in_model + device_put": accelerate_torch,
    "safetensors.numpy load_file + device_put": safetensors_numpy,
    "safetensors.flax load_file + device_put": safetensors_flax,
    "safetensors get_slice + make_array_from_callback": safetensors_slices,
    "transformers from_pretrained + device_put": transformers_torch,
    "torch DCP HuggingFaceStorageReader + device_put": torch_checkpoint,
    "fastsafetensors + device_put": fastsafetensors_cpu,
    "runai-model-streamer + device_put": runai_streamer,
}
