"""Filesystem primitives: what lies at a name is never replaced unasked, nor seen half written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jaxshard.storage import fs
from jaxshard.storage.fs import delete, publish_new, write_file_atomic, write_user_file


def make(path: Path, kind: str) -> Path:
    if kind == "file":
        path.write_text("made")
    elif kind == "link":
        path.symlink_to(path.parent / "nowhere")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "x").write_text("made")
    return path


def listing(folder: Path) -> list[tuple[str, str, str]]:
    return sorted(
        (
            p.relative_to(folder).as_posix(),
            "link" if p.is_symlink() else "folder" if p.is_dir() else "file",
            p.read_text() if p.is_file() else "",
        )
        for p in folder.rglob("*")
    )


@pytest.fixture(params=["renameat2", "links", "neither"])
def offers(request, monkeypatch):
    """What the file system offers: the fall-backs refuse to replace, too."""

    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    if request.param != "renameat2":
        monkeypatch.setattr(fs, "rename_new", lambda a, b: False)
    if request.param == "neither":
        monkeypatch.setattr(os, "link", no_links)
    return request.param


@pytest.mark.parametrize("there", ["file", "folder", "link"])
@pytest.mark.parametrize("made", ["file", "folder"])
def test_what_lies_at_a_name_is_kept(tmp_path, offers, made, there):
    new, place = make(tmp_path / "new", made), make(tmp_path / "place", there)
    before = listing(tmp_path)
    with pytest.raises(FileExistsError):
        publish_new(new, place)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("made", ["file", "folder"])
def test_a_free_name_is_given(tmp_path, offers, made):
    publish_new(make(tmp_path / "new", made), tmp_path / "place")
    assert [p.name for p in tmp_path.iterdir()] == ["place"]
    (tmp_path / "place").is_file() or (tmp_path / "place" / "x").read_text()


def test_an_empty_folder_gives_its_place_to_a_folder_but_not_to_a_file(tmp_path, offers):
    make(tmp_path / "place", "empty folder")
    with pytest.raises(FileExistsError):
        publish_new(make(tmp_path / "file", "file"), tmp_path / "place")
    publish_new(make(tmp_path / "new", "folder"), tmp_path / "place")
    assert (tmp_path / "place" / "x").exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_other_refusals_of_the_disk_are_passed_on(tmp_path, offers, monkeypatch, code):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    for module, name in ((os, "rename"), (os, "link"), (fs, "rename_new")):
        monkeypatch.setattr(module, name, refuse)
    for kind in ("file", "folder"):
        with pytest.raises(OSError, match=os.strerror(code)):
            publish_new(make(tmp_path / kind, kind), tmp_path / "place")


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole_and_no_link_is_written_through(tmp_path, durable):
    (tmp_path / "home").write_text("thesis")
    (tmp_path / ".a.new").symlink_to(tmp_path / "home")
    for data in (b"1", b"22"):
        write_file_atomic(tmp_path / "a", data, durable=durable)
        assert (tmp_path / "a").read_bytes() == data
    assert (tmp_path / "home").read_text() == "thesis"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "home"]


def test_deleting_a_link_keeps_what_it_leads_to(tmp_path):
    home = make(tmp_path / "home", "folder")
    (tmp_path / "link").symlink_to(home)
    for name in ("link", "absent"):
        delete(tmp_path / name)
    assert listing(tmp_path) == [("home", "folder", ""), ("home/x", "file", "made")]
    delete(home)
    assert not listing(tmp_path)


def test_a_users_file_is_replaced_only_with_overwrite(tmp_path):
    write_user_file(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        write_user_file(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    write_user_file(tmp_path / "a", b"3", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"3"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_user_file(tmp_path / "folder", b"4", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]
