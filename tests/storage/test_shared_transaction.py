"""Files that several processes fill: who is late, and what is on the disk when."""

from __future__ import annotations

import checkpoints
import pytest

from jaxshard.conversion.prepare import prepare
from jaxshard.devices.host_shards import HostShards
from jaxshard.distributed.processes import Processes
from jaxshard.errors import StorageError
from jaxshard.saver.shared_write import SharedWrite
from jaxshard.storage.local import Handles
from jaxshard.storage.transaction import Transaction
from jaxshard.storage.writers import SharedFiles, bring_in, shared_folder, wait_for


@pytest.fixture
def result(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    return prepare(tmp_path / "llama", "mp2", format="ckpt", crc=True).result


def begun(result, destination, token):
    staging = Transaction(destination, "a save", overwrite=True, durable=False)
    folder = shared_folder(destination, token)
    folder.mkdir()
    files = SharedFiles(result.outputs, folder, result.container)
    files.lay_out()
    files.close()
    return staging, folder


def test_who_is_late_from_a_save_given_up_finds_nowhere_to_write(result, tmp_path):
    """And so cannot put old bytes into the next save of the same checkpoint."""
    out = tmp_path / "out"
    first, folder = begun(result, out, "one")
    late = SharedFiles(result.outputs, folder, result.container)
    first.abandon()
    second, folder = begun(result, out, "two")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(StorageError, match="the others gave this save up"):
        late.write(0, "model.norm.weight", 0, memoryview(b"x" * 32))
    late.close()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    bring_in(second, folder)
    second.publish()
    assert {p.name for p in out.rglob("*.ckpt")} == {p.name for p in before}
    assert not shared_folder(out, "two").parent.exists()


def test_headers_and_checksums_are_on_the_disk_too(result, tmp_path, monkeypatch):
    synced = []
    plain = Handles.sync

    def sync(self, path):
        synced.append(path)
        plain(self, path)

    monkeypatch.setattr(Handles, "sync", sync)
    source = HostShards({})
    for durable in (True, False):
        out = tmp_path / f"{durable}"
        staging = Transaction(out, "a save", durable=durable, resumable=False)
        results = [(source.catalog, result)]
        shared = SharedWrite(source, results, out, Processes(), durable=durable)
        for step in (shared.begin, shared.finish):
            step(staging)
            assert sorted(synced) == (sorted(result.outputs.paths) if durable else [])
            synced.clear()
        staging.abandon()


def test_a_folder_that_is_not_seen_is_said_to_be_on_no_common_disk(tmp_path):
    with pytest.raises(StorageError, match=r"process 3 does not see .*shared_filesystem=False"):
        wait_for(tmp_path / "nowhere", 0.1, 3)
