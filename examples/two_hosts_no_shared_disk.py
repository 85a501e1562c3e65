"""Two hosts with separate disks: each saves the shards of its own devices.

    python examples/two_hosts_no_shared_disk.py         runs both hosts as processes

Each host has its own directory. Both need the initial checkpoint (or its ``slice``: the
rank directories of their own devices); afterwards neither reads the other's files, and both
resume from their own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from two_hosts_shared_disk import HOSTS, both_hosts, say, write_model


def on_one_host(coordinator: str, index: int, folder: Path) -> None:
    """Run one host; ``own`` is on its own disk."""
    import jax  # noqa: PLC0415 - after the environment is set

    jax.distributed.initialize(coordinator, num_processes=HOSTS, process_id=index)
    import jaxshard as js  # noqa: PLC0415

    own = folder / f"host{index}"
    params = js.load(own / "model", "mp4pp2")  # host 0 has the first stage, host 1 the second
    js.save(params, own / "saved", format="ranks", shared_filesystem=False, timeout_s=60)
    say(f"host {index}: {' '.join(sorted(p.name for p in (own / 'saved').iterdir()))}")

    again = js.load(own / "saved", "mp4pp2")  # all names, with the shards of its devices
    truth = safetensors.numpy.load_file(own / "model" / "model.safetensors")
    assert set(again) == set(truth)
    for name, array in again.items():
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), truth[name][shard.index]), name

    try:
        js.load(own / "saved", "dp8")  # needs what only the other host has
    except js.CoverageError as error:
        say(f"host {index}: {str(error)[:160]} …")
    else:
        raise AssertionError("it cannot be here")

    moved = js.reshard(again, "dp8")  # the devices have it all, and send it to each other
    assert all(
        np.array_equal(np.asarray(array.addressable_data(0)), truth[name])
        for name, array in moved.items()
    )


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
        for index in range(HOSTS):
            (Path(folder) / f"host{index}").mkdir()
            write_model(Path(folder) / f"host{index}" / "model")
        both_hosts(__file__, Path(folder))


if __name__ == "__main__":
    main()
