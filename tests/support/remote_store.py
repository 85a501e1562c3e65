"""A store on the loopback for tests, with jaxshard's time-outs cut to fractions of a second."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import object_server
import pytest

pytest.importorskip("obstore", reason="remote stores are the extra jaxshard[cloud]")
pytest.importorskip("huggingface_hub", reason="the Hub is the extra jaxshard[hub]")

from huggingface_hub import constants, file_download, hf_api

from jaxshard.storage import object_store

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Store:
    """Objects behind a server, and the URLs of one bucket of them."""

    objects: object_server.Objects
    address: str

    def add(self, name: str, folder: Path) -> None:
        """Serve ``folder`` as a bucket, as a web folder and as a repository of the Hub."""
        self.objects.add_folder(f"bucket/{name}", folder)
        self.objects.add_repository(f"org/{name}", f"bucket/{name}", COMMIT)

    def urls(self, name: str) -> dict[str, str]:
        return {
            "s3": f"s3://bucket/{name}",
            "gs": f"gs://bucket/{name}",
            "http": f"{self.address}/http/bucket/{name}",
            "hub": f"hf://org/{name}",
        }

    def fail(self, kind: str, match: str, **how: object) -> None:
        self.objects.faults.append(object_server.Fault(kind, match, **how))  # type: ignore[arg-type]

    def lines(self, part: str = "") -> list[str]:
        """The requests that were made, of which ``part`` is a part."""
        return [entry["line"] for entry in self.objects.log if part in entry["line"]]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    """An empty store; the environment refers to it."""
    objects = object_server.Objects()
    stop, address = object_server.serve(objects)
    for name in [n for n in os.environ if n.startswith(("AWS_", "HF_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "us-east-1",
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(
            {
                "gcs_base_url": address,
                "disable_oauth": True,
                **dict.fromkeys(("client_email", "private_key", "private_key_id"), ""),
            }
        ),
    }.items():
        monkeypatch.setenv(name, value)
    short = {"connect_timeout": "1s", "read_timeout": "1s", "timeout": "3s"}
    monkeypatch.setattr(object_store, "_CLIENT", {**object_store._CLIENT, **short})
    backoff = {
        "init_backoff": timedelta(milliseconds=10),
        "max_backoff": timedelta(milliseconds=50),
        "base": 2,
    }
    retry = {"max_retries": 2, "retry_timeout": timedelta(seconds=5), "backoff": backoff}
    monkeypatch.setattr(object_store, "_RETRY", retry)
    point_hub_at(address, monkeypatch, tmp_path / "hub")
    object_store.store_at.cache_clear()
    yield Store(objects, address)
    object_store.store_at.cache_clear()
    stop()


def point_hub_at(address: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Have huggingface_hub, which reads its settings once, use the loopback."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for module in (file_download, hf_api):
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(constants, name))
