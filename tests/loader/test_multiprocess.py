"""Several processes of JAX: what each reads, writes and holds, and what becomes of a dead one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import checkpoints
import multiprocess_files
import numpy as np
import pytest
import safetensors.numpy
from processes import answers, run_processes
from test_multiprocess_convert import assert_same

import jaxshard as js

HERE = Path(__file__).parents[1] / "support"
SIZES = {"layers": 4, "hidden": 64, "vocab": 128}
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiling takes longer than moving
SHAPES = [(2, 4), (4, 2)]  # processes × devices
SLACK = 16 << 20  # bytes: the budget for what is in flight, and what allocators keep


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    checkpoints.write_llama(folder, num_files=3, **SIZES)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Matrices whose columns, cut among eight devices, are runs of at least a page."""
    folder = tmp_path_factory.mktemp("source") / "wide"
    chance = np.random.default_rng(3)
    arrays = {n: chance.standard_normal((8, 8 << 10), np.float32) for n in ("a", "b", "c")}
    checkpoints.write_folder(folder, arrays)
    return folder


@pytest.fixture(scope="module", params=SHAPES, ids=["2x4", "4x2"])
def files(request, llama, wide, tmp_path_factory):
    """What each process answered, and where all of them saved."""
    out = tmp_path_factory.mktemp("out")
    work = partial(run_processes, "multiprocess_files:load_and_save", *request.param, environ=QUICK)
    return answers(work(str(llama), str(wide), str(out))), out


def total_bytes(folder):
    return js.open(folder).num_bytes


def test_every_process_gets_its_shards_and_reads_no_other_byte(files):
    for answer in files[0]:
        for strategy, found in answer["load"].items():
            assert found["right"], strategy
            assert found["needed"] == found["share"], strategy
        for spec in ("rows", "columns", "whole"):
            found = answer["wide"][spec]
            assert found["right"], spec
            assert found["read"] == found["share"], spec


def test_a_balanced_load_reads_every_byte_once(files, llama, wide):
    for folder, cases in (
        (llama, ("dp2mp4", "dp8", "dp2mp2pp2")),
        (wide, ("rows balanced", "columns balanced", "whole balanced")),
    ):
        total = total_bytes(folder)
        for case in cases:
            answered = [answer["balanced"] | answer["wide"] for answer in files[0]]
            found = [answer[case] for answer in answered]
            assert all(f["right"] for f in found), case
            read = [f["read" if folder is wide else "needed"] for f in found]
            assert sum(read) == total, case
            assert max(read) < 1.05 * total / len(found), case


def test_what_several_processes_save_is_what_one_process_saves(files, llama, tmp_path):
    """Bit for bit, file for file; the side files too."""
    answered, out = files
    for answer in answered:
        assert all(saved["right"] for saved in answer["save"].values())
    for strategy in ("dp2mp4", "mp4pp2", "dp4mp2optall"):
        alone = tmp_path / strategy
        js.save(js.load(llama, strategy), alone, fsync=False)
        assert_same(out / f"{strategy}-huggingface", alone)
        alone = tmp_path / f"{strategy}-ranks"
        js.save(js.load(llama, strategy), alone, format="ranks", fsync=False)
        assert_same(out / f"{strategy}-ranks", alone)
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_the_work_of_writing_is_shared(files, llama):
    total, answered = total_bytes(llama), files[0]
    for case in answered[0]["save"]:
        written = [answer["save"][case]["written"] for answer in answered]
        assert max(written) < 1.05 * sum(written) / len(written), case
        if case.endswith("huggingface"):
            assert sum(written) == total


# --- all kinds of trees and files --------------------------------------------------------


@pytest.fixture(scope="module")
def formed(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("forms")
    work = partial(run_processes, "multiprocess_files:forms", 2, 4, environ=QUICK)
    return answers(work(str(llama), str(out))), out


@pytest.mark.parametrize("form", multiprocess_files.FORMS)
def test_every_form_is_saved_as_by_one_process(formed, llama, tmp_path, form):
    how = multiprocess_files.FORMS[form] | {"fsync": False}
    js.save(js.load(llama, "dp2mp4"), tmp_path / "alone", extras=llama, **how)
    assert_same(formed[1] / form, tmp_path / "alone")


def test_what_one_process_holds_and_what_all_hold_is_saved_together(formed):
    """Arrays on some processes' devices, on all, on a device of each one's own, on the host."""
    for answer in formed[0]:
        assert answer["right"] == dict.fromkeys(answer["right"], True)
        assert {"mixed", "first alone", "last alone", "host", "gathered"} <= set(answer["right"])
    assert formed[0][1]["right"]["own"]


def test_in_a_job_of_jax_the_part_is_what_jax_says(formed):
    assert [answer["part"] for answer in formed[0]] == ["part 0 of 2", "part 1 of 2"]


def test_all_hear_at_once_of_what_is_wrong_in_one_process(formed):
    first, last = (answer["refused"] for answer in formed[0])
    assert "process 1: LayoutError: format='tar': no such format" in first["format"][1]
    assert last["format"][0] == "LayoutError"
    assert "process 1: OSError: [Errno 28] No space left" in first["own"][1]
    for refused in (first, last):
        assert "the arrays have other shardings than in process 0" in refused["unlike"][1]
        assert "none of their devices holds the rest" in refused["nobody"][1]
        assert "exists" in refused["exists"][1]
        assert "Call save in all processes" in refused["alone"][1]
        assert max(seconds for _, _, seconds in refused.values()) < 30  # of 60
    assert all(answer["after"] for answer in formed[0])
    left = [p for p in formed[1].rglob(".*") if p.name.endswith(".partial")]
    assert left == []


# --- resharding ------------------------------------------------------------------------


def test_a_grid_of_layouts_over_processes():
    """Every bit right, within the bound, nothing over the host."""
    pairs = 0
    for shape, first, step in (((2, 4), 0, 8), ((4, 2), 4, 50)):
        work = partial(run_processes, "multiprocess_reshard:grid", timeout_s=240, environ=QUICK)
        for answer in answers(work(*shape, first, step)):
            assert answer["wrong"] == []
            assert answer["over"] == []
            assert answer["kinds"]["compiled"] + answer["kinds"]["exchange"] >= answer["pairs"] / 2
            assert answer["host_bytes"] < 64  # scalars; JAX's views inside a process not counted
        pairs += answer["pairs"]
    assert pairs >= 60


def test_trees_dtypes_and_stages_move_between_processes():
    for answer in answers(run_processes("multiprocess_reshard:kinds", 4, 2, environ=QUICK)):
        assert answer["right"]
        assert "exchange" in answer["plan"]
        assert "narrower than a byte; between processes 0, 1, 2, 3" in answer["refused"]["int4"]
        assert "narrower than a byte; between processes 0, 1 they" in answer["refused"]["of two"]
        assert "arrays in device, pinned_host memory cannot be moved" in answer["refused"]["memory"]
        assert "inside one process" in answer["refused"]["views"]
        assert "from_processes=True" in answer["refused"]["host"]


# --- what goes wrong -------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(llama, tmp_path_factory):
    """For each way to die in a save over an older checkpoint: how processes ended, and where."""
    found = {}
    for who, phase, after in (
        (1, "wait", 0),
        (1, "write", 12),
        (0, "begin", 0),
        (0, "write", 5),
        (0, "publish", 0),
    ):
        out = tmp_path_factory.mktemp(f"killed-{who}-{phase}-{after}") / "ckpt"
        other = checkpoints.write_llama(out.parent / "other", num_files=3, seed=1, **SIZES)
        js.convert(out.parent / "other", out)
        work = partial(run_processes, "multiprocess_files:killed_while_saving", 2, 2)
        found[who, phase, after] = (work(str(llama), str(out), who, phase, after), out, other)
    return found


def test_a_process_killed_while_saving_leaves_the_old_checkpoint_good(killed):
    for (who, phase, _), (ended, out, other) in killed.items():
        assert ended[who].status == -signal.SIGKILL, (who, phase)
        kind, said, seconds = ended[0].answer or ["StorageError", "", 0]
        if who == 1:
            assert kind == "StorageError"
            assert "1 of 2 processes did not arrive within 2 s: 1" in said
            assert seconds < 20
        else:  # JAX's own coordinator has died with it, and JAX ends the others
            assert ended[1].status != 0 or ended[1].answer[0] == "StorageError"
        visible = [p.name for p in sorted(out.parent.iterdir()) if not p.name.startswith(".")]
        assert visible == ["ckpt", "other"]
        found = safetensors.numpy.load_file(out / "model.safetensors")
        assert all(found[n].tobytes() == other[n].tobytes() for n in other)


def test_the_rerun_of_a_killed_save_completes_and_clears_its_leavings_away(killed, llama):
    places = [out for _, out, _ in killed.values()]
    work = partial(run_processes, "multiprocess_files:rerun", 2, 2)
    for right in answers(work(str(llama), list(map(str, places)))):
        assert right == [True] * len(places)
    for out in places:
        assert [p.name for p in sorted(out.parent.iterdir())] == ["ckpt", "other"]


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
    work = partial(run_processes, "multiprocess_files:balanced_while_one_fails", 2, 2, str(source))
    (well, said, seconds), (broken, _, _) = answers(work("damaged"))
    assert (well, broken) == ("StorageError", "FormatError")
    assert "process 1: FormatError" in said
    assert seconds < 30  # of 60


def test_nobody_waits_in_a_collective_for_one_that_was_killed(llama):
    work = partial(run_processes, "multiprocess_files:balanced_while_one_fails", 2, 2, str(llama))
    survivor, dead = work("reading")
    assert dead.status == -signal.SIGKILL
    kind, said, seconds = survivor.answer
    assert kind == "StorageError"
    assert "1 of 2 processes did not arrive within 2 s: 1" in said
    assert seconds < 20
    rerun = run_processes("multiprocess_files:load_balanced", 2, 2, str(llama))
    assert answers(rerun) == [True, True]


def test_one_killed_inside_the_collectives_has_jax_end_the_others(llama):
    """Gloo tells of a closed connection; over others JAX's heartbeat does."""
    work = partial(run_processes, "multiprocess_files:balanced_while_one_fails", 2, 2, str(llama))
    begun = time.monotonic()
    survivor, dead = work("sending", heartbeat_s=10)
    assert dead.status == -signal.SIGKILL
    assert survivor.status != 0 or survivor.answer[0] != "done"
    assert time.monotonic() - begun < 60


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


def test_hosts_that_have_different_saves_hear_of_it(llama, tmp_path):
    work = partial(run_processes, "multiprocess_files:mixed_saves", 2, 4, str(llama), str(tmp_path))
    for answer in answers(work()):
        assert answer["again"]
        assert "Input/output error" in answer["cut short"][1]
        for how in ("plain", "balanced"):
            kind, said, _ = answer[how]
            assert kind == "CoverageError"
            assert "2 different saves: processes 0; processes 1" in said


def test_processes_that_see_different_checkpoints_all_refuse_them(llama, tmp_path):
    for name in ("other", "copied"):
        shutil.copytree(llama, tmp_path / name)
        for path in (tmp_path / name).iterdir():
            os.utime(path, (1, 1))  # copies are not of one age
    path = tmp_path / "other" / "model-00001-of-00003.safetensors"
    arrays = safetensors.numpy.load_file(path)
    one = max(arrays)
    safetensors.numpy.save_file(arrays | {one: arrays[one] * 2}, path)
    folders = [str(llama), *(str(tmp_path / n) for n in ("other", "copied", "nowhere"))]
    found = answers(run_processes("multiprocess_files:two_copies", 2, 4, folders))
    for index, answer in enumerate(found):
        for what, (kind, said, _) in answer["differ"].items():
            assert kind == "CoverageError", (what, said)
            assert "hold 2 different contents: processes 0; processes 1" in said
        assert {kind for kind, _, _ in answer["copied"].values()} == {"done"}
        for kind, said, _ in answer["nowhere"].values():
            assert kind == ("NotFoundError" if index else "StorageError")
            assert index or "1 of 2 processes failed: process 1: NotFoundError" in said


def _check_apart(index, answer):
    own = [f"rank_{r}" for r in range(4 * index, 4 * index + 4)]
    for strategy in ("dp2mp4", "mp4pp2"):
        assert answer[strategy]["right"]
        assert answer[strategy]["names"] == ["elsewhere.json", *own, "strategy"]
    refused = answer["refused"]
    assert "Of 8 ranks" in refused["other layout"]
    assert "copy the other ranks' folders" in refused["other layout"]
    assert "shared_filesystem=False" in refused["shared"]
    assert "all of them must share a disk" in refused["complete"]
    assert "orbax" in refused["orbax"]


def test_memory_does_not_grow_with_the_number_of_processes(tmp_path):
    """The share of each stays what it is, and so does what it takes, whether two or four."""
    grown = {}
    for count in (2, 4):
        source = tmp_path / f"of-{count}"
        shapes = {"fixed": (256, 8192), **{f"w{n}": (count * 256, 8192) for n in range(4)}}
        checkpoints.write_folder(source, {n: np.zeros(s, np.float32) for n, s in shapes.items()})
        out = tmp_path / f"saved-{count}"
        work = partial(run_processes, "multiprocess_files:peak_memory", count, 2, environ=QUICK)
        for answer in answers(work(str(source), str(out))):
            held = answer["held"]
            grown.setdefault(count, []).append(answer["grown"])
        shutil.rmtree(source)
        shutil.rmtree(out)
    most = {c: {k: max(g[k] for g in found) for k in found[0]} for c, found in grown.items()}
    for verb, limit in {
        "load": held["load"] + SLACK,
        "save": SLACK,
        "reshard": 2 * held["load"] + SLACK,  # what it becomes, and what is under way
        "balanced": 2.25 * held["balanced"] + SLACK,
    }.items():
        assert most[2][verb] < limit, (verb, most)
        assert most[4][verb] < limit, (verb, most)
        assert most[4][verb] < most[2][verb] + SLACK / 2, (verb, most)
