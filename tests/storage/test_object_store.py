"""Requests to a store: what they need, and what their errors say."""

import os
import subprocess
import sys
import time

import checkpoints
import pytest
from remote_store import store  # noqa: F401 - a fixture

import jaxshard as js
from jaxshard.errors import StorageError
from jaxshard.storage import object_store
from jaxshard.storage.object_store import store_errors_as

FORKED = """
import os, sys
import jaxshard as js
js.open("s3://bucket/llama")
pid = os.fork()
if pid == 0:
    try:
        js.open("s3://bucket/llama")
    except js.StorageError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""

INTERRUPTED = """
import jaxshard as js, signal, threading, os, time
catalog = js.open("s3://bucket/llama")
threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    js.load_rank(catalog, "mp2", rank=0)
except KeyboardInterrupt:
    print("interrupted after", time.monotonic() - start, flush=True)
    os._exit(0)
"""


@pytest.fixture
def llama(store, tmp_path):  # noqa: F811
    checkpoints.write_llama(tmp_path / "llama")
    store.add("llama", tmp_path / "llama")


def _run(script):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout


def test_a_forked_process_gets_an_error_and_does_not_hang(store, llama):  # noqa: F811
    assert "forked" in _run(FORKED)


def test_an_interrupt_ends_a_load_while_a_request_hangs(store, llama):  # noqa: F811
    store.fail("hang", "GET .*model", times=99, seconds=15, skip=1)
    start = time.monotonic()
    assert "interrupted after" in _run(INTERRUPTED)
    assert time.monotonic() - start < 14


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    object_store.store_at.cache_clear()
    with pytest.raises(StorageError, match=r"jaxshard\[cloud\]"):
        js.open("s3://bucket/llama")


def test_a_missing_library_of_the_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StorageError, match=r"jaxshard\[hub"):
        js.open("hf://org/llama")


def test_signatures_and_bodies_are_not_in_messages():
    text = "https://host/key?X-Amz-Signature=secret of x failed Debug source: body=secret"

    def fail():
        with store_errors_as("s3://bucket/key"):
            raise ValueError(text)

    with pytest.raises(StorageError) as error:
        fail()
    assert "secret" not in str(error.value)
    assert "s3://bucket/key" in str(error.value)


def test_a_local_checkpoint_imports_no_client(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    script = (
        "import sys, jaxshard as js\n"
        f"js.open({os.fspath(tmp_path / 'llama')!r})\n"
        "clients = ('obstore', 'huggingface_hub')\n"
        "names = [n for n in sys.modules if n.partition('.')[0] in clients]\n"
        "print(names, 'jaxshard.storage.fetch' in sys.modules)"
    )
    assert _run(script).strip() == "[] False"
