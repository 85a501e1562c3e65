"""A source that changes while it is read is refused, in every format and by every verb."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import readers_beside_writers

import jaxshard as js
from jaxshard.conversion.load_rank import load_rank
from jaxshard.core.catalog import File
from jaxshard.storage import fs
from jaxshard.storage.local import FolderVersions, LocalFolder, Versions, version_of

FORMATS: dict[str, tuple[str, dict[str, object]]] = {
    "huggingface": ("full", {}),
    "ranks": ("dp1mp2", {}),
    "ranks of .ckpt": ("dp1mp2", {"format": "ckpt"}),
    "ranks of .ckpt with checksums": ("dp1mp2", {"format": "ckpt", "crc": True}),
    "one .ckpt": ("full", {"format": "ckpt"}),
    "unified": ("full", {"format": "unified"}),
    "iteration": ("dp1mp2", {"format": "iteration"}),
    "orbax": ("full", {"format": "orbax"}),
}
VERBS: dict[str, Callable[[object, Path], object]] = {
    "convert": lambda source, out: js.convert(source, out / "made", fsync=False),
    "load_rank": lambda source, out: load_rank(source, "full"),
    "load": lambda source, out: js.load(source, "dp1mp1"),
    "load with mmap": lambda source, out: js.load(source, "dp1mp1", mmap=True),
    "verify against": lambda source, out: js.verify(source, against=out / "hf"),
}


@pytest.fixture
def source(tmp_path, request):
    """A checkpoint, and another of the same headers with other values."""
    to, options = FORMATS[request.param]
    for number, name in enumerate(("hf", "other")):
        checkpoints.write_llama(tmp_path / name, seed=number)
        js.convert(tmp_path / name, tmp_path / f"{name}_made", to, fsync=False, **options)
    return tmp_path / "hf_made", tmp_path / "other_made"


def weights(folder: Path) -> list[Path]:
    names = (p for p in folder.rglob("*") if p.is_file())
    return [p for p in names if p.suffix not in (".json", ".txt")]


def rewrite(place: Path, other: Path) -> None:
    for path in weights(other):
        target = place / path.relative_to(other)  # Orbax names its files at random
        with open(target, "r+b" if target.exists() else "wb") as file:
            file.write(path.read_bytes())


def rewrite_with_old_times(place: Path, other: Path) -> None:
    times = {p: os.stat(p) for p in weights(place)}
    rewrite(place, other)
    for path, info in times.items():
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def replace(place: Path, other: Path) -> None:
    times = {p: os.stat(p) for p in weights(place)}
    for path in weights(other):
        target = place / path.relative_to(other)
        shutil.copyfile(path, place / ".new")
        os.replace(place / ".new", target)
        if target in times:
            os.utime(target, ns=(times[target].st_atime_ns, times[target].st_mtime_ns))


def remove(place: Path, other: Path) -> None:
    for path in weights(place):
        path.unlink()


@pytest.mark.parametrize("source", FORMATS, indirect=True)
@pytest.mark.parametrize("change", [rewrite, rewrite_with_old_times, replace, remove])
def test_a_conversion_of_files_that_change_meanwhile_is_refused(source, change, tmp_path):
    place, other = source
    changed = []

    def progress(total: int) -> Callable[[int], None]:
        def advance(num_bytes: int) -> None:
            if not changed:
                changed.append(change(place, other))

        return advance

    with pytest.raises(js.JaxshardError, match=r"changed|not exist|Orbax cannot read"):
        js.convert(place, tmp_path / "out", progress=progress, workers=1, fsync=False)
    assert changed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", [f for f in FORMATS if f != "orbax"], indirect=True)
@pytest.mark.parametrize("verb", VERBS)
def test_a_catalog_of_files_that_changed_since_is_refused(source, verb, tmp_path):
    place, other = source
    catalog = js.open(place)
    rewrite_with_old_times(place, other)
    with pytest.raises(js.FormatError, match="changed while being read"):
        VERBS[verb](catalog, tmp_path)
    VERBS[verb](js.open(place), tmp_path)  # opened again, it is the other checkpoint


@pytest.mark.parametrize("source", ["huggingface", "ranks", "orbax"], indirect=True)
@pytest.mark.parametrize("verb", [v for v in VERBS if v != "convert"])
def test_a_change_during_the_reads_of_a_verb_is_refused(source, verb, tmp_path, monkeypatch):
    place, other = source
    catalog, real, changed = js.open(place), Versions.check, []

    def check(self: Versions) -> None:
        if not changed:
            changed.append(rewrite_with_old_times(place, other))
        real(self)

    monkeypatch.setattr(Versions, "check", check)
    folder = FolderVersions.check
    monkeypatch.setattr(
        FolderVersions,
        "check",
        lambda self: (changed or changed.append(rewrite(place, other)), folder(self)),
    )
    with pytest.raises(js.FormatError, match="changed while being read"):
        VERBS[verb](catalog, tmp_path)


def test_files_that_stay_are_the_same_version_however_often_they_are_opened(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    versions = Versions(tmp_path, [version_of("f", os.stat(tmp_path / "f"))])
    for _ in range(3):
        with open(tmp_path / "f", "rb") as file:
            versions.opened("f", file.fileno())
    versions.check()
    os.utime(tmp_path / "f")
    with pytest.raises(js.FormatError, match=r"f of .* changed while being read"):
        versions.check()


def test_another_inode_alone_is_no_change_on_file_systems_in_user_space(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x")
    now = version_of("f", os.stat(tmp_path / "f"))
    before = File(now.path, now.num_bytes, now.mtime_ns, now.ctime_ns, now.inode + 1)
    for mounted, same in ((b"fuse.gcsfuse", True), (b"ext4", False)):
        line = b"1 2 3:4 / / rw - " + mounted + b" none rw\n"
        monkeypatch.setattr(fs, "_MOUNTS", _Mounts(line))
        assert Versions(tmp_path)._is_same(before, now) is same


class _Mounts:
    def __init__(self, lines: bytes) -> None:
        self._lines = lines

    def read_bytes(self) -> bytes:
        return self._lines


def test_a_file_that_was_written_a_moment_ago_is_given_a_time_that_a_change_will_differ_from(
    tmp_path,
):
    for number in range(50):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(b"a")
        listed = LocalFolder(path).files()[path.name]
        path.write_bytes(b"b")
        assert version_of(path.name, os.stat(path)) != listed
    assert np.all([p.read_bytes() == b"b" for p in tmp_path.iterdir()])


@pytest.mark.parametrize(("fmt", "how"), [("ranks", "publish"), ("huggingface", "in place")])
def test_reads_beside_a_writer_see_one_version_or_an_error(fmt, how):
    ended = readers_beside_writers.run(fmt, how, reads=60, max_seconds=30)
    assert ended["MIXED"] == 0
    assert ended.total() >= 60
    assert ended["all 1"] + ended["all 2"] > 0
