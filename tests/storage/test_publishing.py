"""Publishing: what appears or changes at a destination meanwhile is kept, by every door."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from golden_files import golden

import jaxshard as js
from jaxshard.cli import main
from jaxshard.conversion.decrypt import decrypt
from jaxshard.errors import LayoutError, StorageError
from jaxshard.saver import save
from jaxshard.storage import (
    fs,
    transaction,
)

Door = Callable[[Path, bool], object]
MOST = 2  # parts


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    checkpoints.write_llama(folder)
    return folder


def converted(*to: str) -> Callable[[Path], Door]:
    def door(source: Path) -> Door:
        return lambda out, overwrite: js.convert(source, out, *to, fsync=False, overwrite=overwrite)

    return door


def in_parts(source: Path) -> Door:
    def door(out: Path, overwrite: bool) -> None:
        for index in range(MOST):
            options = {
                "fsync": False,
                "overwrite": overwrite,
                "process_index": index,
                "process_count": MOST,
            }
            # what was made of the same request is not made again, so another is made
            js.convert(source, out, "mp4" if overwrite else "mp2", **options)

    return door


def saved(format: str) -> Callable[[Path], Door]:
    def door(source: Path) -> Door:
        return lambda out, overwrite: save(
            {"x": np.ones(4, np.float32)}, out, format=format, overwrite=overwrite, fsync=False
        )

    return door


def decrypted(source: Path) -> Door:
    pytest.importorskip("cryptography")
    encrypted = golden("ckpt_formats", "enc_AES-GCM.ckpt")
    return lambda out, overwrite: decrypt(encrypted, out, b"0123456789ABCDEF", overwrite=overwrite)


def strategy(*command: str) -> Callable[[Path], Door]:
    def door(source: Path) -> Door:
        verb, *flags = command
        given = str(golden("dp2mp2pp2", "strategy") if verb == "merge" else source)

        def run(out: Path, overwrite: bool) -> None:
            flag = ["--overwrite"] if overwrite else []
            if status := main(["strategy", verb, given, str(out), *flags, *flag, "--quiet"]):
                raise LayoutError(f"exit status {status}")

        return run

    return door


#: By the name of the destination: how it is made.
DOORS: dict[str, tuple[str, Callable[[Path], Door]]] = {
    "convert": ("out", converted("mp2")),
    "convert to one file": ("out.safetensors", converted()),
    "convert to one ckpt": ("out.ckpt", converted()),
    "parts": ("out", in_parts),
    "save": ("out", saved("huggingface")),
    "save for Orbax": ("out", saved("orbax")),
    "decrypt": ("out.ckpt", decrypted),
    "strategy merge": ("out.ckpt", strategy("merge")),
    "strategy make": ("out", strategy("make", "--to", "mp2")),
    "strategy make --merged": ("out.json", strategy("make", "--to", "mp2", "--merged")),
}


@pytest.fixture(params=DOORS)
def door(request, llama, tmp_path):
    """(the destination, what makes it)."""
    name, make = DOORS[request.param]
    return tmp_path / name, make(llama)


def at_the_last_moment(monkeypatch, act: Callable[[], object]) -> None:
    """Have ``act`` done right before the rename, when all has been looked at."""
    acts = iter([act])

    def first(call):
        def called(a: Path, b: Path) -> object:
            next(acts, lambda: None)()
            return call(a, b)

        return called

    monkeypatch.setattr(fs, "rename_new", first(fs.rename_new))


def between(monkeypatch, act: Callable[[], object]) -> None:
    """Have ``act`` done between the look at the old result and the exchange."""
    acts = iter([act])

    def exchange(a: Path, b: Path) -> bool:
        next(acts, lambda: None)()
        return fs.exchange(a, b)

    monkeypatch.setattr(transaction, "exchange", exchange)


def put_file(place: Path) -> None:
    place.write_text("my work")


def put_folder(place: Path) -> None:
    place.mkdir()
    (place / "precious.txt").write_text("my work")


def put_link(place: Path) -> None:
    (place.parent / "home").mkdir()
    place.symlink_to(place.parent / "home")


@pytest.mark.parametrize("put", [put_file, put_folder, put_link])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_kept(door, monkeypatch, capsys, put, overwrite):
    """Also with ``overwrite``: it replaces what lay there when it was asked for."""
    place, make = door
    with monkeypatch.context() as patched:
        at_the_last_moment(patched, lambda: put(place))
        with pytest.raises(LayoutError):
            make(place, overwrite)
    mine = place.with_name("expected")
    shutil.rmtree(place.parent / "home", ignore_errors=True)
    put(mine)
    assert place.is_symlink() == mine.is_symlink()
    assert place.is_dir() == mine.is_dir()
    if not place.is_dir():
        assert place.read_bytes() == mine.read_bytes()
    else:
        assert checkpoints.files_of(place) == checkpoints.files_of(mine)
    capsys.readouterr()


@pytest.mark.parametrize("moment", [at_the_last_moment, between])
@pytest.mark.parametrize("how", ["beside", "below", "rewritten", "another"])
def test_what_is_written_to_the_old_result_meanwhile_is_kept(
    door, monkeypatch, capsys, moment, how
):
    place, make = door
    make(place, False)

    def act() -> None:
        if place.is_file():
            if how == "rewritten":
                place.write_text("my work")
            else:
                put_file(place.with_name("mine"))
                place.with_name("mine").rename(place)
        elif how == "beside":
            (place / "precious.txt").write_text("my work")
        elif how == "below":
            (place / "other").mkdir()
            (place / "other" / "optimizer.pt").write_text("my work")
        elif how == "rewritten":
            next(p for p in place.rglob("*") if p.is_file()).write_text("my work")
        else:
            place.rename(place.with_name("away"))
            put_folder(place)

    with monkeypatch.context() as patched:
        moment(patched, act)
        with pytest.raises(LayoutError):
            make(place, True)
    files = [p for p in ([place] if place.is_file() else place.rglob("*")) if p.is_file()]
    assert [p for p in files if p.read_bytes() == b"my work"]
    capsys.readouterr()


def test_where_nothing_can_be_exchanged_it_is_kept_too(door, monkeypatch, capsys):
    place, make = door
    make(place, False)

    def act() -> None:
        put_file(place if place.is_file() else place / "precious.txt")

    with monkeypatch.context() as patched:
        at_the_last_moment(patched, act)
        patched.setattr(transaction, "exchange", lambda a, b: False)
        with pytest.raises(LayoutError):
            make(place, True)
    assert (place if place.is_file() else place / "precious.txt").read_text() == "my work"
    capsys.readouterr()


@pytest.mark.parametrize("name", ["decrypt", "strategy merge", "strategy make --merged"])
def test_single_files_are_on_the_disk_before_they_have_their_names(
    llama, tmp_path, monkeypatch, name
):
    destination, door = DOORS[name]
    make, place, synced = door(llama), tmp_path / destination, dict[int, int]()
    real, order = os.fsync, list[str]()

    def fsync(descriptor: int) -> None:
        info = os.fstat(descriptor)
        synced[info.st_ino] = info.st_size
        order.append("folder" if stat.S_ISDIR(info.st_mode) else "file")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    at_the_last_moment(monkeypatch, lambda: order.append("rename"))
    make(place, False)
    assert synced[place.stat().st_ino] == place.stat().st_size
    assert tmp_path.stat().st_ino in synced
    assert "file" in order[: order.index("rename")]
    assert order[order.index("rename") :] == ["rename", "folder"]


@pytest.mark.parametrize("mine", [b"my work", b"{}", b"\x89PNG\r\n"])
@pytest.mark.parametrize("name", [n for n, (out, _) in DOORS.items() if out != "out"])
def test_a_file_of_another_kind_is_not_replaced(llama, tmp_path, capsys, name, mine):
    destination, door = DOORS[name]
    make, place = door(llama), tmp_path / destination
    place.write_bytes(mine)
    for overwrite in (False, True):
        with pytest.raises(LayoutError):
            make(place, overwrite)
    assert place.read_bytes() == mine
    assert [p.name for p in tmp_path.iterdir()] == [destination]
    capsys.readouterr()


def test_a_refused_result_is_published_once_its_place_is_free(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        at_the_last_moment(patched, lambda: put_folder(out))
        with pytest.raises(LayoutError, match="appeared while the result was being made"):
            js.convert(llama, out, "mp2")
    with pytest.raises(LayoutError, match="exists"):
        js.convert(llama, out, "mp2", resume=True)
    out.rename(tmp_path / "mine")
    report = js.convert(llama, out, "mp2", resume=True)
    assert report.skipped_files == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_what_was_written_meanwhile_may_be_replaced_by_the_next_run(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    js.convert(llama, out, "mp2")
    with monkeypatch.context() as patched:
        between(patched, lambda: (out / "notes.txt").write_text("mine"))
        with pytest.raises(LayoutError, match=r"written to while .*: notes\.txt\. Run again"):
            js.convert(llama, out, "mp4", overwrite=True)
    assert js.open(out).layout.num_ranks == 2
    assert (out / "notes.txt").exists()
    js.convert(llama, out, "mp4", overwrite=True, resume=True)
    assert js.open(out).layout.num_ranks == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_put_back_is_kept_and_named(llama, tmp_path, monkeypatch):
    """The name is taken again before the old result, with its new file, is back."""
    out, base = tmp_path / "out", tmp_path / ".out.partial"
    js.convert(llama, out, "mp2")

    def exchange(a: Path, b: Path) -> bool:
        if (a / "notes.txt").exists():
            return False
        (out / "notes.txt").write_text("mine")
        return fs.exchange(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(transaction, "exchange", exchange)
        with pytest.raises(StorageError, match=f"Move it back from {base}/files"):
            js.convert(llama, out, "mp4", overwrite=True)
    assert (base / "files" / "notes.txt").read_text() == "mine"
    with pytest.raises(LayoutError, match=r"notes\.txt"):
        js.convert(llama, out, "mp4", overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert js.open(out).layout.num_ranks == 2
