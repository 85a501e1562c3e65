"""What each of several processes does in the tests of loading and saving."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401 - names its dtypes to NumPy
import numpy as np
import processes
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxshard as js
from jaxshard import loading, saving
from jaxshard.errors import JaxshardError
from jaxshard.storage import shared_writing

STRATEGIES = ("dp2mp4", "mp8", "dp8", "dp2mp2pp2", "mp4pp2", "dp4mp2optall")


def truth_of(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


def is_right(arrays, truth):
    """Whether all shards here are bit for bit as in ``truth``."""
    assert set(arrays) == set(truth)
    return all(
        np.asarray(s.data).tobytes() == np.ascontiguousarray(truth[n][s.index]).tobytes()
        for n, a in arrays.items()
        for s in a.addressable_shards
    )


def distinct_bytes(arrays):
    """Bytes of this process's distinct shards."""
    held = {
        (n, str(s.index)): s.data.nbytes for n, a in arrays.items() for s in a.addressable_shards
    }
    return sum(held.values())


def load_and_save(index, count, source, out):
    """Load in every layout, save in several forms, load what was saved."""
    truth, answer = truth_of(source), {"load": {}, "save": {}}
    for strategy in STRATEGIES:
        counts = []
        arrays = loading.load(source, strategy, counted=counts.append)
        answer["load"][strategy] = {
            "right": is_right(arrays, truth),
            "read": counts[0].bytes_needed,
            "share": distinct_bytes(arrays),
        }
    answer["balanced"] = {}
    for strategy in ("dp2mp4", "dp8", "dp2mp2pp2"):
        counts = []
        arrays = loading.load(source, strategy, counted=counts.append, balanced=True)
        answer["balanced"][strategy] = {
            "right": is_right(arrays, truth),
            "read": counts[0].bytes_needed,
        }
    for strategy in ("dp2mp4", "mp4pp2", "dp4mp2optall"):
        arrays = loading.load(source, strategy)
        for form in ("huggingface", "ranks"):
            place = f"{out}/{strategy}-{form}"
            report = saving.save(arrays, place, format=form, durable=False, timeout_s=60)
            assert js.open(place)  # it is there for everybody when save has returned
            again = loading.load(place, strategy)
            answer["save"][f"{strategy}-{form}"] = {
                "right": is_right(again, truth),
                "written": report.counts.bytes_written,
                "total": sum(a.nbytes for a in truth.values()),
            }
    return answer
