"""A format is one object: a new one is a file and a line, and every verb knows it."""

from __future__ import annotations

import pickle
import re

import checkpoints
import jax
import numpy as np
import pytest
from toy_format import FILE, Toy

import jaxshard as js
from jaxshard.cli import main
from jaxshard.conversion.execute import execute
from jaxshard.conversion.prepare import prepare
from jaxshard.errors import LayoutError
from jaxshard.formats import registry


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A small model; the toy is registered until the test ends."""
    before = dict(registry.FORMATS)
    registry.register(Toy())
    checkpoints.write_llama(tmp_path / "llama")
    yield tmp_path / "llama"
    registry.FORMATS.clear()
    registry.FORMATS.update(before)


def equal(place, llama):
    verdict = js.verify(place, against=llama)
    return not verdict.problems and verdict.num_tensors > 0


def test_a_new_format_is_written_recognised_and_read(llama, tmp_path):
    js.convert(llama, tmp_path / "toy", format="toy", fsync=False)
    assert (tmp_path / "toy" / FILE).is_file()
    catalog = js.open(tmp_path / "toy")
    assert catalog.format == "toy"
    assert catalog.tensors.keys() == js.open(llama).tensors.keys()
    assert equal(tmp_path / "toy", llama)
    arrays = js.load(tmp_path / "toy", "mp2", devices=jax.devices()[:2])
    assert arrays.keys() == catalog.tensors.keys()
    js.convert(tmp_path / "toy", tmp_path / "back", fsync=False)
    assert js.open(tmp_path / "back").format == "huggingface"
    assert equal(tmp_path / "back", llama)


def test_a_new_format_is_a_value_of_the_flag_and_the_suffix_of_a_file(llama, tmp_path, capsys):
    assert main(["convert", str(llama), str(tmp_path / "out"), "--format", "toy"]) == 0
    assert equal(tmp_path / "out", llama)
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "one.toy")]) == 0
    assert equal(tmp_path / "one.toy", llama)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert re.search(r"--format \{[^}]*\btoy\b[^}]*\}", capsys.readouterr().out)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "a toy" in capsys.readouterr().out


def test_arrays_are_saved_in_a_new_format(llama, tmp_path):
    arrays = js.load(llama, "mp2", devices=jax.devices()[:2])
    js.save(arrays, tmp_path / "out", format="toy", fsync=False)
    assert equal(tmp_path / "out", llama)
    assert isinstance(js.load_rank(tmp_path / "out", "mp2", 1)["lm_head.weight"], np.ndarray)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (
            lambda source, out: js.convert(source, out, "mp2", format="toy"),
            "'toy' does not support files by rank",
        ),
        (lambda source, out: js.convert(source, out, format="toy", crc=True), "crc= .*toy"),
        (
            lambda source, out: js.convert(source, out, format="toy", max_shard_size="1MB"),
            "max_shard_size= .*one file",
        ),
        (
            lambda source, out: js.save({"x": np.ones(2)}, out, format="toy", strategy="mp2"),
            "files by rank, and format 'toy' has none",
        ),
        (lambda source, out: js.CheckpointManager(out, format="toy"), "format='toy'"),
        (
            lambda source, out: js.open(_toy(source, out), src_strategy=source),
            "strategy files",
        ),
        (lambda source, out: js.convert(source, out, format="toys"), "no such format.*toy"),
    ],
)
def test_what_a_format_does_not_support_is_refused(llama, tmp_path, work, said):
    with pytest.raises(LayoutError, match=f"(?s){said}"):
        work(llama, tmp_path / "out")


def _toy(source, out):
    js.convert(source, out, format="toy", fsync=False)
    return out


def test_without_registration_a_format_is_unknown(tmp_path):
    """The twin."""
    checkpoints.write_llama(tmp_path / "llama")
    with pytest.raises(LayoutError, match="no such format"):
        js.convert(tmp_path / "llama", tmp_path / "out", format="toy")
    assert "toy" not in registry.FORMATS


@pytest.mark.parametrize("format", registry.FORMATS)
def test_a_prepared_conversion_pickles(format, tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    to = "full" if registry.FORMATS[format].is_complete else "mp2"
    prepared = prepare(tmp_path / "llama", to, format=format)
    again = pickle.loads(pickle.dumps(prepared))
    assert again.request == prepared.request
    execute(again, tmp_path / "out", fsync=False)
    assert equal(tmp_path / "out", tmp_path / "llama")


def test_every_format_says_what_it_can_do():
    for name, format in registry.FORMATS.items():
        assert format.name == name
        assert format.title
        assert format.is_complete or format.is_by_rank
    names = registry.names_where("as_steps")
    assert set(names) == {"ranks", "iteration", "huggingface", "orbax"}


def test_a_manager_saves_and_restores_steps_in_a_new_format(llama, tmp_path):
    class ToySteps(Toy):
        name = "toy steps"
        as_steps = True

    registry.register(ToySteps())
    state = {"w": np.arange(8, dtype=np.float32).reshape(2, 4), "b": np.ones(4, np.float32)}
    with js.CheckpointManager(tmp_path / "run", format="toy steps") as manager:
        manager.save(1, jax.device_put(state))
        found = manager.restore(jax.tree.map(jax.numpy.zeros_like, jax.device_put(state)))
    assert [p.name for p in (tmp_path / "run").rglob(FILE)]
    assert all(np.array_equal(found.state[name], array) for name, array in state.items())
