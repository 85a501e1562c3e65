"""Verify: what is wrong is found and named, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import checkpoints
import numpy as np
import pytest

import jaxshard as js
from jaxshard.core.layout import Placement
from jaxshard.errors import CoverageError, LayoutError
from jaxshard.formats import weight_files
from jaxshard.lora import merge_lora
from jaxshard.mapping import find_mapping

QUICK = {"fsync": False}
CHECKED = {"fsync": False, "check_replicas": True}


@pytest.fixture
def cut(tmp_path):
    """A checkpoint, and the same cut for 2 x 2 ranks."""
    checkpoints.write_llama(tmp_path / "one")
    js.slice(tmp_path / "one", tmp_path / "cut", "dp2mp2", **QUICK)
    return tmp_path / "one", tmp_path / "cut"


def flip(path: Path, name: str, byte: int) -> None:
    """Change one bit of byte ``byte`` of tensor ``name`` in the file at ``path``."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at, _ = json.loads(data[8:start])[name]["data_offsets"]
    data[start + at + byte] ^= 1
    path.write_bytes(data)


def test_a_good_checkpoint_has_no_problems(cut):
    one, ranks = cut
    verdict = js.verify(ranks)
    assert (verdict.problems, verdict.num_tensors) == ((), 21)
    norms = 5 * 16 * 2  # of every other byte there are two, of these four
    assert verdict.bytes_compared == js.open(ranks).num_bytes + 2 * norms
    assert js.verify(ranks, one).problems == js.verify(one, ranks).problems == ()


def test_replicas_that_differ_are_named_with_their_files(cut):
    flip(cut[1] / "rank_3" / "checkpoint_rank_3-1_1.safetensors", "lm_head.weight", 5)
    assert js.verify(cut[1]).problems == (
        "lm_head.weight differs between rank_1/checkpoint_rank_1-1_1.safetensors and "
        "rank_3/checkpoint_rank_3-1_1.safetensors. Fetch both again, or move the wrong one away: "
        "one replica is enough.",
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_values_that_differ_are_told_with_their_place(cut, rank):
    """Whichever replica it is in; rank 1 and 3 hold rows 16 to 32 of the head."""
    path = cut[1] / f"rank_{rank}" / f"checkpoint_rank_{rank}-1_1.safetensors"
    flip(path, "lm_head.weight", 2 * (3 * 16 + 7))
    options = {"against": cut[1]}
    (problem,) = js.verify(cut[0], **options).problems
    assert problem.startswith("lm_head.weight: the values differ, first at element (19, 7)")
    assert f"rank_{rank}" in problem


def test_tensors_in_one_only_or_of_another_shape_are_listed(tmp_path):
    common = {"same": np.ones(3, np.float32), "a:b": np.ones(4, np.float32)}
    checkpoints.write_folder(tmp_path / "a", {**common, "mine": np.ones(1, np.int8)})
    checkpoints.write_folder(
        tmp_path / "b", {**common, "a:b": np.ones(2, np.float32), "yours": np.ones(1, np.int8)}
    )
    problems = js.verify(tmp_path / "a", tmp_path / "b").problems
    assert len(problems) == 3
    assert f"mine: only in {tmp_path / 'a'}." in problems
    assert f"yours: only in {tmp_path / 'b'}." in problems
    assert any(p.startswith("a:b: F32 (4,) in") for p in problems)


def test_missing_shards_are_a_problem_not_a_crash(cut):
    for rank in (0, 2):
        shutil.rmtree(cut[1] / f"rank_{rank}")
    problems = js.verify(cut[1]).problems
    assert "model.embed_tokens.weight" in "".join(problems)
    assert all("the source holds" in p for p in problems)
    assert all(p.endswith(" Fetch rank_0 or rank_2.") for p in problems)
    assert js.verify(cut[0], cut[1]).problems == problems


def test_a_bit_of_nothing_and_numbers_without_dims_are_compared(tmp_path):
    arrays = {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(3, np.int64)}
    checkpoints.write_folder(tmp_path / "a", arrays)
    checkpoints.write_folder(tmp_path / "b", {**arrays, "scalar": np.array(4, np.int64)})
    assert js.verify(tmp_path / "a", tmp_path / "a").problems == ()
    (problem,) = js.verify(tmp_path / "a", tmp_path / "b").problems
    assert problem.startswith("scalar: the values differ, first at element ()")


def test_not_a_number_equals_itself_bit_for_bit(tmp_path):
    checkpoints.write_folder(tmp_path / "a", {"w": np.full(4, np.nan, np.float32)})
    checkpoints.write_folder(tmp_path / "b", {"w": np.full(4, -np.nan, np.float32)})
    assert js.verify(tmp_path / "a", tmp_path / "a").problems == ()
    assert len(js.verify(tmp_path / "a", tmp_path / "b").problems) == 1


@pytest.fixture
def tied(tmp_path):
    """One tensor in halves on ranks 0 and 1, and whole on ranks 2 and 3."""
    w = np.arange(32, dtype=np.int16).reshape(8, 4)
    checkpoints.write_folder(tmp_path / "one", {"w": w})
    halves, whole = Placement((("mp", 2),), (("mp",),)), Placement((("dp", 2),), (), 2)
    layout = js.Layout(4, {"w": (halves, whole)})
    js.slice(tmp_path / "one", tmp_path / "cut", layout, **QUICK)
    return tmp_path / "cut"


def test_pieces_that_overlap_are_compared_too(tied):
    verdict = js.verify(tied)
    assert (verdict.problems, verdict.bytes_compared) == ((), 64 + 2 * 64)


@pytest.mark.parametrize(
    ("rank", "byte", "files"),
    [(0, 9, (0, 2)), (1, 9, (1, 2)), (2, 9, (0, 2)), (2, 63, (1, 2)), (3, 40, (1, 3))],
)
def test_where_pieces_that_overlap_differ_both_files_are_told(tied, rank, byte, files):
    flip(tied / f"rank_{rank}" / f"checkpoint_rank_{rank}-1_1.safetensors", "w", byte)
    a, b = (f"rank_{r}/checkpoint_rank_{r}-1_1.safetensors" for r in files)
    (problem,) = js.verify(tied).problems
    assert problem.startswith(f"w differs between {a} and {b}. ")
    with pytest.raises(CoverageError, match=f"w differs between {a} and {b}"):
        js.merge(tied, tied.parent / "out", **CHECKED)


def test_replicas_of_weights_with_an_adapter_are_compared_as_they_are_stored(tmp_path):
    arrays = {
        "l.q.weight": np.ones((8, 6), np.float32),
        "l.q.lora_a": np.ones((2, 6), np.float32),
        "l.q.lora_b": np.ones((8, 2), np.float32),
    }
    checkpoints.write_folder(tmp_path / "one", arrays)
    layout = js.Layout(2, {n: (Placement((("dp", 2),)),) for n in arrays})
    js.slice(tmp_path / "one", tmp_path / "cut", layout, **QUICK)
    merge_lora(tmp_path / "cut", tmp_path / "out", scaling=2.0, **CHECKED)
    flip(tmp_path / "cut" / "rank_1" / "checkpoint_rank_1-1_1.safetensors", "l.q.weight", 5)
    with pytest.raises(CoverageError, match=r"l\.q\.weight differs between rank_0"):
        merge_lora(tmp_path / "cut", tmp_path / "again", scaling=2.0, **CHECKED)


def test_a_mapped_checkpoint_can_be_either_side_and_not_both(tmp_path):
    checkpoints.write_llama(tmp_path / "one")
    mapped = find_mapping("hf:linen", js.open(tmp_path / "one")).apply(js.open(tmp_path / "one"))
    js.convert(tmp_path / "one", tmp_path / "linen", names="hf:linen", **QUICK)
    assert js.verify(mapped, tmp_path / "linen").problems == ()
    assert js.verify(tmp_path / "linen", mapped).problems == ()
    flip(tmp_path / "linen" / "model.safetensors", next(iter(mapped.tensors)), 3)
    assert len(js.verify(tmp_path / "linen", mapped).problems) == 1
    with pytest.raises(LayoutError, match="are both mapped"):
        js.verify(mapped, mapped)


def test_the_checksum_of_each_file_is_compared_once(cut, tmp_path, monkeypatch):
    js.convert(cut[1], tmp_path / "ckpt", "dp1mp2", format="ckpt", crc=True, fsync=False)
    real, compared = weight_files.check_crc, []

    def counted(folder, path):
        compared.append(path)
        return real(folder, path)

    monkeypatch.setattr(weight_files, "check_crc", counted)
    verdict = js.verify(tmp_path / "ckpt")
    assert not verdict.problems
    assert not any("no checksums" in note for note in verdict.notes)
    assert sorted(compared) == sorted(set(compared))
    assert len(compared) == 2
