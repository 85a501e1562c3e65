"""Ownership: only a staging folder that jaxshard made is written into or deleted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxshard.errors import LayoutError
from jaxshard.storage import staging
from jaxshard.storage.shared_transaction import SharedTransaction
from jaxshard.storage.transaction import Transaction

Make = Callable[[Path], object]


def write(*names: str) -> Make:
    def make(base: Path) -> None:
        for name in names:
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_text("mine")

    return make


def link(base: Path) -> None:
    write("thesis.tex", "sub/y")(base.parent / "home")
    base.symlink_to(base.parent / "home")


def link_to_ours(base: Path) -> None:
    """A link to a folder with a journal that names it is no folder of ours either."""
    home = base.parent / "home"
    write("thesis.tex")(home)
    (home / "journal.json").write_text(json.dumps({"jaxshard": base.name}) + "\nrequest")
    base.symlink_to(home)


def with_journal(text: str) -> Make:
    def make(base: Path) -> None:
        write("thesis.tex")(base)
        (base / "journal.json").write_text(text)

    return make


def linked_journal(base: Path) -> None:
    write("thesis.tex")(base)
    (base.parent / "journal").write_text(json.dumps({"jaxshard": base.name}) + "\nrequest")
    (base / "journal.json").symlink_to(base.parent / "journal")


def of_another_user(base: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder to another user")
    write("files/a")(base)
    staging.write_journal(base, "request")
    os.chown(base, 12345, 12345)


FOREIGN: dict[str, Make] = {
    "link": link,
    "link to a folder with a journal": link_to_ours,
    "dangling link": lambda base: base.symlink_to(base.parent / "nowhere"),
    "file": lambda base: base.write_text("mine"),
    "fifo": os.mkfifo,
    "folder": write("thesis.tex"),
    "folder with our names": write("files/a", "finished", "placing", "lock"),
    "lock with content": write("lock"),
    "folder called lock": write("lock/x"),
    "empty journal": with_journal(""),
    "another journal": with_journal('{"source": "model"}'),
    "journal of another name": with_journal('{"jaxshard": ".other.partial"}\nrequest'),
    "journal that is nested deep": with_journal("[" * 200_000),
    "journal in another encoding": lambda base: (
        write("x")(base),
        (base / "journal.json").write_bytes(b"\xff\xfe"),
    ),
    "linked journal": linked_journal,
    "folder of another user": of_another_user,
}


def tree(folder: Path) -> list[tuple[str, bool, int, str]]:
    return sorted(
        (str(p), p.is_symlink(), p.lstat().st_ino, p.read_text("latin-1") if p.is_file() else "")
        for p in folder.rglob("*")
    )


@pytest.mark.parametrize(
    "begin",
    [
        lambda out: Transaction(out, "request"),
        lambda out: Transaction(out, "request", resume=True),
        lambda out: Transaction(out, "request", overwrite=True),
        lambda out: Transaction(out, "request", resume=True, overwrite=True),
        lambda out: Transaction(out, "request", resumable=False),
        lambda out: Transaction(out, "request", only="m.ckpt", overwrite=True),
        lambda out: SharedTransaction(out, "request", 0, 2),
        lambda out: SharedTransaction(out, "request", 1, 2, overwrite=True),
    ],
    ids=["plain", "resume", "overwrite", "both", "save", "file", "part", "part, overwrite"],
)
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_refused_and_kept(tmp_path, kind, begin):
    FOREIGN[kind](tmp_path / ".out.partial")
    before = tree(tmp_path)
    with pytest.raises(
        LayoutError, match=r"\.out\.partial: this is where .* but it.* Move it away"
    ):
        begin(tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("left", [[], ["lock"], ["turn.lock"], ["lock", ".journal.json.new"]])
@pytest.mark.parametrize("durable", [True, False])
def test_a_run_killed_before_it_had_a_journal_is_no_interrupted_run(tmp_path, left, durable):
    base = tmp_path / ".out.partial"
    base.mkdir()
    for name in left:
        (base / name).touch()
    made = Transaction(tmp_path / "out", "request", durable=durable)
    (made.files / "a").touch()
    made.finish("a", 0)
    made.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_where_root_is_another_user_its_folders_are_ours(tmp_path, monkeypatch):
    """As on NFS, which maps root to another number."""
    made = Transaction(tmp_path / "out", "request")
    (made.files / "a").touch()
    made.finish("a", 0)
    made.abandon()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    again = Transaction(tmp_path / "out", "request", resume=True)
    assert set(again.finished) == {"a"}
    again.abandon()


def test_a_folder_is_ours_until_the_last_of_it_is_removed(tmp_path, monkeypatch):
    """Stopped before each single removal, what is left is taken up by the next run."""
    for stop in range(100):
        made = Transaction(tmp_path / "out", "request")
        (made.files / "rank_0").mkdir()
        (made.files / "rank_0" / "a").touch()
        made.finish("rank_0/a", 0)
        count = iter(range(100))

        def stopping(call, count=count, stop=stop):
            def removed(*args, **how):
                if next(count) == stop:
                    raise KeyboardInterrupt
                return call(*args, **how)

            return removed

        with monkeypatch.context() as patched:
            for name in ("unlink", "rmdir"):
                patched.setattr(os, name, stopping(getattr(os, name)))
            try:
                staging.remove(made.files.parent)
            except KeyboardInterrupt:
                made._release()
            else:
                break
        Transaction(tmp_path / "out", "request", overwrite=True).abandon()
        assert not list(tmp_path.iterdir())
    assert stop > 5
