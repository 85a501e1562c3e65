"""Carrying files along: links are followed to the checkpoint's own files, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest

import jaxshard as js
from jaxshard.errors import NotFoundError
from jaxshard.storage.local import LocalFolder

QUICK = {"fsync": False}


@pytest.fixture
def llama(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "home" / "key.txt"
    path.parent.mkdir()
    path.write_text("secret")
    return path


def as_cached(folder: Path, cache: Path) -> Path:
    """``folder`` as the Hugging Face cache has it: links to blobs, two folders up."""
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        (blobs / f"{number:040x}").write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "/".join([".."] * (len(link.relative_to(cache).parts) - 1))
        link.symlink_to(f"{up}/blobs/{number:040x}")
    return snapshot


def test_all_of_a_cached_checkpoint_comes_along(llama, tmp_path):
    (llama / "code").mkdir()
    (llama / "code" / "modeling.py").write_text("x")
    snapshot = as_cached(llama, tmp_path / "cache")
    report = js.merge(snapshot, tmp_path / "out", **QUICK)
    assert report.notes == ()
    found, source = checkpoints.files_of(tmp_path / "out"), checkpoints.files_of(llama)
    assert found.keys() == source.keys()
    assert found["code/modeling.py"] == source["code/modeling.py"]
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


def test_links_to_other_peoples_files_are_not_carried_along(llama, secret, tmp_path):
    (llama / "vocab.txt").symlink_to(secret)
    (llama / "also.txt").symlink_to(llama / "tokenizer.json")
    report = js.slice(llama, tmp_path / "out", "mp2", **QUICK)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"also.txt", "config.json", "rank_0", "rank_1", "strategy", "tokenizer.json"}
    (note,) = report.notes
    assert note.startswith("vocab.txt: links to files that are not the checkpoint's own")


def test_they_are_not_carried_along_by_a_save_either(llama, secret, tmp_path):
    pytest.importorskip("jax")
    (llama / "vocab.txt").symlink_to(secret)
    js.save(js.load(llama, "mp2"), tmp_path / "out", extras=llama, fsync=False)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_links_to_folders_elsewhere_are_not_entered(llama, secret, tmp_path):
    (llama / "root").symlink_to("/")
    (llama / "home").symlink_to(secret.parent)
    (llama / "inside").symlink_to(".")
    folder = LocalFolder(llama)
    assert set(folder.files()) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert folder.not_followed == ("home", "root")
    assert js.open(llama).notes == (
        "home, root are links to a folder elsewhere, not followed: copy what it holds here.",
    )
    js.merge(llama, tmp_path / "out", **QUICK)
    assert not list((tmp_path / "out").rglob("key.txt"))


def test_what_only_a_link_to_a_folder_would_lead_to_is_missed_with_the_reason(llama, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "rank_0").symlink_to(llama)
    with pytest.raises(NotFoundError, match="rank_0 is a link to a folder elsewhere"):
        js.open(tmp_path / "links")
