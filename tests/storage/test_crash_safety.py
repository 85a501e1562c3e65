"""Crashes: killed at any moment, or with the disk full, nothing half-made looks whole."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
import safetensors

import jaxshard as js
from jaxshard.conversion.execute import execute
from jaxshard.conversion.open import open_checkpoint
from jaxshard.conversion.prepare import prepare
from jaxshard.errors import FormatError, JaxshardError, LayoutError, NotFoundError, StorageError
from jaxshard.storage import local, staging, transaction, writers

INSIDE = 15  # kills that fall into a conversion, of each of the two kinds: thirty in all
MOST_ROUNDS = 40
SIZES = {"layers": 4, "hidden": 384, "vocab": 2048}  # about 17 MB: a conversion takes a while

#: Gets ready, says so, and converts when told.
DRIVER = """
import sys
import jaxshard as js
from jaxshard.conversion.prepare import prepare
from jaxshard.conversion.execute import execute
source, destination, to, overwrite = sys.argv[1:]
size = 2 << 20 if to == "full" else None
prepared = prepare(source, to, max_shard_size=size, workers=2, host_bytes=1 << 20)
print("ready", flush=True)
sys.stdin.readline()
execute(prepared, destination, overwrite=bool(overwrite))
print("done", flush=True)
"""


def how(to: str) -> dict[str, int]:
    """Several files, whatever the target."""
    return {"max_shard_size": 2 << 20} if to == "full" else {}


def driver(source: Path, destination: Path, to: str, overwrite: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, source, destination, to, "yes" if overwrite else ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def staged(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.partial")


def finished(destination: Path) -> dict[str, tuple[int, int]]:
    """The files an interrupted run says it finished: which they are, and when written."""
    journal = staged(destination) / "finished"
    if not journal.exists():
        return {}
    names = [json.loads(line)[0] for line in journal.read_text().splitlines() if line.endswith("]")]
    return {n: written(staged(destination) / "files" / n) for n in names}


def written(path: Path) -> tuple[int, int]:
    """Which file ``path`` is, and when it was written last."""
    info = path.stat()
    return info.st_ino, info.st_mtime_ns


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    checkpoints.write_llama(folder, num_files=2, **SIZES)
    return folder


@pytest.fixture(scope="module", params=["dp2mp4", "full"])
def journey(request, source, tmp_path_factory):
    """(target, the result undisturbed, an older result, how long a run takes)."""
    base = tmp_path_factory.mktemp("journey")
    js.convert(source, base / "right", request.param, **how(request.param))
    other = base / "other"
    checkpoints.write_llama(other, num_files=2, seed=1, **SIZES)
    js.convert(other, base / "old", request.param, **how(request.param))
    times = []
    for i in range(2):
        process = driver(source, base / f"timed{i}", request.param, False)
        began = time.monotonic()
        tell(process)
        process.communicate()
        times.append(time.monotonic() - began)
    return request.param, base / "right", base / "old", min(times)


def test_killed_at_any_moment_nothing_half_made_looks_whole(source, journey, tmp_path):
    to, right, old, seconds = journey
    expected, before = checkpoints.files_of(right), checkpoints.files_of(source)
    older = checkpoints.files_of(old)
    rng, inside, rounds = random.Random(to), 0, 0
    while inside < INSIDE:
        assert rounds < MOST_ROUNDS, f"only {inside} kills fell into the conversion"
        destination, replaces = tmp_path / f"out{rounds}", rounds % 2 == 1
        rounds += 1
        if replaces:
            shutil.copytree(old, destination)
        process = driver(source, destination, to, replaces)
        tell(process)
        time.sleep(seconds * rng.random())
        process.kill()
        process.communicate()

        inside += staged(destination).exists()
        assert checkpoints.files_of(source) == before
        found = checkpoints.files_of(destination) if destination.exists() else None
        assert found in ([older, expected] if replaces else [None, expected])
        if not staged(destination).exists():  # the machine is quicker, or slower, than it was
            seconds *= 0.8 if found == expected else 1.25
        done = finished(destination) if found != expected else {}
        assert_no_reader_is_fooled(destination, right, found == expected)
        if found != expected:  # otherwise the old result may be there, exchanged with the new one
            spoil_what_is_not_finished(destination, done)
        if found != expected or (staged(destination) / "placing").exists():
            options = {"workers": 2, "resume": True, "overwrite": replaces, "fsync": False}
            report = js.convert(source, destination, to, **options, **how(to))
            assert report.skipped_files >= len(done)
            assert not staged(destination).exists()
        assert checkpoints.files_of(destination) == expected
        for name, was in done.items():
            assert written(destination / name) == was, f"{name} was made again"
        shutil.rmtree(destination)


def assert_no_reader_is_fooled(destination: Path, right: Path, published: bool) -> None:
    """No reader takes what lies in the staging folder for a checkpoint."""
    base = staged(destination)
    if not base.exists():
        return
    for place in (base, base / "files", base / "files" / "rank_0"):
        if place.exists():
            with pytest.raises((FormatError, NotFoundError)):
                open_checkpoint(place)
    assert not list(base.glob("*.safetensors"))
    for path in (base / "files").rglob("*.safetensors"):
        with pytest.raises(FormatError):
            open_checkpoint(path)
        try:
            safetensors.safe_open(path, "np").keys()
        except safetensors.SafetensorError:
            continue
        if not published:  # else it is of the old result, on its way out
            assert path.read_bytes() == (right / path.relative_to(base / "files")).read_bytes()


def spoil_what_is_not_finished(destination: Path, done: dict[str, tuple[int, int]]) -> None:
    for path in (staged(destination) / "files").rglob("*"):
        name = path.relative_to(staged(destination) / "files").as_posix()
        if path.is_file() and name not in done:
            path.write_bytes(os.urandom(path.stat().st_size))


# --- the disk is full --------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "llama"
    checkpoints.write_llama(folder, layers=2, hidden=32)
    js.slice(folder, tmp_path / "right", "mp4")
    return folder


def no_checkpoint_at(destination: Path) -> bool:
    for place in (destination, staged(destination), staged(destination) / "files"):
        try:
            open_checkpoint(place)
        except JaxshardError:
            continue
        return False
    return True


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.99])
def test_a_full_disk_leaves_what_can_be_resumed(small, tmp_path, monkeypatch, share):
    before, expected = checkpoints.files_of(small), checkpoints.files_of(tmp_path / "right")
    room = [int(share * sum(f.stat().st_size for f in (tmp_path / "right").rglob("*.safet*")))]
    real, real_vector = os.pwrite, os.pwritev

    def take(num_bytes):
        room[0] -= num_bytes
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pwrite(descriptor, data, offset):
        take(len(data))
        return real(descriptor, data, offset)

    def pwritev(descriptor, views, offset):
        take(sum(map(len, views)))
        return real_vector(descriptor, views, offset)

    destination = tmp_path / "out"
    monkeypatch.setattr(local.os, "pwrite", pwrite)
    monkeypatch.setattr(local.os, "pwritev", pwritev)
    with pytest.raises(StorageError, match=r"No space left.*--resume"):
        js.slice(small, destination, "mp4", workers=2)
    monkeypatch.undo()
    assert not destination.exists()
    assert no_checkpoint_at(destination)
    assert checkpoints.files_of(small) == before
    done = finished(destination)
    assert staged(destination).exists() == bool(done)
    report = js.slice(small, destination, "mp4", resume=True)
    assert (report.skipped_files, report.num_files) == (len(done), 4 - len(done))
    assert all(written(destination / name) == was for name, was in done.items())
    assert checkpoints.files_of(destination) == expected


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (transaction.os, "mkdir"),
        (writers, "reserve"),
        (writers, "crc_trailer"),
        (transaction.os, "fsync"),
        (staging, "open"),
        (writers.shutil, "copyfile"),
        (Path, "write_bytes"),
        (transaction, "publish_new"),
    ],
    ids=[
        "when begun",
        "when room is reserved",
        "when sealed",
        "when synced",
        "when noted",
        "when files are carried along",
        "when the strategy is written",
        "when published",
    ],
)
def test_a_disk_that_refuses_at_other_moments_is_told_of_too(
    small, tmp_path, monkeypatch, module, call
):
    destination = tmp_path / "out"
    js.slice(small, tmp_path / "undisturbed", "mp4", format="ckpt", crc=True)
    prepared = prepare(small, "mp4", format="ckpt", crc=True)
    monkeypatch.setattr(module, call, refuse, raising=False)
    with pytest.raises(StorageError, match=r"No space left.*--resume"):
        execute(prepared, destination)
    monkeypatch.undo()
    assert no_checkpoint_at(destination)
    execute(prepared, destination, resume=True)
    assert checkpoints.files_of(destination) == checkpoints.files_of(tmp_path / "undisturbed")


SMALL_FILES = """
import resource, sys
from jaxshard.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


def test_files_may_not_grow_so_large(small, tmp_path):
    destination = tmp_path / "out"
    command = [sys.executable, "-c", SMALL_FILES, "slice", small, destination, "--to", "mp2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert not destination.exists()
    assert not staged(destination).exists()


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=128k", "none", place], capture_output=True, check=False
    )
    if not done or done.returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small_is_refused_up_front(small, tiny_disk):
    checkpoints.write_llama(small, layers=4, hidden=64)
    with pytest.raises(StorageError, match=r"bytes free, and the result needs \d+"):
        js.slice(small, tiny_disk / "out", "mp4")
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_itself_is_no_destination(small, tiny_disk):
    for options in ({}, {"overwrite": True}):
        with pytest.raises(LayoutError, match=f"{tiny_disk} is a mount point.*{tiny_disk}/result"):
            js.slice(small, tiny_disk, "mp4", **options)
    assert list(tiny_disk.iterdir()) == []
    assert not staged(tiny_disk).exists()


def test_a_disk_that_fills_up_meanwhile(small, tiny_disk, tmp_path, monkeypatch):
    checkpoints.write_llama(small, layers=3, hidden=32)
    js.slice(small, tmp_path / "right3", "mp4")
    monkeypatch.setattr(
        "jaxshard.conversion.execute.check_free_space", lambda place, num_bytes: None
    )
    hog = tiny_disk / "hog"
    hog.write_bytes(bytes(60_000))
    with pytest.raises(StorageError, match="No space left"):
        js.slice(small, tiny_disk / "out", "mp4")
    assert not (tiny_disk / "out").exists()
    hog.unlink()
    js.slice(small, tiny_disk / "out", "mp4", resume=True)
    right = checkpoints.files_of(tmp_path / "right3")
    assert checkpoints.files_of(tiny_disk / "out") == right


# --- interrupted, and two at once ----------------------------------------------------------

SLOW = """
import sys, time
from jaxshard.cli import main
from jaxshard.storage.writers import OutputFiles
real = OutputFiles._finish
def finish(*a):
    time.sleep(0.1)
    real(*a)
OutputFiles._finish = finish
sys.exit(main(sys.argv[1:]))
"""


def slow(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_what_is_finished(source, tmp_path, workers):
    destination = tmp_path / "out"
    process = slow("slice", source, destination, "--to", "dp2pp4", "--workers", workers)
    wait_for(staged(destination) / "finished", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert (out, err.count("\n")) == ("", 1)
    assert "--resume" in err
    done = finished(destination)
    assert 0 < len(done) < 8
    report = js.slice(source, destination, "dp2pp4", resume=True)
    assert report.skipped_files == len(done)
    js.slice(source, tmp_path / "undisturbed", "dp2pp4")
    assert checkpoints.files_of(destination) == checkpoints.files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("flag", [[], ["--resume"], ["--overwrite"]])
def test_a_second_run_at_once_is_refused(small, tmp_path, capsys, flag):
    destination = tmp_path / "out"
    first = slow("slice", small, destination, "--to", "mp4", "--workers", 1)
    wait_for(staged(destination) / "journal.json", first)
    assert checkpoints.run("slice", small, destination, "--to", "mp4", *flag) == 4
    assert "another process is writing" in capsys.readouterr().err
    _, err = first.communicate()
    assert first.returncode == 0, err
    assert checkpoints.files_of(destination) == checkpoints.files_of(tmp_path / "right")
