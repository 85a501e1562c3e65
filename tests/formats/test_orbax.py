"""Orbax checkpoints are read and written through Orbax, and convert like any other."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import save_file

from jaxshard.api import convert, verify
from jaxshard.conversion import load_rank
from jaxshard.conversion.execute import execute
from jaxshard.conversion.open import open_checkpoint
from jaxshard.conversion.prepare import prepare
from jaxshard.errors import FormatError, LayoutError, StorageError
from jaxshard.formats.orbax import (
    OrbaxItem,
    quiet,
)
from jaxshard.loader import load
from jaxshard.saver import save
from jaxshard.storage.engine import COUNTED
from jaxshard.storage.orbax_source import OrbaxSource
from jaxshard.storage.resources import Counts
from jaxshard.training import CheckpointManager

ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
P = PartitionSpec


def the_tree() -> dict[str, Any]:
    mesh = jax.make_mesh((2, 4), ("dp", "mp"), axis_types=(AxisType.Auto,) * 2)
    values = np.arange(128, dtype=np.float32).reshape(8, 16)
    with jax.enable_x64(True):
        return {
            "w": jax.device_put(values, NamedSharding(mesh, P("mp", "dp"))),
            "layers": [
                {"b": jax.device_put(values[0].astype("bfloat16"), NamedSharding(mesh, P()))},
                {"b": jax.device_put(np.arange(4) + 2**40, jax.devices()[0])},
            ],
            "step": jax.device_put(np.int32(7), jax.devices()[0]),
        }


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def check(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert np.asarray(array).tobytes() == expected[name].tobytes(), name


def by_checkpointer(place: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as saver:
        saver.save(place, tree)
    return place


def by_manager(place: Path, tree: Any) -> Path:
    with ocp.CheckpointManager(place) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    return place / "3"


def by_v1(place: Path, tree: Any) -> Path:
    from orbax.checkpoint.experimental import v1  # noqa: PLC0415

    v1.save(place, tree)
    return place


@pytest.mark.parametrize("write", [by_checkpointer, by_manager, by_v1])
def test_what_orbax_wrote_is_opened_and_loaded(tmp_path, write):
    tree = the_tree()
    place = write(tmp_path / "there", tree)
    catalog = open_checkpoint(place)
    assert catalog.format == "orbax"
    expected = flat(tree)
    assert {n: t.shape for n, t in catalog.tensors.items()} == {
        n: a.shape for n, a in expected.items()
    }
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    target = {n: NamedSharding(mesh, P("x") if n == "w" else P()) for n in expected}
    found = load(catalog, target)
    check(found, expected)
    assert found["w"].sharding == target["w"]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as a plain restore does
@pytest.mark.parametrize("nested", [False, True])
def test_orbax_reads_what_is_saved(tmp_path, nested):
    tree = the_tree() if nested else dict(flat(the_tree()))
    save(tree, tmp_path / "out", format="orbax")
    with jax.enable_x64(True), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        back = reader.restore(tmp_path / "out")
    check(flat(back), flat(tree))
    assert isinstance(back.get("layers"), list) == nested


def test_a_cast_and_a_tree_are_filled_from_orbax(tmp_path):
    tree = the_tree()
    by_checkpointer(tmp_path / "there", tree)
    here = SingleDeviceSharding(jax.devices()[5])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
    like["w"] = jax.ShapeDtypeStruct((8, 16), np.float16, sharding=here)
    found = load(tmp_path / "there", like)
    expected = flat(tree)
    check(flat(found), {**expected, "w": expected["w"].astype(np.float16)})


def test_two_leaves_may_name_one_tensor_of_orbax(tmp_path):
    by_checkpointer(tmp_path / "there", {"w": np.ones((4, 4), np.float32)})
    here = SingleDeviceSharding(jax.devices()[0])
    found = load(tmp_path / "there", {"a": here, "b": here}, name_of=lambda p: "w")
    assert np.array_equal(found["a"], found["b"])


@pytest.mark.parametrize("to", ["full", "dp1mp2pp2"])
def test_a_model_goes_from_files_to_orbax_and_back_to_files(tmp_path, to):
    checkpoints.write_llama(tmp_path / "in")
    save(
        load(tmp_path / "in", "dp2mp4"), tmp_path / "orbax", format="orbax", extras=tmp_path / "in"
    )
    assert open_checkpoint(tmp_path / "orbax").model.type == "llama"
    convert(tmp_path / "orbax", tmp_path / "out", to)
    assert not verify(tmp_path / "out", against=tmp_path / "in").problems
    if to == "full":
        assert (tmp_path / "out" / "tokenizer.json").exists()


def test_opening_reads_metadata_only(tmp_path, monkeypatch):
    values = np.random.default_rng(0).random((1 << 20,), np.float32)  # not to be compressed away
    by_checkpointer(tmp_path / "there", {"w": values})
    monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *a, **k: pytest.fail("it restores"))
    before = _bytes_read()
    catalog = open_checkpoint(tmp_path / "there")
    assert catalog["w"].num_bytes == values.nbytes
    assert _bytes_read() - before < values.nbytes / 8


def _bytes_read() -> int:
    """Bytes that this process has asked the kernel to read."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_what_a_load_takes_is_checked_and_counted_as_for_files(tmp_path, monkeypatch):
    tree = flat(the_tree())
    by_checkpointer(tmp_path / "there", tree)
    catalog = open_checkpoint(tmp_path / "there")
    here = SingleDeviceSharding(jax.devices()[0])
    groups, real = [], OrbaxItem.restore

    def restored(self: Any, arguments: Any, **how: Any) -> Any:
        groups.append(list(arguments))
        return real(self, arguments, **how)

    monkeypatch.setattr(OrbaxItem, "restore", restored)
    counts: list[Counts] = []
    check(load(catalog, here, host_bytes=64, counted=counts.append), tree)
    assert counts[0].bytes_needed == sum(a.nbytes for a in tree.values())
    assert counts[0].num_reads == len(tree)
    assert sorted(map(len, groups)) == [1, 1, 2]  # w alone has more than the budget
    monkeypatch.setattr("jaxshard.loader.memory_budget.available_bytes", lambda: 1000)
    with pytest.raises(LayoutError, match="bytes of host memory"):
        load(catalog, here)


def test_tensors_of_which_only_parts_are_wanted_go_when_others_need_the_room(tmp_path):
    tree = {f"w{i}": np.full((64, 64), i, np.float32) for i in range(8)}
    by_checkpointer(tmp_path / "there", tree)
    catalog = open_checkpoint(tmp_path / "there")
    source = OrbaxSource(catalog, held_bytes=2 * 64 * 64 * 4)
    for name, tensor in catalog.tensors.items():
        out = bytearray(64)
        source.read(tensor.shards[0], 128, memoryview(out))
        assert bytes(out) == tree[name].tobytes()[128:192]
        assert len(source._held) <= 2
    first = next(iter(catalog.tensors.values()))
    source.read(first.shards[0], 0, memoryview(bytearray(64)))  # it had to go, and comes again
    assert source.held_bytes == 4 * 64 * 64 * 4
    source.close()


def test_a_tensor_goes_when_all_of_it_has_been_read(tmp_path):
    by_checkpointer(tmp_path / "there", {"w": np.arange(64, dtype=np.float32)})
    catalog = open_checkpoint(tmp_path / "there")
    source, out = OrbaxSource(catalog), bytearray(256)
    for at in range(0, 256, 64):
        source.read(catalog["w"].shards[0], at, memoryview(out)[at : at + 64])
    assert bytes(out) == np.arange(64, dtype=np.float32).tobytes()
    assert not source._held


def test_other_names_are_read_from_orbax_too(tmp_path):
    checkpoints.write_llama(tmp_path / "in")
    save(load(tmp_path / "in", "mp2"), tmp_path / "orbax", format="orbax", extras=tmp_path / "in")
    names = "llama-hf:llama-mindformers"
    convert(tmp_path / "orbax", tmp_path / "ours", names=names)
    convert(tmp_path / "in", tmp_path / "theirs", names=names)
    assert checkpoints.stored(tmp_path / "ours") == checkpoints.stored(tmp_path / "theirs")


# --- file to file ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as a plain restore does
def test_files_become_an_orbax_checkpoint_one_tensor_at_a_time(tmp_path, monkeypatch):
    arrays = checkpoints.write_llama(tmp_path / "in", layers=3)
    convert(tmp_path / "in", tmp_path / "cut", "mp2pp2")
    alive: set[int] = set()
    most, real = [], load_rank.LazyTensors.read

    def watched(self: Any, *args: Any) -> np.ndarray:
        array = np.array(real(self, *args))
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most.append(len(alive))
        return array

    monkeypatch.setattr(load_rank.LazyTensors, "read", watched)
    prepared = prepare(tmp_path / "cut", "full", format="orbax")
    report = execute(prepared, tmp_path / "out")
    assert len(most) == len(arrays)
    assert max(most) <= 2
    planned = prepared.plan.totals
    assert {n: getattr(report.counts, n) for n in COUNTED} == {
        n: getattr(planned, n) for n in COUNTED
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        check(flat(reader.restore(tmp_path / "out")), arrays)
    assert open_checkpoint(tmp_path / "out").model.type == "llama"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    check(load(tmp_path / "out", "dp2mp4"), arrays)


def test_the_command_line_writes_orbax_and_only_whole(tmp_path, capsys):
    checkpoints.write_llama(tmp_path / "in")
    assert checkpoints.run("convert", tmp_path / "in", tmp_path / "o", "--format", "orbax") == 0
    assert checkpoints.run("verify", tmp_path / "o", "--against", tmp_path / "in") == 0
    again = ("convert", tmp_path / "in", tmp_path / "p", "--format", "orbax")
    assert checkpoints.run(*again, "--to", "mp2") == 2
    assert checkpoints.run(*again, "--process-index", 0, "--process-count", 2) == 2
    assert "one process" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_orbaxs_own_reader_of_safetensors_opens_what_is_saved(tmp_path):
    from orbax.checkpoint.experimental import v1  # noqa: PLC0415

    arrays = checkpoints.write_llama(tmp_path / "in")
    save(load(tmp_path / "in", "dp2mp4"), tmp_path / "out", max_shard_size="4KB")
    here = SingleDeviceSharding(jax.devices()[1])
    wanted = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for n, a in arrays.items()}
    layout = v1.options.CheckpointLayout.SAFETENSORS
    with v1.Context(checkpoint_layout=layout):
        check(v1.load(tmp_path / "out", wanted), arrays)


def test_damaged_metadata_is_an_error_with_the_path(tmp_path):
    by_checkpointer(tmp_path / "there", {"w": np.ones(4, np.float32)})
    (tmp_path / "there" / "_METADATA").write_text("{")
    with pytest.raises(FormatError, match="there: Orbax finds no arrays that match the metadata"):
        open_checkpoint(tmp_path / "there")


def test_missing_data_is_an_error_before_and_after_opening(tmp_path):
    by_checkpointer(tmp_path / "there", {"w": np.ones((256, 256), np.float32)})
    catalog = open_checkpoint(tmp_path / "there")
    for path in (tmp_path / "there").rglob("d/*"):
        path.unlink()
    with pytest.raises(FormatError, match="there: Orbax finds no arrays"):
        open_checkpoint(tmp_path / "there")
    with pytest.raises(FormatError, match="there: Orbax finds no arrays"):
        load(catalog, jax.devices()[0])


def test_damaged_data_is_an_error_with_the_name(tmp_path):
    values = np.random.default_rng(0).random((256, 256), np.float32)  # not to be compressed away
    by_checkpointer(tmp_path / "there", {"w": values})
    catalog = open_checkpoint(tmp_path / "there")
    largest = max((tmp_path / "there").rglob("d/*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(b"\0" * largest.stat().st_size)
    with pytest.raises(FormatError, match="Orbax cannot read w"):
        load(catalog, jax.devices()[0])
    with pytest.raises(FormatError, match="Orbax cannot read w"):
        convert(catalog, tmp_path / "out")


def test_an_existing_checkpoint_is_refused_like_any_other(tmp_path):
    save({"w": np.ones(4, np.float32)}, tmp_path / "out", format="orbax")
    with pytest.raises(LayoutError, match="exists"):
        save({"w": np.ones(4, np.float32)}, tmp_path / "out", format="orbax")
    save({"v": np.ones(4, np.float32)}, tmp_path / "out", format="orbax", overwrite=True)
    assert list(open_checkpoint(tmp_path / "out").tensors) == ["v"]


def test_orbax_is_imported_only_when_it_is_needed():
    program = (
        "import sys, jaxshard.loader, jaxshard.saver, jaxshard.conversion.open; "
        "print([m for m in sys.modules if m.startswith('orbax')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_orbax_does_not_store_is_refused_before_it_is_asked(tmp_path):
    arrays = {"e": np.zeros((0, 8), np.float32), "x": np.ones(2, np.float32)}
    save_file(arrays, tmp_path / "in.safetensors")
    with pytest.raises(LayoutError, match=r"e of shape \(0, 8\): Orbax stores no arrays without"):
        convert(tmp_path / "in.safetensors", tmp_path / "out", format="orbax")
    with pytest.raises(LayoutError, match="Orbax stores no arrays without elements"):
        save(jax.device_put(arrays), tmp_path / "out", format="orbax")
    whole = {"x": arrays["x"]}
    for how in ({"max_shard_size": "1GB"}, {"prefix": "net_"}, {"strategy": "mp2"}):
        with pytest.raises(LayoutError, match=r"Leave it\s+out"):
            save(jax.device_put(whole), tmp_path / "out", format="orbax", **how)
    manager = CheckpointManager(tmp_path / "run", format="orbax")
    with pytest.raises(LayoutError, match="Orbax stores no arrays without elements"):
        manager.save(1, {"params": jax.device_put(arrays)})
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


# --- what Orbax logs ------------------------------------------------------------------------


@contextmanager
def small_files() -> Iterator[None]:
    """No file may become larger than 64 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("verb", ["save", "convert", "manager", "in the background"])
def test_a_save_that_fails_says_so_once(tmp_path, verb, capfd, caplog):
    chance = np.random.default_rng(0)
    arrays = {f"w{i}": chance.random((64, 1024), np.float32) for i in range(8)}
    tree = {"params": jax.device_put(arrays)}
    save_file(arrays, tmp_path / "in.safetensors")
    manager = CheckpointManager(tmp_path / "run", format="orbax", async_save="back" in verb)
    work = {
        "save": lambda: save(tree, tmp_path / "out", format="orbax"),
        "convert": lambda: convert(tmp_path / "in.safetensors", tmp_path / "out", format="orbax"),
    }.get(verb, lambda: (manager.save(1, tree), manager.wait()))
    with small_files(), pytest.raises(StorageError, match="Orbax could not write it"):
        work()
    assert {r.name for r in caplog.records} <= {"jaxshard.training", "jaxshard"}
    assert "Traceback" not in caplog.text
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not (tmp_path / "out").exists()


def test_only_what_orbax_itself_logs_is_left_out(caplog):
    caplog.set_level(logging.DEBUG)
    spoken = []

    def record(path: str, text: str, error: Exception | None = None) -> None:
        name = "asyncio" if error else "absl"
        trace = None if error is None else (type(error), error, error.__traceback__)
        logger = logging.getLogger(name)
        logger.handle(logger.makeRecord(name, logging.ERROR, path, 1, text, (), trace))

    def speak() -> None:
        record("/site-packages/orbax_like/mine.py", "mine")
        record(ocp.__file__, "theirs")
        record("/lib/asyncio/events.py", "never retrieved", ValueError("no such thing"))
        record("/lib/asyncio/events.py", "never retrieved", ValueError("OUT_OF_RANGE: Error"))

    for within in (True, False):
        caplog.clear()
        with quiet() if within else nullcontext():
            speak()
        spoken.append([r.getMessage() for r in caplog.records])
    assert spoken == [
        ["mine", "never retrieved"],
        ["mine", "theirs", "never retrieved", "never retrieved"],
    ]


def test_quiet_ends_when_the_last_thread_has_ended_it(monkeypatch):
    heard: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: heard.append(str(args.exc_value)))
    own = sys.unraisablehook

    def report(text: str) -> None:
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))

    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    report("Event loop is closed")
    report("another")
    assert heard == ["another"]
    second.__exit__(None, None, None)
    assert sys.unraisablehook is own
    assert not any(logging.getLogger(name).filters for name in ("absl", "asyncio"))
