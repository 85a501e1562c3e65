"""Verify: what is wrong is found and named, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import checkpoints
import numpy as np
import pytest

import jaxshard as js

QUICK = js.Options(durable=False)


@pytest.fixture
def cut(tmp_path):
    """A checkpoint, and the same cut for 2 x 2 ranks."""
    checkpoints.write_llama(tmp_path / "one")
    js.slice(tmp_path / "one", tmp_path / "cut", "dp2mp2", options=QUICK)
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
    flip(cut[1] / "rank_3" / "checkpoint_3.safetensors", "lm_head.weight", 5)
    assert js.verify(cut[1]).problems == (
        "lm_head.weight differs between rank_1/checkpoint_1.safetensors and "
        "rank_3/checkpoint_3.safetensors.",
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_values_that_differ_are_told_with_their_place(cut, rank):
    """Whichever replica it is in; rank 1 and 3 hold rows 16 to 32 of the head."""
    path = cut[1] / f"rank_{rank}" / f"checkpoint_{rank}.safetensors"
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
