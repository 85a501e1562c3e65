"""Paths and URLs."""

from pathlib import Path

import pytest

from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.storage.local import LocalFolder
from jaxshard.storage.remote import (
    folder_at,
    is_remote,
    place_at,
    refuse_remote,
    refuse_repository,
)


@pytest.mark.parametrize("text", ["s3://b", "gs://b/x", "az://c/x", "hf://o/n@r", "HTTPS://h/x"])
def test_urls_of_stores_are_remote(text):
    assert is_remote(text)


@pytest.mark.parametrize("text", ["llama", "./a/b", "/a/b", "C:", "x:y/z", "org/name"])
def test_local_paths_are_not(text):
    assert not is_remote(text)
    assert place_at(text) == Path(text)


def test_a_local_path_that_looks_like_a_url_is_local_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    assert not is_remote("s3://bucket")
    assert isinstance(folder_at("s3://bucket"), LocalFolder)


def test_urls_are_not_written_to():
    for text in ("s3://b/x", Path("s3://b/x"), "hf://o/n"):
        with pytest.raises(LayoutError, match="local paths only"):
            refuse_remote(text)
    refuse_remote("out")


def test_an_existing_folder_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match="hf://org/name"):
        refuse_repository("org/name")
    (tmp_path / "org/name").mkdir(parents=True)
    refuse_repository("org/name")
