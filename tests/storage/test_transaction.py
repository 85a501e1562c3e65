"""Transaction: the old result, or the new one, and never anything between."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from jaxshard.errors import LayoutError, StorageError
from jaxshard.storage import (
    fs,
    staging,
    transaction,
)
from jaxshard.storage.staging import is_unfinished
from jaxshard.storage.transaction import Transaction

OLD = "model.safetensors"  # what an old result is known by


@pytest.fixture
def place(tmp_path):
    return tmp_path / "out"


def partial(place):
    return place.with_name(f".{place.name}.partial")


def put(made: Transaction, name: str, data: bytes) -> None:
    (made.files / name).parent.mkdir(parents=True, exist_ok=True)
    (made.files / name).write_bytes(data)
    made.finish(name, len(data))


def content(place) -> dict[str, bytes]:
    return {
        p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("durable", [True, False])
def test_a_result_appears_whole_and_leaves_nothing_behind(place, durable):
    made = Transaction(place, "request", durable=durable)
    put(made, "rank_0/a", b"1")
    assert not place.exists()
    made.publish()
    assert content(place) == {"rank_0/a": b"1"}
    assert list(place.parent.iterdir()) == [place]


def test_an_empty_destination_is_as_good_as_none(place):
    place.mkdir()
    made = Transaction(place, "request")
    put(made, "a", b"1")
    made.publish()
    assert content(place) == {"a": b"1"}


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_an_old_result_is_replaced_when_the_new_one_is_whole(place, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(transaction, "exchange", lambda a, b: False)
    place.mkdir()
    (place / OLD).write_bytes(b"0")
    with pytest.raises(LayoutError, match=r"exists.*--overwrite"):
        Transaction(place, "request")
    made = Transaction(place, "request", overwrite=True)
    put(made, "new", b"1")
    assert content(place) == {OLD: b"0"}
    made.publish()
    assert content(place) == {"new": b"1"}
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_crash_between_two_renames_loses_neither(place, monkeypatch, overwrite):
    monkeypatch.setattr(transaction, "exchange", lambda a, b: False)
    place.mkdir()
    (place / OLD).write_bytes(b"0")
    made = Transaction(place, "request", overwrite=True)
    put(made, "new", b"1")
    real = transaction.publish_new

    def crash(a, b):
        if not b.exists():  # the old result is out of its place, and there it stays
            raise OSError(errno.EIO, "crash")
        real(a, b)

    monkeypatch.setattr(transaction, "publish_new", crash)
    with pytest.raises(StorageError):
        made.publish()
    monkeypatch.undo()
    made.abandon()
    assert not place.exists()
    again = Transaction(place, "another", overwrite=True) if overwrite else None
    if again:
        assert content(place) == {OLD: b"0"}
        again.abandon()
        assert content(place) == {OLD: b"0"}
    else:
        again = Transaction(place, "request", resume=True, overwrite=True)
        assert set(again.finished) == {"new"}
        again.publish()
        assert content(place) == {"new": b"1"}


def test_without_anything_finished_nothing_is_kept(place):
    Transaction(place, "request").abandon()
    assert list(place.parent.iterdir()) == []


def interrupted(place, durable=True) -> None:
    made = Transaction(place, "request", durable=durable)
    put(made, "a", b"whole")
    (made.files / "b").write_bytes(b"half")
    made.abandon()


def test_what_is_finished_is_kept_and_what_is_not_goes(place):
    interrupted(place)
    with pytest.raises(LayoutError, match=r"\(--resume\), or discard it with overwrite=True"):
        Transaction(place, "request")
    made = Transaction(place, "request", resume=True)
    assert made.finished == {"a": 5}
    assert content(made.files) == {"a": b"whole"}
    made.abandon()


def test_discarding_begins_anew(place):
    interrupted(place)
    made = Transaction(place, "request", overwrite=True)
    assert made.finished == {}
    assert content(made.files) == {}
    made.abandon()


def test_resuming_nothing_begins(place):
    made = Transaction(place, "request", resume=True)
    put(made, "a", b"1")
    made.publish()
    assert content(place) == {"a": b"1"}


def test_another_request_is_not_resumed(place):
    interrupted(place)
    with pytest.raises(LayoutError, match="from another conversion, or its source has changed"):
        Transaction(place, "other", resume=True)
    assert Transaction(place, "other", resume=True, overwrite=True).finished == {}


@pytest.mark.parametrize("change", ["content", "copy", "gone", "shorter"])
def test_a_finished_file_that_was_touched_is_not_trusted(place, change):
    interrupted(place)
    path = partial(place) / "files" / "a"
    if change == "content":
        path.write_bytes(b"wrong")
    elif change == "copy":  # same size and time, but another file
        shutil.copy2(path, path.with_name("copy"))
        path.with_name("copy").rename(path)
    elif change == "gone":
        path.unlink()
    else:
        os.truncate(path, 2)
    made = Transaction(place, "request", resume=True)
    assert made.finished == {}
    made.abandon()


@pytest.mark.parametrize(
    "line",
    ["", "garbage", '["b", 4]', "[", "null", '["../../x", 1, [1, 2, 3, ""]]'],
)
def test_a_torn_line_is_no_promise(place, line):
    interrupted(place)
    with open(partial(place) / "finished", "a", encoding="utf-8") as journal:
        journal.write(line)
    made = Transaction(place, "request", resume=True)
    assert made.finished == {"a": 5}
    made.abandon()


def test_what_was_never_put_on_the_disk_is_not_trusted_after_a_restart(place, monkeypatch):
    interrupted(place, durable=False)
    made = Transaction(place, "request", resume=True)
    assert made.finished == {"a": 5}
    made.abandon()
    monkeypatch.setattr(staging, "_boot", lambda: "another")
    made = Transaction(place, "request", resume=True)
    assert made.finished == {}
    made.abandon()


@pytest.mark.parametrize("only", [None, "a"])
def test_resuming_what_is_complete_finds_nothing_left_to_do(place, only):
    made = Transaction(place, "request", only=only)
    put(made, "a", b"\n1")
    made.publish()
    if not hasattr(os, "getxattr") or not os.listxattr(place):
        pytest.skip("this file system has no extended attributes")
    assert Transaction(place, "request", resume=True, only=only).published
    assert list(place.parent.iterdir()) == [place]
    for request, how in (("request", {}), ("other", {"resume": True})):
        with pytest.raises(LayoutError, match="exists"):
            Transaction(place, request, only=only, **how)
    (place if only else place / "a").write_bytes(b"\n2")
    with pytest.raises(LayoutError, match="exists"):
        Transaction(place, "request", resume=True, only=only)
    assert list(place.parent.iterdir()) == [place]


def test_a_complete_result_does_not_cost_the_work_on_another(place):
    """Made by one request, and being replaced by another when that run was interrupted."""
    for request, name, done in (("one", OLD, True), ("two", "b", False)):
        made = Transaction(place, request, overwrite=True)
        put(made, name, b"1")
        made.publish() if done else made.abandon()
    for how in ({}, {"resume": True}):
        with pytest.raises(LayoutError):
            Transaction(place, "one", **how)
    again = Transaction(place, "two", resume=True, overwrite=True)
    assert set(again.finished) == {"b"}
    again.publish()
    assert content(place) == {"b": b"1"}


@pytest.mark.parametrize("old", [True, False])
def test_a_crash_after_publishing_is_seen_and_tidied(place, monkeypatch, old):
    """Else the old result, which lies in the staging folder then, would be taken for finished."""
    if old:
        place.mkdir()
        (place / OLD).touch()
        (place / "a").write_bytes(b"old!!")
    made = Transaction(place, "request", overwrite=True)
    put(made, "a", b"whole")
    monkeypatch.setattr(made, "_remove", made._release)
    made.publish()
    assert partial(place).exists()
    again = Transaction(place, "request", resume=True, overwrite=old)
    assert again.published
    assert content(place) == {"a": b"whole"}
    assert not partial(place).exists()


def test_after_publishing_another_request_does_not_take_the_old_for_its_own(place, monkeypatch):
    place.mkdir()
    (place / OLD).write_bytes(b"old!!")
    made = Transaction(place, "request", overwrite=True)
    put(made, OLD, b"whole")
    monkeypatch.setattr(made, "_remove", made._release)
    made.publish()
    again = Transaction(place, "other", resume=True, overwrite=True)
    assert not again.published
    assert again.finished == {}
    again.abandon()


def test_two_at_once_are_refused_in_one_process_too(place):
    first = Transaction(place, "request")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(StorageError, match="another process is writing"):
            Transaction(place, "request", **how)
    first.abandon()
    Transaction(place, "request").abandon()


def test_a_link_is_followed_to_where_the_result_shall_be(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "result")
    made = Transaction(tmp_path / "out", "request")
    put(made, "a", b"1")
    assert partial(disk / "result").exists()
    made.publish()
    assert content(disk / "result") == {"a": b"1"}
    assert (tmp_path / "out").is_symlink()


def test_an_unfinished_result_is_known_by_all_its_folders(place, monkeypatch):
    interrupted(place)
    for path in (partial(place), partial(place) / "files", partial(place) / "files" / "a"):
        assert is_unfinished(path)
    monkeypatch.chdir(partial(place) / "files")
    assert is_unfinished(transaction.Path("."))
    assert not is_unfinished(place)
    assert not is_unfinished(place.parent)


def test_the_journal_is_one_line_a_file(place):
    interrupted(place)
    (line,) = (partial(place) / "finished").read_text().splitlines()
    assert json.loads(line)[:2] == ["a", 5]


# --- one file ------------------------------------------------------------------------


def test_one_file_appears_at_once_and_replaces_a_file(tmp_path):
    place = tmp_path / "out.safetensors"
    for data in (b"\n1", b"\n2"):  # the first byte of MindSpore's weights
        made = Transaction(place, "request", only="m", overwrite=place.exists())
        put(made, "m", data)
        made.publish()
        assert place.read_bytes() == data
        assert list(tmp_path.iterdir()) == [place]
    with pytest.raises(LayoutError, match=r"exists.*--overwrite"):
        Transaction(place, "request", only="m")


def test_one_file_is_not_put_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(LayoutError, match="it is not a file"):
        Transaction(tmp_path / "out", "request", only="m", overwrite=True)


@pytest.mark.parametrize("old", [True, False])
def test_a_crash_after_one_file_is_published_is_seen_and_tidied(tmp_path, monkeypatch, old):
    place = tmp_path / "out.safetensors"
    if old:
        place.write_bytes(b"\nold")
    made = Transaction(place, "request", only="m", overwrite=True)
    put(made, "m", b"whole")
    monkeypatch.setattr(made, "_remove", made._release)
    made.publish()
    assert partial(place).exists()
    again = Transaction(place, "request", only="m", resume=True, overwrite=old)
    assert again.published
    assert place.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("old", [True, False])
def test_a_file_published_by_a_link_and_not_yet_unlinked_is_published(tmp_path, monkeypatch, old):
    """The fall-back without ``renameat2``, killed between its two calls."""
    place = tmp_path / "out.safetensors"
    if old:
        place.write_bytes(b"\nold")
    made = Transaction(place, "request", only="m", overwrite=True)
    put(made, "m", b"whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fs, "rename_new", lambda a, b: False)
        patched.setattr(transaction, "exchange", lambda a, b: False)
        patched.setattr(transaction, "_swap_in_two_steps", partial_swap)
        patched.setattr(fs.os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            made.publish()
    made._release()
    assert Transaction(place, "request", only="m", resume=True, overwrite=True).published
    assert place.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [place]


def partial_swap(base: Path, new: Path, place: Path, kind: str) -> None:
    """The two steps, without the way back that a killed process does not take."""
    (base / "replaced").mkdir()
    os.rename(place, base / "replaced" / new.name)
    transaction.publish_new(new, place)


# --- places that cannot be replaced --------------------------------------------------


def test_a_mount_point_is_refused_before_the_work(place, monkeypatch):
    """Empty or not: no folder can be renamed to where another file system begins."""
    place.mkdir()
    monkeypatch.setattr(transaction, "is_mount_point", lambda path: path == place)
    for overwrite in (False, True):
        with pytest.raises(LayoutError, match=f"mount point.* Use {place}/result"):
            Transaction(place, "request", overwrite=overwrite)
    assert list(place.parent.iterdir()) == [place]


def test_mount_points_are_known_by_the_systems_list_too(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(
        rb"22 1 8:1 / / rw - ext4 /dev/sda1 rw"
        b"\n"
        rb"23 22 8:1 /x /my\040data\134 rw - ext4 /dev/sda1 rw"
        b"\n\n"
    )
    monkeypatch.setattr(fs, "_MOUNTS", mounts)
    assert fs.is_mount_point(Path("/"))
    assert fs.is_mount_point(Path("/my data\\"))
    assert not fs.is_mount_point(Path("/my data"))
    monkeypatch.setattr(fs, "_MOUNTS", tmp_path / "absent")
    assert fs.is_mount_point(Path("/"))
    assert not fs.is_mount_point(tmp_path)


@pytest.mark.parametrize("refused", ["EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_file_systems_that_cannot_exchange_are_told_by_any_of_their_errors(
    place, monkeypatch, refused
):
    def renameat2(*_: object) -> int:
        ctypes.set_errno(getattr(errno, refused))
        return -1

    place.mkdir()
    (place / OLD).write_bytes(b"0")
    monkeypatch.setattr(fs, "_function", lambda name: renameat2)
    made = Transaction(place, "request", overwrite=True)
    put(made, "new", b"1")
    made.publish()
    assert content(place) == {"new": b"1"}
    assert list(place.parent.iterdir()) == [place]
