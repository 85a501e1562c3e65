"""Writing: a file counts as finished when its last byte is there, and is no file before."""

from __future__ import annotations

import pytest
import safetensors
from random_layouts import read_by_hand

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.core.layout import Layout, Placement
from jaxshard.formats.output_files import SafetensorsContainer
from jaxshard.planning.outputs import arrange
from jaxshard.planning.plan import make_plan
from jaxshard.storage.transaction import Transaction
from jaxshard.storage.writers import OutputFiles

CONTAINER = SafetensorsContainer({})


@pytest.fixture
def opened(tmp_path):
    """Two ranks that hold half of ``w`` each and all of ``n``; their staging and their files."""
    shapes = {"w": (8,), "n": (4,)}
    tensors = {
        name: Tensor(name, BY_NAME["U8"], shape, (StoredShard(0, 0, Box.whole(shape)),))
        for name, shape in shapes.items()
    }
    mp2 = (("mp", 2),)
    layout = Layout(2, {"w": (Placement(mp2, (("mp",),)),), "n": (Placement(mp2),)})
    catalog = Catalog("m", "x", (File("f", 12),), tensors)
    outputs = arrange(list(tensors.values()), layout, ["a/0.safetensors", "a/1.safetensors"])
    plan = make_plan(catalog, outputs)
    made = Transaction(tmp_path / "out", "request")
    files = OutputFiles(plan, made, CONTAINER)
    yield {m.name: m for m in plan.moves()}, made, files
    files.close()


def finished(made: Transaction) -> list[str]:
    journal = made.files.parent / "finished"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [line.split('"')[1] for line in lines]


def test_a_file_is_no_safetensors_file_until_its_last_byte(opened):
    moves, made, files = opened
    path = made.files / "a" / "0.safetensors"
    assert files.write(moves["w"], 0, 0, memoryview(b"wwww")) == 1
    assert files.write(moves["n"], 0, 2, memoryview(b"nN")) == 2
    assert path.exists()
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "np")
    assert finished(made) == []
    files.write(moves["n"], 0, 0, memoryview(b"Nn"))
    assert finished(made) == ["a/0.safetensors"]
    assert read_by_hand(path) == {"w": ((4,), b"wwww"), "n": ((4,), b"NnnN")}


def test_views_are_one_after_the_other(opened):
    moves, made, files = opened
    views = [memoryview(b"ab"), memoryview(b""), memoryview(b"cd")]
    assert files.write_views(moves["w"], 1, 0, views, 4) == 1
    files.write(moves["n"], 0, 0, memoryview(b"nnnn"))
    assert finished(made) == ["a/1.safetensors"]
    assert read_by_hand(made.files / "a/1.safetensors")["w"] == ((4,), b"abcd")


def test_a_file_without_tensor_bytes_is_finished_at_once(tmp_path):
    tensor = Tensor("e", BY_NAME["F32"], (0, 4), (StoredShard(0, 0, Box.whole((0, 4))),))
    layout = Layout(1, {"e": (Placement(()),)})
    plan = make_plan(
        Catalog("m", "x", (File("f", 0),), {"e": tensor}), arrange([tensor], layout, ["x"])
    )
    made = Transaction(tmp_path / "out", "request")
    OutputFiles(plan, made, CONTAINER).close()
    assert finished(made) == ["x"]
    assert read_by_hand(made.files / "x") == {"e": ((0, 4), b"")}
