"""Several processes convert together: any order, killed and restarted, nothing partial."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import checkpoints
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxshard as js
from jaxshard.conversion.execute import execute
from jaxshard.conversion.prepare import prepare
from jaxshard.distributed.processes import Part, assign, cut_evenly, part_of, split_outputs
from jaxshard.errors import LayoutError, StorageError
from jaxshard.storage import shared_transaction as parts_module
from jaxshard.storage.transaction import Transaction

SIZES = {"layers": 4, "hidden": 64, "vocab": 128}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    checkpoints.write_llama(folder, num_files=3, **SIZES)
    return folder


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone") / "cut"
    js.convert(llama, folder, "dp2mp2pp2")
    return folder


def run_part(source, destination, index, count, to="dp2mp2pp2", **options):
    options = {"process_index": index, "process_count": count, "fsync": False, **options}
    return execute(prepare(source, to), destination, **options)


def assert_same(folder, other):
    found = filecmp.dircmp(folder, other)
    stack = [found]
    while stack:
        here = stack.pop()
        assert not here.left_only
        assert not here.right_only
        _, different, odd = filecmp.cmpfiles(here.left, here.right, here.common_files, False)
        assert (different, odd) == ([], [])
        stack += here.subdirs.values()


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


# --- who writes what -----------------------------------------------------------------


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 9))
def test_neighbours_stay_together_and_nobody_is_far_from_his_share(sizes, count):
    cuts = cut_evenly(sizes, count)
    assert cuts == sorted(cuts)
    assert all(0 <= p < count for p in cuts)
    for process in range(count):
        done = sum(s for s, p in zip(sizes, cuts, strict=True) if p == process)
        assert done <= sum(sizes) / count + max(sizes)


def test_every_file_is_written_by_one_process(llama):
    outputs = prepare(llama, "dp4mp2pp2").plan.outputs
    for count in (1, 3, 5, 16, 40):
        split = split_outputs(outputs, range(16), count)
        assert sorted(r for ranks in split for r in ranks) == list(range(16))


def test_replicas_go_to_one_process(llama):
    """So each reads half of the matrices, though every process writes files of all kinds."""
    outputs = prepare(llama, "dp4mp2").plan.outputs
    assert split_outputs(outputs, range(8), 2) == ({0, 2, 4, 6}, {1, 3, 5, 7})


def test_shards_are_assigned_by_weight():
    weights = {i: i % 7 + 1 for i in range(60)}
    owners = assign(weights, {i: (i % 3, (i + 1) % 3) for i in weights})
    loads = [sum(weights[i] for i, o in owners.items() if o == p) for p in range(3)]
    assert max(loads) - min(loads) <= 7
    assert all(o in (i % 3, (i + 1) % 3) for i, o in owners.items())


# --- who am I ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "count", "environ", "part"),
    [
        ("1", "3", {}, Part(1, 3)),
        ("auto", None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, Part(1, 4)),
        (
            "auto",
            "auto",
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0"},
            Part(2, 4),
        ),
        ("auto", "8", {"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, Part(5, 8)),
        (None, None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, None),  # never behind one's back
    ],
)
def test_the_part_is_as_said_or_as_the_job_says(index, count, environ, part):
    assert part_of(index, count, environ) == part


@pytest.mark.parametrize(
    ("index", "count", "environ", "said"),
    [
        ("1", None, {}, "needs process_count="),
        (None, "2", {}, "needs process_index="),
        ("2", "2", {}, "numbered from 0 to 1"),
        ("auto", "auto", {}, "SLURM_PROCID"),
        ("x", "2", {}, "not a number"),
    ],
)
def test_a_part_that_is_none_is_refused(index, count, environ, said):
    with pytest.raises(LayoutError, match=said):
        part_of(index, count, environ)


# --- together ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_parts_in_any_order_make_what_one_process_makes(llama, whole, tmp_path, seed):
    order = random.Random(seed).sample(range(3), 3)
    out = tmp_path / "cut"
    for n, index in enumerate(order):
        report = run_part(llama, out, index, 3)
        assert report.is_published == (n == 2)
        assert out.exists() == (n == 2)
    assert_same(out, whole)
    assert visible(tmp_path) == ["cut"]
    assert list(tmp_path.iterdir()) == [out]


def test_each_part_reads_and_writes_its_share(llama, tmp_path):
    alone = prepare(llama, "mp2pp2").plan.totals
    reports = [run_part(llama, tmp_path / "cut", i, 4, "mp2pp2") for i in range(4)]
    assert sum(r.counts.bytes_written for r in reports) == alone.bytes_written
    for report in reports:
        assert report.counts.bytes_written <= alone.bytes_written / 4 * 1.3
        assert report.counts.bytes_needed <= alone.bytes_needed / 4 * 1.3


def test_more_parts_than_files_leave_some_with_nothing_to_do(llama, tmp_path):
    reports = [run_part(llama, tmp_path / "full", i, 3, "full") for i in (2, 0, 1)]
    assert sorted(r.num_files for r in reports) == [0, 0, 1]
    assert [r.is_published for r in reports] == [False, False, True]
    verdict = js.verify(tmp_path / "full", llama)
    assert not verdict.problems


def test_parts_that_end_together_publish_once(llama, whole, tmp_path, monkeypatch):
    """Eight at once, several times over: one publishes, all succeed."""
    published, plain = [], parts_module.steps.place

    def place(base, destination, **how):
        published.append(destination)
        plain(base, destination, **how)

    monkeypatch.setattr(parts_module.steps, "place", place)
    for attempt in range(3):
        out, reports, barrier = tmp_path / f"cut{attempt}", [], threading.Barrier(8)

        def work(index, out=out, reports=reports, barrier=barrier):
            barrier.wait()
            reports.append(run_part(llama, out, index, 8))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert published == [tmp_path / f"cut{n}" for n in range(attempt + 1)]
        assert any(r.is_published for r in reports)  # one, or more that came to see it there
        assert len(reports) == 8
        assert_same(out, whole)


KILLED = """
import os, signal, sys
from jaxshard.conversion.prepare import prepare
from jaxshard.conversion.execute import execute
from jaxshard.storage import shared_transaction as parts
source, out, index, count, after, what = sys.argv[1:]
plain, left = getattr(parts.SharedTransaction, what), [int(after)]
def dying(self, *args):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return plain(self, *args)
setattr(parts.SharedTransaction, what, dying)
how = dict(process_index=index, process_count=count, fsync=False)
execute(prepare(source, "dp2mp2pp2", workers=1), out, **how)
"""


def test_a_part_that_was_killed_goes_on_when_started_again(llama, whole, tmp_path):
    out = tmp_path / "cut"
    run_part(llama, out, 2, 3)
    arguments = [llama, out, "0", "3", "1", "finish"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert visible(tmp_path) == []
    assert not run_part(llama, out, 1, 3).is_published  # all others are done, and it is not there
    assert visible(tmp_path) == []
    report = run_part(llama, out, 0, 3)
    assert (report.skipped_files, report.is_published) == (1, True)
    assert_same(out, whole)


def test_a_part_killed_before_it_could_publish_publishes_when_started_again(llama, whole, tmp_path):
    out = tmp_path / "cut"
    for index in (0, 1):
        run_part(llama, out, index, 3)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, [llama, out, "2", "3", "0", "publish"])],
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert visible(tmp_path) == []
    assert run_part(llama, out, 2, 3).is_published
    assert_same(out, whole)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_killed_after_it_published_finds_all_done(llama, whole, tmp_path, overwrite):
    """Between the result's getting its name and the folder's going, every part may be rerun."""
    out = tmp_path / "cut"
    if overwrite:
        js.convert(llama, out, "mp2")
    how = {"overwrite": overwrite}
    for index in (0, 1):
        run_part(llama, out, index, 3, **how)
    code = KILLED.replace("fsync=False", f"fsync=False, overwrite={overwrite}").replace(
        "parts.SharedTransaction, what", "parts.steps, what"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, [llama, out, "2", "3", "0", "remove_base"])],
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert_same(out, whole)
    reports = [run_part(llama, out, index, 3, **how) for index in (1, 0, 2)]
    assert [r.is_published for r in reports] == [True] * 3
    assert [r.counts.bytes_written for r in reports] == [0] * 3
    assert_same(out, whole)
    assert list(tmp_path.iterdir()) == [out]


def test_in_a_batch_job_python_may_ask_for_its_part_too(llama, whole, tmp_path, monkeypatch):
    for index in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(index))
        monkeypatch.setenv("SLURM_NTASKS", "2")
        options = {"process_count": "auto", "fsync": False}
        report = js.convert(llama, tmp_path / "cut", "dp2mp2pp2", **options)
        assert report.part == Part(index, 2)
    assert_same(tmp_path / "cut", whole)


def test_a_disk_without_locks_is_told_from_one_in_use(llama, tmp_path, monkeypatch):
    def refuse(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("jaxshard.storage.staging.fcntl.flock", refuse)
    with pytest.raises(
        StorageError, match=r"not support file locks \(No locks.*Mount it with locks"
    ):
        run_part(llama, tmp_path / "cut", 0, 2)


def test_a_finished_part_may_be_started_again(llama, whole, tmp_path):
    for index in (0, 0, 1, 0):
        report = run_part(llama, tmp_path / "cut", index, 3)
    assert report.counts.bytes_written == 0
    run_part(llama, tmp_path / "cut", 2, 3)
    assert_same(tmp_path / "cut", whole)


@pytest.mark.parametrize("numbers", ["auto", "given"])
def test_the_command_line_takes_its_part_from_the_job_or_as_given(llama, whole, tmp_path, numbers):
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "jaxshard", "convert", str(llama), str(out)]
    command += ["--to", "dp2mp2pp2", "--json", "--process-index"]
    jobs = [
        subprocess.Popen(
            [*command, *(["auto"] if numbers == "auto" else [str(i), "--process-count", "2"])],
            env=os.environ | {"SLURM_PROCID": str(i), "SLURM_NTASKS": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    answers = [json.loads(job.communicate(timeout=60)[0]) for job in jobs]
    assert any(a["is_published"] for a in answers)
    assert_same(out, whole)


# --- what does not belong together ---------------------------------------------------


def test_parts_of_other_requests_are_refused(llama, tmp_path):
    out = tmp_path / "cut"
    run_part(llama, out, 0, 3)
    for index, count, to in ((1, 4, "dp2mp2pp2"), (1, 3, "mp2")):
        with pytest.raises(LayoutError, match="another conversion"):
            run_part(llama, out, index, count, to)
    for resume in (True, False):
        with pytest.raises(LayoutError):
            js.convert(llama, out, "dp2mp2pp2", resume=resume)
    assert run_part(llama, out, 1, 3).skipped_files == 0
    assert run_part(llama, out, 2, 3).is_published


def test_another_request_may_be_discarded_when_nobody_works_on_it(llama, tmp_path):
    out = tmp_path / "cut"
    run_part(llama, out, 0, 2, "mp2")
    for index in (0, 1):
        run_part(llama, out, index, 2, overwrite=True)
    assert js.open(out).layout.num_ranks == 8


def test_another_request_is_not_discarded_while_a_part_is_at_work(llama, tmp_path):
    out = tmp_path / "cut"
    at_work = parts_module.SharedTransaction(out, "something else", 0, 2, durable=False)
    with pytest.raises(LayoutError, match="other parts are at work"):
        run_part(llama, out, 1, 2, overwrite=True)
    with pytest.raises(StorageError, match=r"part-0 of .* runs already"):
        parts_module.SharedTransaction(out, "something else", 0, 2)
    with pytest.raises(StorageError, match="another process"):
        Transaction(out, "alone", overwrite=True)
    at_work.abandon()
    assert run_part(llama, out, 1, 2).num_files == 4  # nothing was finished: it may go


def test_an_existing_result_is_replaced_only_when_the_last_part_is_done(llama, whole, tmp_path):
    out = tmp_path / "cut"
    js.convert(llama, out, "mp2")
    with pytest.raises(LayoutError, match="exists"):
        run_part(llama, out, 0, 2)
    run_part(llama, out, 1, 2, overwrite=True)
    assert js.open(out).layout.num_ranks == 2
    run_part(llama, out, 0, 2, overwrite=True)
    assert_same(out, whole)


def test_a_replaced_result_is_not_taken_for_finished_work(llama, whole, tmp_path, monkeypatch):
    """Killed after the exchange and before the tidying: what lies in the staging is the old one."""
    out = tmp_path / "cut"
    checkpoints.write_llama(tmp_path / "other", num_files=3, seed=1, **SIZES)
    js.convert(tmp_path / "other", out, "dp2mp2pp2")
    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "_remove", lambda self: self._release())
        patch.setattr("jaxshard.storage.transaction.settle", lambda *a, **k: None)
        js.convert(llama, out, "dp2mp2pp2", overwrite=True)
    assert_same(out, whole)
    assert (tmp_path / ".cut.partial" / "files").exists()
    js.convert(llama, out, "dp2mp2pp2", overwrite=True, resume=True)
    assert_same(out, whole)
    assert Path(out).exists()


def test_a_full_disk_at_the_end_of_a_part_is_told_with_the_remedy(llama, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        with pytest.raises(StorageError, match=r"part-0.done cannot .*No space left.*ake room"):
            run_part(llama, tmp_path / "cut", 0, 2)
    assert run_part(llama, tmp_path / "cut", 0, 2).skipped_files == 4
