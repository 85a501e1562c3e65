"""Unified folders: as MindSpore makes them, and as it demands them to slice from."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore_files as ms
import pytest
from golden_files import golden
from mindspore_ranks import ARRAYS, NUMBERS, QUICK, check_equal, merged

import jaxshard as js
from jaxshard.cli import main
from jaxshard.conversion.targets import make_result
from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, StoredShard, Tensor
from jaxshard.core.dtypes import dtype
from jaxshard.formats.output_files import Request


def test_parts_are_of_at_most_the_size_given_and_numbers_lie_apart(
    training: Path, tmp_path: Path
) -> None:
    out = tmp_path / "u"
    flags = ["--format", "unified", "--max-shard-size", "400B"]
    assert main(["merge", str(training), str(out), *flags]) == 0
    parts = {p.name: ms.weights(p) for p in out.glob("part*.safetensors")}
    assert all(sum(len(t[2]) for t in held.values()) <= 400 for held in parts.values())
    assert parts.keys() == {f"part{i}.safetensors" for i in range(3)}
    assert ms.weights(out / "hyper_param.safetensors").keys() == NUMBERS.keys()
    text = (out / "param_name_map.json").read_text()
    index = json.loads(text)
    assert text.startswith('{\n    "metadata": {\n        "total_size"')  # as MindSpore indents
    assert index["weight_map"] == {n: path for path, held in parts.items() for n in held}
    assert index["metadata"]["total_size"] == sum(
        len(t[2]) for held in parts.values() for t in held.values()
    )


def test_both_shapes_of_the_index_are_read(training: Path, tmp_path: Path) -> None:
    wanted = {**ARRAYS, **{f"adam_m.{n}": a * 2 for n, a in ARRAYS.items()}, **NUMBERS}
    js.merge(training, tmp_path / "u", format="unified", max_shard_size=200, **QUICK)
    check_equal(merged(tmp_path / "u", tmp_path / "o"), wanted)
    place = tmp_path / "u" / "param_name_map.json"
    flat = json.loads(place.read_text())["weight_map"]
    place.write_text(json.dumps(flat))
    assert js.open(tmp_path / "u").scalars == NUMBERS.keys()
    check_equal(merged(tmp_path / "u", tmp_path / "flat"), wanted)


def test_it_is_sliced_for_any_strategy(training: Path, tmp_path: Path) -> None:
    js.merge(training, tmp_path / "u", format="unified", **QUICK)
    js.convert(
        tmp_path / "u",
        tmp_path / "cut",
        training.parent / "strategy",
        **QUICK,
        drop_prefix="accu_",
    )
    assert js.verify(tmp_path / "cut", tmp_path / "u").problems == ()


def test_three_gibibytes_are_in_a_part_unless_said_otherwise() -> None:
    shape = (1 << 29,)  # 2 GiB of F32
    tensors = {
        n: Tensor(n, dtype("F32"), shape, (StoredShard(0, 0, Box.whole(shape)),))
        for n in ("a", "b", "c")
    }
    catalog = Catalog("nowhere", "ckpt", (File("f", 3 << 31),), tensors)
    for size, parts in ((None, 3), (4 << 30, 2), (1, 3)):
        request = Request(format="unified", max_shard_bytes=size)
        result = make_result(catalog, list(tensors.values()), request)
        assert len(result.outputs.paths) == parts
    whole = make_result(catalog, list(tensors.values()), Request())
    assert len(whole.outputs.paths) == 2  # Hugging Face's five gigabytes


@pytest.mark.parametrize("name", ["dp2mp2pp2", "dp4mp2_opt2"])
def test_a_real_job_is_unified_to_the_truth(name: str, tmp_path: Path) -> None:
    source = golden(name, "src_safetensors_dedup")
    js.merge(source, tmp_path / "u", format="unified", **QUICK)
    assert ms.hashed(ms.folder_weights(tmp_path / "u")) == ms.truth(name)
    for path in (tmp_path / "u").glob("*.safetensors"):
        metadata = ms.check_mindspore_reads(path)
        assert metadata == {"format": "ms", "remove_redundancy": "False"}


def test_a_format_that_does_not_fit_the_target_is_refused(training: Path, tmp_path: Path) -> None:
    for to, format in (("same", "unified"), ("full", "ranks"), ("same", "huggingface")):
        with pytest.raises(js.LayoutError, match=f"format '{format}' does not support"):
            js.convert(training, tmp_path / "o", to, format=format)
