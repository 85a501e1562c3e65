"""Two hosts with a shared filesystem: load, reshard, save together, and load the result.

    python examples/two_hosts_shared_disk.py            runs both hosts as processes

On two hosts start it on each, with a shared directory that contains a checkpoint:

    python examples/two_hosts_shared_disk.py --coordinator host0:1234 --index 0 --folder /shared/job
    python examples/two_hosts_shared_disk.py --coordinator host0:1234 --index 1 --folder /shared/job
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy

if TYPE_CHECKING:
    from jaxshard.storage.resources import Counts

HOSTS, DEVICES = 2, 4  # four devices each


def say(text: str) -> None:
    """Print a line atomically, because the other host prints to the same terminal."""
    sys.stdout.write(f"{text}\n")


def on_one_host(coordinator: str, index: int, folder: Path) -> None:
    """Run one host; all hosts run the same."""
    import jax  # noqa: PLC0415 - after the environment is set

    jax.distributed.initialize(coordinator, num_processes=HOSTS, process_id=index)
    import jaxshard as js  # noqa: PLC0415

    counts = []
    params = js.load(folder / "model", "dp2mp4", counted=counts.append)
    say(f"host {index}: {told(counts)}, all that its own devices hold")

    counts.clear()
    params = js.load(folder / "model", "dp2mp4", balanced=True, counted=counts.append)
    say(f"host {index}: {told(counts)}, none of which the other needed to read")

    # between the hosts' devices, not through host memory
    params = js.reshard(params, "dp4mp2")
    report = js.save(params, folder / "saved", timeout_s=60)
    say(f"host {index}: wrote {report.counts.bytes_written:,} bytes, its share")

    # pipeline stages: each host holds the layers of its stage
    again = js.load(folder / "saved", "mp4pp2")
    here = sum(bool(array.addressable_shards) for array in again.values())
    say(f"host {index}: holds {here} of {len(again)} tensors")
    truth = safetensors.numpy.load_file(folder / "model" / "model.safetensors")
    for name, array in again.items():
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), truth[name][shard.index]), name


def told(counts: list[Counts]) -> str:
    """Format needed and read bytes, which include gaps of less than a page between short rows."""
    (found,) = counts
    return f"needed {found.bytes_needed:,} bytes and read {found.bytes_read:,}"


def write_model(folder: Path) -> None:
    """Write a small Llama with random weights."""
    chance = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (128, 64), "model.norm.weight": (64,)}
    for i in range(4):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (64, 64) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (256, 64) for p in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (64, 256)}
        shapes |= {f"{at}input_layernorm.weight": (64,)}
        shapes |= {f"{at}post_attention_layernorm.weight": (64,)}
    shapes["lm_head.weight"] = (128, 64)
    folder.mkdir()
    arrays = {n: chance.standard_normal(s, np.float32) for n, s in shapes.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))


def both_hosts(script: str, folder: Path) -> None:
    """Start every host as a local process, and wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    command = [sys.executable, script, "--coordinator", coordinator, "--folder", str(folder)]
    hosts = [
        subprocess.Popen([*command, "--index", str(index)], env=environ) for index in range(HOSTS)
    ]
    ended = [host.wait(timeout=120) for host in hosts]
    assert ended == [0] * HOSTS, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coordinator", help="host:port of host 0")
    parser.add_argument("--index", type=int)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.index is not None:
        on_one_host(arguments.coordinator, arguments.index, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        both_hosts(__file__, Path(folder))
        print("saved by both:", *sorted(p.name for p in (Path(folder) / "saved").iterdir()))


if __name__ == "__main__":
    main()
