"""Several processes of JAX: what each reads, writes and holds, and what becomes of a dead one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import safetensors.numpy
from processes import answers, run_processes

import jaxshard as js
from jaxshard.multiprocess.barriers import Processes

HERE = Path(__file__).parent
SIZES = {"layers": 4, "hidden": 64, "vocab": 128}
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiling takes longer than moving
SHAPES = [(2, 4), (4, 2)]  # processes × devices


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    checkpoints.write_llama(folder, num_files=3, **SIZES)
    return folder


@pytest.fixture(scope="module", params=SHAPES, ids=["2x4", "4x2"])
def files(request, llama, tmp_path_factory):
    """What each process answered, and where all of them saved."""
    out = tmp_path_factory.mktemp("out")
    work = partial(run_processes, "multiprocess_files:load_and_save", *request.param)
    return answers(work(str(llama), str(out))), out


def total_bytes(llama):
    return js.open(llama).num_bytes


def test_every_process_gets_its_shards_and_reads_no_other_byte(files):
    for answer in files[0]:
        for strategy, found in answer["load"].items():
            assert found["right"], strategy
            assert found["read"] == found["share"], strategy


def test_a_balanced_load_reads_every_byte_once(files, llama):
    total = total_bytes(llama)
    for strategy in ("dp2mp4", "dp8", "dp2mp2pp2"):
        found = [answer["balanced"][strategy] for answer in files[0]]
        assert all(f["right"] for f in found)
        assert sum(f["read"] for f in found) == total
        assert max(f["read"] for f in found) < 1.05 * total / len(found)


def test_what_several_processes_save_is_what_one_process_saves(files, llama, tmp_path):
    """Bit for bit, file for file; the side files too."""
    from test_multiprocess_convert import assert_same  # noqa: PLC0415

    answered, out = files
    for answer in answered:
        assert all(saved["right"] for saved in answer["save"].values())
    for strategy in ("dp2mp4", "mp4pp2", "dp4mp2optall"):
        alone = tmp_path / strategy
        js.save(js.load(llama, strategy), alone, durable=False)
        assert_same(out / f"{strategy}-huggingface", alone)
        alone = tmp_path / f"{strategy}-ranks"
        js.save(js.load(llama, strategy), alone, format="ranks", durable=False)
        assert_same(out / f"{strategy}-ranks", alone)
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_the_work_of_writing_is_shared(files, llama):
    total, answered = total_bytes(llama), files[0]
    for case in answered[0]["save"]:
        written = [answer["save"][case]["written"] for answer in answered]
        assert max(written) < 1.05 * sum(written) / len(written), case
        if case.endswith("huggingface"):
            assert sum(written) == total


# --- resharding ------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "first", "step"), [((2, 4), 0, 10), ((4, 2), 4, 20)])
def test_a_grid_of_layouts_over_processes(shape, first, step):
    """Some 65 pairs in all; every bit right, within the bound, nothing over the host."""
    work = partial(run_processes, "multiprocess_reshard:grid", timeout_s=240, environ=QUICK)
    for answer in answers(work(*shape, first, step)):
        assert answer["wrong"] == []
        assert answer["over"] == []
        assert answer["kinds"]["compiled"] + answer["kinds"]["exchange"] >= 15
        assert answer["host_bytes"] < 64  # a few scalars; JAX's views inside a process not counted


def test_trees_dtypes_and_stages_move_between_processes():
    for answer in answers(run_processes("multiprocess_reshard:kinds", 2, 4, environ=QUICK)):
        assert answer["right"]
        assert "exchange" in answer["plan"]
        assert "narrower than a byte; between processes 0, 1" in answer["refused"]["int4"]
        assert "inside one process" in answer["refused"]["views"]
        assert "from_processes=True" in answer["refused"]["host"]


# --- what goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 12])
def test_a_process_killed_while_saving_leaves_the_old_checkpoint_good(llama, tmp_path, when):
    out = tmp_path / "ckpt"
    other = checkpoints.write_llama(tmp_path / "other", num_files=3, seed=1, **SIZES)
    js.convert(tmp_path / "other", out)
    ended = run_processes(
        "multiprocess_files:killed_while_saving", 3, 4, str(llama), str(out), 1, when
    )
    assert ended[1].status == -signal.SIGKILL
    for survivor in (ended[0], ended[2]):
        kind, said, seconds = survivor.answer
        assert kind == "StorageError"
        assert "1 of 3 processes did not come within 3 s: 1" in said
        assert seconds < 20
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ckpt", "other"]
    found = safetensors.numpy.load_file(out / "model.safetensors")
    assert all(np.array_equal(found[n].view(np.uint16), other[n].view(np.uint16)) for n in other)


def test_all_hear_at_once_of_one_that_fails_and_the_rerun_is_good(llama, tmp_path):
    ended = run_processes(
        "multiprocess_files:failing_while_saving", 2, 4, str(llama), str(tmp_path / "ckpt")
    )
    said, seconds, right = zip(*answers(ended), strict=True)
    assert "process 1: OSError" in said[0]
    assert "No space left" in said[0]
    assert "No space left" in said[1]
    assert max(seconds) < 30  # of 60: nobody waits for the time-out
    assert all(right)


def test_nobody_waits_in_a_collective_for_one_that_cannot_read(llama, tmp_path):
    source = tmp_path / "llama"
    shutil.copytree(llama, source)
    damaged = tmp_path / "llama-damaged"
    shutil.copytree(llama, damaged)
    for path in damaged.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    work = partial(run_processes, "multiprocess_files:balanced_while_one_fails", 2, 4, str(source))
    (well, said, seconds), (broken, _, _) = answers(work(False))
    assert (well, broken) == ("StorageError", "FormatError")
    assert "process 1: FormatError" in said
    assert seconds < 30  # of 60


def test_nobody_waits_in_a_collective_for_one_that_was_killed(llama):
    work = partial(run_processes, "multiprocess_files:balanced_while_one_fails", 2, 4, str(llama))
    survivor, dead = work(True)
    assert dead.status == -signal.SIGKILL
    kind, said, seconds = survivor.answer
    assert kind == "StorageError"
    assert "1 of 2 processes did not come within 3 s: 1" in said
    assert seconds < 20


def test_two_hosts_with_a_cable_between_them_and_no_disk(llama, tmp_path):
    """Network and mount namespaces of their own: what one writes the other cannot see."""
    alone = ["unshare", "-Urnm"]
    if shutil.which("ip") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("this machine lets nobody make network namespaces")
    program = (
        "import sys, json, jax; i = int(sys.argv[3]);"
        "jax.distributed.initialize('10.77.0.1:9911', num_processes=2, process_id=i);"
        "import multiprocess_files as work;"
        "print('ANSWER ' + json.dumps([i, work.apart(i, 2, *sys.argv[1:3])]), flush=True)"
    )
    command = [*alone, "bash", HERE / "two_hosts.sh", tmp_path]
    command += [sys.executable, "-c", program, llama, tmp_path]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("ANSWER ")[1:]  # they share a pipe: lines may end late
    found = [json.JSONDecoder().raw_decode(answer)[0] for answer in said]
    assert sorted(index for index, _ in found) == [0, 1]
    for index, answer in found:
        _check_apart(index, answer)
    assert list(tmp_path.iterdir()) == []  # their disks went with them


def test_hosts_without_a_common_disk_keep_what_their_devices_hold(llama, tmp_path):
    work = partial(run_processes, "multiprocess_files:apart", 2, 4, str(llama), str(tmp_path))
    for index, answer in enumerate(answers(work())):
        _check_apart(index, answer)


def _check_apart(index, answer):
    own = [f"rank_{r}" for r in range(4 * index, 4 * index + 4)]
    for strategy in ("dp2mp4", "mp4pp2"):
        assert answer[strategy]["right"]
        told = ["elsewhere.json"] if strategy == "mp4pp2" else []
        assert answer[strategy]["names"] == [*told, *own, "strategy"]
    refused = answer["refused"]
    assert "Of 8 ranks" in refused["other layout"]
    assert "copy the other ranks' folders" in refused["other layout"]
    assert "shared=False" in refused["shared"]
    assert "need a disk that all of them share" in refused["complete"]
    assert "Orbax" in refused["orbax"]


def test_memory_does_not_grow_with_the_number_of_processes(tmp_path):
    """Each process holds its share and the budget, whether there are two or four."""
    source = tmp_path / "llama"
    checkpoints.write_llama(source, layers=2, hidden=1024, vocab=4096)
    grown = {}
    for count, devices in SHAPES:
        found = answers(
            run_processes("multiprocess_files:peak_memory", count, devices, str(source))
        )
        for answer in found:
            assert answer["grown"] < answer["share"] + (24 << 20)
        grown[count] = max(answer["grown"] for answer in found)
    assert grown[4] < grown[2]


def test_alone_nobody_is_waited_for():
    alone = Processes()
    assert alone.agree("x", lambda: "said") == "said"
    alone.meet("x")
    with pytest.raises(ZeroDivisionError), alone.together("x"):
        raise ZeroDivisionError
