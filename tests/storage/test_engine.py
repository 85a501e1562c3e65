"""The engine: on any number of threads, the first error stops all, and memory is bounded."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from ends import From, Into

from jaxshard.core.box import Box
from jaxshard.core.catalog import StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.errors import LayoutError, StorageError
from jaxshard.planning.copies import move_into
from jaxshard.storage import engine
from jaxshard.storage.resources import Budget, WorkQueue, fit_budget, run_threads


def moves(number: int, rows: int = 64) -> list:
    """Journeys of one block each, from a file to a target of the same shape."""
    whole = Box((0, 0), (rows, 64))
    tensor = Tensor("t", BY_NAME["U8"], (rows, 64), (StoredShard(0, 0, whole),))
    return [move_into(tensor, {whole: (0,)}) for _ in range(number)]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_first_error_stops_all_threads(workers):
    done = []

    def read(piece, offset, buffer):
        done.append(1)
        if len(done) == 20:
            raise StorageError("the disk is gone")

    with pytest.raises(StorageError, match="the disk is gone"):
        engine.run(moves(100_000), From(read), Into(), budget=Budget(workers, 4096))
    assert len(done) < 20 + 50 * workers


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_while_planning_is_the_error(workers):
    def broken():
        yield from moves(10)
        raise LayoutError("no such cut")

    with pytest.raises(LayoutError, match="no such cut"):
        engine.run(broken(), From(), Into(), budget=Budget(workers, 4096))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_stops_all_threads(workers):
    done = []

    def read(piece, offset, buffer):
        done.append(1)
        if len(done) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        engine.run(moves(100_000), From(read), Into(), budget=Budget(workers, 4096))
    before = len(done)
    assert before < 1000
    time.sleep(0.05)
    assert len(done) == before, "a thread goes on although the run has ended"


@pytest.mark.parametrize("workers", [1, 3])
def test_progress_adds_up_to_what_is_written(workers):
    told = []
    budget = Budget(workers, 1024)
    counts = engine.run(moves(50), From(), Into(), budget=budget, progress=told.append)
    assert sum(told) == counts.bytes_written == 50 * 64 * 64


def test_no_moves_are_no_work():
    assert engine.run([], From(), Into(), budget=Budget(2, 4096)).num_reads == 0


def test_batches_are_given_to_one_thread_each():
    source, taken = WorkQueue(iter(range(1, 1000))), []

    def job(shared):
        while (item := shared.next()) is not None:
            taken.append(item)

    run_threads([job] * 4, source)
    assert sorted(taken) == list(range(1, 1000))


@pytest.mark.parametrize("host_bytes", [1 << 19, 1 << 20, 10**7, 64 << 20, 1 << 30])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_budget_is_kept_and_used(host_bytes, workers):
    budget = fit_budget(host_bytes, workers)
    assert 1 <= budget.workers <= workers
    assert budget.block_bytes >= 64 << 10
    assert budget.workers * budget.block_bytes * 8 <= host_bytes
    assert budget.block_bytes & (budget.block_bytes - 1) == 0


@pytest.mark.parametrize(("host_bytes", "workers"), [(0, 1), (524287, 1), (1 << 30, 0)])
def test_a_budget_for_nobody_is_refused(host_bytes, workers):
    with pytest.raises(LayoutError, match=r"524288 or more|at least 1"):
        fit_budget(host_bytes, workers)


@pytest.mark.parametrize("to", ["mp4", "full"])
def test_a_dry_run_counts_in_the_blocks_of_the_budget(tmp_path, to):
    """Blocks of 64 KiB instead of a mebibyte: more requests, and the plan says so."""
    checkpoints.write_folder(
        tmp_path / "big",
        {"lm_head.weight": np.zeros((512, 2048), np.float32)},
        config={"model_type": "llama"},
    )
    from jaxshard.conversion.execute import execute  # noqa: PLC0415
    from jaxshard.conversion.prepare import prepare  # noqa: PLC0415

    prepared = prepare(tmp_path / "big", to, host_bytes=1 << 19)
    plan = prepared.plan
    assert plan.totals.num_reads > prepare(tmp_path / "big", to).plan.totals.num_reads
    counts = execute(prepared, Path(tmp_path / "out"), fsync=False).counts
    assert (counts.num_reads, counts.num_writes) == (plan.totals.num_reads, plan.totals.num_writes)
    assert counts.num_copies == plan.totals.num_copies
