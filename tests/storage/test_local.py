"""Local files: listed, read and written by range, with a bounded number of them open."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest

from jaxshard.errors import FormatError, NotFoundError, StorageError
from jaxshard.storage.local import Handles, LocalFolder


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a/deep/c.txt", ".hidden", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def test_files_are_listed_by_relative_path_and_hidden_ones_are_not(folder):
    files = LocalFolder(folder).files()
    assert list(files) == ["a/deep/c.txt", "b.txt"]
    assert files["b.txt"].num_bytes == 5
    assert files["b.txt"].mtime_ns == (folder / "b.txt").stat().st_mtime_ns


def test_one_file_is_a_folder_of_itself(folder):
    alone = LocalFolder(folder / "b.txt")
    assert (alone.root, list(alone.files())) == (str(folder), ["b.txt"])
    assert alone.read("b.txt", 2, 3) == b"txt"
    with pytest.raises(NotFoundError, match=r"has no file a/deep/c.txt"):
        alone.read("a/deep/c.txt", 0, 1)


def test_links_are_followed_and_loops_end(folder):
    (folder / "a" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone").symlink_to(folder / "absent")
    (folder / "link").symlink_to(folder / "b.txt")
    assert list(LocalFolder(folder).files()) == ["a/deep/c.txt", "b.txt", "link"]


def test_exactly_what_is_asked_for_is_read_or_nothing(folder):
    local = LocalFolder(folder)
    assert local.read("b.txt", 0, 5) == b"b.txt"
    assert local.read("b.txt", 5, 0) == b""
    with pytest.raises(FormatError, match="ends at byte 5, but bytes 3 to 6 are wanted"):
        local.read("b.txt", 3, 3)
    with pytest.raises(FormatError, match="ends at byte 5"):
        local.read("b.txt", 0, 1 << 50)  # and no petabyte is allocated


def test_a_file_cut_short_meanwhile_is_noticed(folder):
    local = LocalFolder(folder)
    assert local.files()["b.txt"].num_bytes == 5
    (folder / "b.txt").write_bytes(b"b.")
    with pytest.raises(FormatError, match="changed meanwhile"):
        local.read("b.txt", 0, 5)


def test_what_is_not_there_is_told(folder):
    with pytest.raises(NotFoundError, match="absent does not exist"):
        LocalFolder(folder / "absent")
    with pytest.raises(NotFoundError, match="does not exist"):
        LocalFolder(folder / "b.txt" / "below")
    with pytest.raises(StorageError, match="too long"):
        LocalFolder(folder / ("x" * 300))


def many(base: Path, number: int) -> list[str]:
    names = [f"f{i}" for i in range(number)]
    for name in names:
        (base / name).write_bytes(name.encode().ljust(8))
    return names


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_never_more_files_are_open_than_allowed(tmp_path):
    names, handles = many(tmp_path, 50), Handles(tmp_path, most=4)
    before = num_open()
    for name in names * 2:
        buffer = bytearray(8)
        handles.read_into(name, 0, memoryview(buffer))
        assert buffer == name.encode().ljust(8)
        assert num_open() <= before + 4
    handles.close()
    assert num_open() == before


def test_a_file_in_use_is_not_closed_under_its_user(tmp_path):
    names, handles = many(tmp_path, 9), Handles(tmp_path, most=1)
    with handles.use(names[0]) as descriptor:
        for name in names[1:]:
            handles.read_into(name, 0, memoryview(bytearray(8)))
        assert os.pread(descriptor, 8, 0) == names[0].encode().ljust(8)
    handles.close()


def test_when_the_process_has_no_more_descriptors_idle_ones_are_given_up(tmp_path):
    names, handles = many(tmp_path, 60), Handles(tmp_path, most=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open() + 10, hard))
        for name in names:
            handles.read_into(name, 0, memoryview(bytearray(8)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        handles.close()


def test_many_threads_read_the_right_bytes_through_few_handles(tmp_path):
    names, handles, wrong = many(tmp_path, 40), Handles(tmp_path, most=3), []

    def work(start: int) -> None:
        for i in range(400):
            name = names[(start + 7 * i) % len(names)]
            buffer = bytearray(8)
            handles.read_into(name, 0, memoryview(buffer))
            if buffer != name.encode().ljust(8):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handles.close()
    assert wrong == []


def test_views_are_filled_one_after_the_other_however_many(tmp_path):
    data = bytes(i % 251 for i in range(5000))
    (tmp_path / "f").write_bytes(data)
    handles = Handles(tmp_path, os.O_RDWR)
    views = [memoryview(bytearray(n)) for n in [1, 0, 2] * 1500]  # more than the kernel takes
    handles.read_views("f", 100, views)
    assert b"".join(views) == data[100 : 100 + 4500]
    handles.write_views("f", 7, [memoryview(data[:2]) for _ in range(2000)])
    assert (tmp_path / "f").read_bytes() == data[:7] + data[:2] * 2000 + data[4007:]
    with pytest.raises(FormatError, match="ends at byte 5000"):
        handles.read_views("f", 4999, [memoryview(bytearray(1)), memoryview(bytearray(1))])


def test_a_request_that_is_served_in_part_goes_on(tmp_path, monkeypatch):
    """The kernel may read or write less than asked; both ways are made to give a byte each."""
    (tmp_path / "f").write_bytes(bytes(range(100)))
    real_read, real_write = os.preadv, os.pwrite

    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real_read(fd, [views[0][:1]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:1], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: real_write(fd, views[0][:1], at))
    handles = Handles(tmp_path, os.O_RDWR)
    views = [memoryview(bytearray(n)) for n in (3, 0, 4)]
    handles.read_views("f", 10, views)
    assert b"".join(views) == bytes(range(10, 17))
    handles.write_views("f", 50, [memoryview(b"abc"), memoryview(b""), memoryview(b"de")])
    handles.write("f", 60, memoryview(b"xyz"))
    monkeypatch.undo()
    content = (tmp_path / "f").read_bytes()
    assert (content[50:55], content[60:63]) == (b"abcde", b"xyz")
    assert content[:50] == bytes(range(50))


def test_a_file_that_went_away_is_told(tmp_path):
    with pytest.raises(NotFoundError, match="any more"):
        Handles(tmp_path).read_into("gone", 0, memoryview(bytearray(1)))
