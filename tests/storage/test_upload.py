"""Results in a store: equal to local ones, and after any fault whole, or no checkpoint at all."""

import json
import signal
import subprocess
import sys
import threading
import time

import checkpoints
import pytest
from remote_store import store  # noqa: F401 - a fixture

import jaxshard as js
from jaxshard.cli import main
from jaxshard.errors import FormatError, JaxshardError, LayoutError, StorageError
from jaxshard.storage import object_store, upload
from jaxshard.storage.remote import MARKER
from jaxshard.training import CheckpointManager

OUT = "s3://bucket/out"


@pytest.fixture
def llama(store, tmp_path, monkeypatch):  # noqa: F811
    """A small Llama in a local folder and in the store; files are sent in parts of 4 KiB."""
    monkeypatch.setattr(upload, "PART_BYTES", 4 << 10)
    monkeypatch.setattr(upload, "_LOOK_AFTER_S", (0.0, 0.05))
    folder = tmp_path / "llama"
    checkpoints.write_llama(folder, num_files=3, layers=4, hidden=32)
    store.add("llama", folder)
    return folder


def _objects(store, prefix="bucket/out/"):  # noqa: F811
    return {
        k.removeprefix(prefix): bytes(store.objects.data[k][0]) for k in store.objects.keys(prefix)
    }


def _files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def _kept(store):  # noqa: F811
    """The weight files that are in the store."""
    return [path for path in _objects(store) if path.endswith(".safetensors")]


RESULTS = {
    "one file in a folder": {},
    "several files and an index": {"max_shard_size": 20_000},
    "files by rank": {"to": "dp2mp4"},
    "columns by rank": {"to": "mp8"},
    "ckpt": {"format": "ckpt", "crc": True},
    "ckpt by rank": {"to": "mp2", "format": "ckpt", "crc": True},
    "unified": {"format": "unified"},
    "iteration": {"to": "mp2", "format": "iteration"},
    "mapped": {"names": "auto:nnx-scan"},
}


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("source", ["local", "s3"])
def test_a_result_in_a_store_has_the_bytes_of_a_local_one(result, source, store, llama, tmp_path):  # noqa: F811
    js.convert(llama, tmp_path / "here", **RESULTS[result])
    report = js.convert({"local": llama, "s3": "s3://bucket/llama"}[source], OUT, **RESULTS[result])
    assert _objects(store) == _files(tmp_path / "here")
    assert report.num_files == sum(
        p.endswith((".safetensors", ".ckpt")) and not p.startswith("strategy/")
        for p in _objects(store)
    )
    assert not store.objects.uploads


def test_what_makes_a_result_readable_is_written_last(store, llama):  # noqa: F811
    js.convert(llama, OUT, max_shard_size=20_000)
    written = [
        line.split()[1].removeprefix("/bucket/out/").partition("?")[0]
        for line in store.lines("/bucket/out/")
        if line.startswith(("PUT", "POST")) and "partNumber" not in line and "uploads=" not in line
    ]
    assert written[0] == MARKER
    assert written[-1] == "model.safetensors.index.json"
    assert store.lines()[-1].startswith("POST /bucket?delete")
    assert MARKER not in _objects(store)


def test_a_single_file_is_an_object(store, llama, tmp_path):  # noqa: F811
    for name in ("all.safetensors", "all.ckpt"):
        js.convert(llama, f"s3://bucket/files/{name}", crc=name.endswith("ckpt"))
        js.convert(llama, tmp_path / name, crc=name.endswith("ckpt"))
        assert _objects(store, "bucket/files/")[name] == (tmp_path / name).read_bytes()
        with pytest.raises(LayoutError, match="exists"):
            js.convert(llama, f"s3://bucket/files/{name}")
    js.convert(llama, "s3://bucket/files/all.ckpt", overwrite=True)
    assert sorted(_objects(store, "bucket/files/")) == ["all.ckpt", "all.safetensors"]


@pytest.mark.parametrize("format", ["huggingface", "ranks"])
def test_arrays_are_saved_to_a_store(format, store, llama, tmp_path):  # noqa: F811
    params = js.load(llama, "dp2mp4")
    js.save(params, OUT, format=format, extras=llama)
    js.save(params, tmp_path / "here", format=format, extras=llama)
    assert _objects(store) == _files(tmp_path / "here")
    with pytest.raises(LayoutError, match="exists"):
        js.save(params, OUT, format=format)


def test_google_cloud_storage_is_written_and_resumed(store, llama):  # noqa: F811
    out = "gs://bucket/out"
    store.fail("500", "PUT .*rank%5F1.*partNumber", times=999)
    with pytest.raises(StorageError, match=r"rank_1/.* cannot be written"):
        js.slice("gs://bucket/llama", out, "mp2")
    store.objects.reset()
    with pytest.raises(FormatError, match="unfinished upload"):
        js.open(out)
    assert js.slice("gs://bucket/llama", out, "mp2", resume=True).num_files
    assert not js.verify(out, llama).problems
    js.merge(out, "gs://bucket/merged")
    js.slice(llama, out, "mp4", overwrite=True)
    assert not js.verify(out, "gs://bucket/merged").problems
    assert not store.objects.uploads


def test_the_command_line_writes_to_a_store(store, llama):  # noqa: F811
    assert main(["slice", "s3://bucket/llama", OUT, "--to", "mp2", "--quiet"]) == 0
    assert main(["merge", OUT, "s3://bucket/merged", "--quiet"]) == 0
    assert not js.verify("s3://bucket/merged", llama).problems


def test_what_is_not_written_to_stores_is_refused(store, llama, tmp_path):  # noqa: F811
    with pytest.raises(LayoutError, match=r"only. Write to a disk, and upload"):
        js.convert(llama, "hf://org/out")
    with pytest.raises(LayoutError, match=r"only. Write to a disk, and upload"):
        js.convert(llama, f"{store.address}/http/bucket/out")
    with pytest.raises(LayoutError, match="'orbax' is written to local paths only"):
        js.convert(llama, OUT, format="orbax")
    with pytest.raises(LayoutError, match="'orbax' is written to local paths only"):
        js.save(js.load(llama, "mp2"), OUT, format="orbax")
    with pytest.raises(LayoutError, match="one process writes to a store"):
        js.convert(llama, OUT, "mp2", process_index=0, process_count=2)
    with pytest.raises(LayoutError, match="checksums"):
        js.convert(llama, OUT, checksums=True)
    with pytest.raises(LayoutError, match="local paths only"):
        CheckpointManager(OUT)
    with pytest.raises(LayoutError, match="local paths only"):
        main_error(["strategy", "make", str(llama), OUT, "--to", "mp2"])
    with pytest.raises(LayoutError, match="never changed"):
        js.convert("s3://bucket/llama", "s3://bucket/llama", overwrite=True)
    with pytest.raises(LayoutError, match="never changed"):
        js.convert("s3://bucket/llama", "s3://bucket", "mp2", overwrite=True)
    assert not _objects(store)
    assert not [p for p in tmp_path.iterdir() if ":" in p.name]


def main_error(arguments):
    """Run the command line; raise its error."""
    with pytest.MonkeyPatch.context() as patch:
        errors = []
        patch.setattr("jaxshard.cli.write_error", errors.append)
        if main(arguments):
            raise LayoutError(" ".join(errors))


# --- Overwriting ---------------------------------------------------------------------------


def test_an_old_result_is_replaced_without_a_mixture(store, llama, tmp_path):  # noqa: F811
    js.convert(llama, OUT, max_shard_size=20_000)
    with pytest.raises(LayoutError, match="exists"):
        js.convert(llama, OUT, "mp2")
    removed, delete = [], upload.Upload._delete

    def record(self, paths):
        if paths:
            removed.append((sorted(paths), sorted(_objects(store))))
        delete(self, paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload.Upload, "_delete", record)
        js.convert(llama, OUT, "mp2", overwrite=True)
    js.convert(llama, tmp_path / "here", "mp2")
    assert _objects(store) == _files(tmp_path / "here")
    assert removed[0][0] == ["model.safetensors.index.json"]
    assert MARKER in removed[0][1]
    assert all(path.endswith(".safetensors") for path in removed[1][0])
    assert removed[-1][0] == [MARKER]


def test_other_files_are_not_replaced(store, llama):  # noqa: F811
    store.objects.put("bucket/out/thesis.tex", b"years of work")
    with pytest.raises(LayoutError, match=r"thesis.tex, and no checkpoint"):
        js.convert(llama, OUT, overwrite=True)
    assert _objects(store) == {"thesis.tex": b"years of work"}


# --- Faults --------------------------------------------------------------------------------


def _run(store, llama, **how):  # noqa: F811
    return js.convert("s3://bucket/llama", OUT, **{"to": "mp2", "workers": 2, **how})


def _check_whole_or_refused(store, llama):  # noqa: F811
    """Whether the result is whole; otherwise no reader opens it."""
    try:
        verdict = js.verify(OUT, llama)
    except JaxshardError:
        return False
    assert not verdict.problems
    return True


FAULTS = ("500", "503", "reset", "lost", "hang", "403")


@pytest.mark.parametrize("times", [1, 999])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "match",
    ["PUT .*partial", "POST .*uploads=", "PUT .*partNumber=2", "POST .*uploadId", "PUT .*config"],
)
def test_a_fault_ends_in_a_whole_result_or_in_an_error(match, fault, times, store, llama):  # noqa: F811
    store.fail(fault, match, times=times, seconds=1.2)
    is_made = False
    try:
        _run(store, llama)
        is_made = True
    except (StorageError, LayoutError):
        assert not _check_whole_or_refused(store, llama)
        store.objects.faults.clear()
        _run(store, llama, **({"resume": True} if MARKER in _objects(store) else {}))
    # a request that may have been executed is repeated only if that does no harm
    is_repeated = fault in ("500", "503") or match in ("PUT .*partNumber=2", "PUT .*config")
    assert is_made or times > 1 or fault == "403" or not is_repeated
    assert _check_whole_or_refused(store, llama)
    for thread in threading.enumerate():
        if thread.name == "jaxshard upload":
            thread.join(10)
            assert not thread.is_alive()


def test_a_lost_answer_to_a_completed_upload_is_looked_up(store, llama):  # noqa: F811
    store.fail("lost", "POST .*rank_0.*uploadId", times=1)
    _run(store, llama)
    assert _check_whole_or_refused(store, llama)


@pytest.mark.parametrize(("to", "overwrite"), [("full", False), ("mp2", True)])
def test_a_kill_at_any_request_leaves_no_half_result(to, overwrite, store, llama, monkeypatch):  # noqa: F811
    """From some request on the store executes none, as if the process had been killed."""
    monkeypatch.setattr(object_store, "_RETRY", {**object_store._RETRY, "max_retries": 0})
    monkeypatch.setattr(upload, "_LOOK_AFTER_S", (0.0,))
    object_store.store_at.cache_clear()
    how = {"to": to, "max_shard_size": 20_000 if to == "full" else None, "overwrite": overwrite}
    number, is_done = 0, False
    while not is_done:
        for key in store.objects.keys("bucket/out/"):
            del store.objects.data[key]
        if overwrite:
            js.convert(llama, OUT, "mp4")
        old = _objects(store)
        store.objects.reset()
        store.fail("500", "bucket(/out|\\?delete|\\?list.*=out)", times=10**9, skip=number)
        try:
            js.convert(llama, OUT, **how)
            is_done = True
        except (StorageError, LayoutError):
            store.objects.faults.clear()
            now = _objects(store)
            if now != old:
                assert MARKER in now
                with pytest.raises(FormatError, match="unfinished upload"):
                    js.open(OUT)
            js.convert(llama, OUT, resume=True, **how)
        store.objects.faults.clear()
        assert _check_whole_or_refused(store, llama)
        assert MARKER not in _objects(store)
        assert not any(path.startswith("rank_3") for path in _objects(store))
        number += 1
    assert number > 10


SCRIPT = """
import sys
import jaxshard.cli
from jaxshard.storage import upload
upload.PART_BYTES = 4096
sys.exit(jaxshard.cli.main(sys.argv[1:]))
"""


def _started(store, llama):  # noqa: F811
    """A process that writes to the store."""
    command = ["slice", str(llama), OUT, "--to", "mp4", "--workers", "2", "--resume"]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *command], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("num_requests", [3, 12, 30])
def test_a_killed_process_leaves_no_half_result(num_requests, store, llama):  # noqa: F811
    store.objects.latency = 0.02
    with _started(store, llama) as process:
        while len(store.lines("bucket/out")) < num_requests:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert not _check_whole_or_refused(store, llama)
    js.slice(llama, OUT, "mp4", resume=True)
    assert _check_whole_or_refused(store, llama)


def test_an_interrupt_is_heard_while_a_store_does_not_answer(store, llama):  # noqa: F811
    store.fail("hang", "PUT .*partNumber", times=999, seconds=60)
    with _started(store, llama) as process:
        while not store.lines("partNumber"):
            assert process.poll() is None
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - began < 20
    assert not _check_whole_or_refused(store, llama)


def test_a_resumed_upload_keeps_finished_objects(store, llama):  # noqa: F811
    store.fail("500", "PUT .*rank_1.*partNumber", times=999)
    with pytest.raises(StorageError, match=r"rank_1/.* cannot be written"):
        _run(store, llama)
    store.objects.reset()
    with pytest.raises(LayoutError, match="interrupted upload"):
        _run(store, llama)
    with pytest.raises(LayoutError, match="interrupted upload"):
        _run(store, llama, resume=True, to="mp4")
    store.objects.data["bucket/out/config.json"] = (b"{}", '"of another program"')
    store.objects.metadata["bucket/out/config.json"] = {}
    store.objects.log.clear()
    kept = _kept(store)
    assert _run(store, llama, resume=True).skipped_files == len(kept)
    assert not [line for line in store.lines("PUT") if any(path in line for path in kept)]
    assert _check_whole_or_refused(store, llama)
    assert json.loads(_objects(store)["config.json"])
    store.objects.log.clear()
    assert _run(store, llama, resume=True).skipped_files == 2  # nothing is left to do
    assert not store.lines("PUT")


def test_an_upload_that_fails_is_aborted(store, llama):  # noqa: F811
    store.fail("500", "PUT .*partNumber=2", times=999)
    with pytest.raises(StorageError):
        _run(store, llama)
    assert not store.objects.uploads


def test_a_second_writer_is_refused_and_one_that_was_replaced_does_not_publish(store, llama):  # noqa: F811
    first = upload.Upload(OUT, "a request")
    with pytest.raises(LayoutError, match="still running"):
        upload.Upload(OUT, "a request")
    second = upload.Upload(OUT, "a request", resume=True)
    with pytest.raises(StorageError, match="another process is writing"):
        first.publish({})
    second.publish({})
    assert not _objects(store)


@pytest.mark.parametrize("out", [OUT, "s3://bucket/out/all.safetensors"])
def test_a_source_that_changes_is_not_published(out, store, llama, monkeypatch):  # noqa: F811
    path = next(llama.glob("model-00001*"))
    wait = upload.Upload.wait

    def change(self):  # when all is sent, but for the last part
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        wait(self)

    monkeypatch.setattr(upload.Upload, "wait", change)
    with pytest.raises(FormatError, match="changed"):
        js.convert(llama, out)
    assert not _kept(store)


# --- Memory --------------------------------------------------------------------------------


def test_parts_are_as_large_as_the_limit_on_their_number_requires():
    assert upload.part_bytes_of(1 << 30) == upload.PART_BYTES
    assert -(-(2 << 40) // upload.part_bytes_of(2 << 40)) <= 10_000


@pytest.mark.parametrize("names", [None, "auto:nnx"])
def test_memory_does_not_grow_with_the_files(names, store, llama, tmp_path, monkeypatch):  # noqa: F811
    """Of a result of 8 MiB at most a few parts of 64 KiB are in memory, transposed or not."""
    monkeypatch.setattr(upload, "PART_BYTES", 64 << 10)
    folder = tmp_path / "wide"
    checkpoints.write_llama(folder, layers=2, hidden=256, vocab=8192)
    store.objects.latency = 0.01
    largest, waiting = [], []
    stream = upload.PartStream

    class Measured(stream):
        def _part(self, number):
            part = super()._part(number)
            largest.append(self._num_in_memory)
            waiting.append(len(self._parts))
            return part

    monkeypatch.setattr(upload, "PartStream", Measured)
    js.convert(folder, OUT, names=names, host_bytes="1MiB")
    assert max(largest) == 2
    assert names or max(waiting) <= 16  # of 128, because threads wait for the store
    js.convert(folder, tmp_path / "here", names=names)
    assert _objects(store) == _files(tmp_path / "here")
