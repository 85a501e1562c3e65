"""What the training loop's checkpoints decide, without a file or a device."""

from __future__ import annotations

import json
import random
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.errors import FormatError, LayoutError
from jaxshard.storage import checksums
from jaxshard.training import records
from jaxshard.training.policy import (
    Cadence,
    Lineage,
    Progress,
    ResumePoint,
    RetentionPolicy,
    resume_point,
)
from jaxshard.training.records import (
    NETWORK,
    TRAINABLE,
    RankFile,
    StepName,
)

# --- where a run resumes -----------------------------------------------------------------

FORTY = Progress(epoch_num=20, step_num=40, global_step=40, global_batch_size=16)


def test_without_any_change_a_run_goes_on_where_it_was_and_skips_what_it_saw():
    assert resume_point(FORTY) == ResumePoint(20, 40, 40, 40)


def test_a_new_data_set_is_read_from_its_start():
    point = resume_point(FORTY, ignore_data_skip=True)
    assert (point.initial_step, point.data_skip_steps) == (40, 0)


def test_a_new_data_set_that_was_begun_goes_on_behind_what_was_used_of_it():
    point = resume_point(FORTY, data_skip_steps=2)
    assert (point.initial_step, point.data_skip_steps) == (40, 2)


def test_a_doubled_batch_halves_the_steps_and_the_caller_halves_the_data_he_skips():
    point = resume_point(FORTY, global_batch_size=32, data_skip_steps=1, sink_mode=True)
    assert point == ResumePoint(10, 20, 20, 1)


def test_ignoring_data_wins_over_a_number_of_batches():
    assert resume_point(FORTY, ignore_data_skip=True, data_skip_steps=5).data_skip_steps == 0


@pytest.mark.parametrize(
    ("steps", "before", "now", "expected"),
    [
        (40, 16, 32, 20),
        (41, 16, 32, 20),  # rounded down: the half step is done again
        (40, 32, 16, 80),
        (49, 1, 49, 1),  # in floating point 49 * (1 / 49) is less than 1
        (40, 16, 16, 40),
    ],
)
def test_steps_scale_with_the_batch(steps, before, now, expected):
    saved = Progress(1, steps, steps, before)
    point = resume_point(saved, global_batch_size=now)
    assert (point.initial_step, point.global_step) == (expected, expected)
    assert point.data_skip_steps == expected


def test_an_epoch_that_was_broken_off_is_gone_on_with():
    saved = Progress(epoch_num=3, step_num=25, global_step=25)
    assert resume_point(saved, steps_per_epoch=10).initial_epoch == 2
    assert resume_point(Progress(3, 30, 30), steps_per_epoch=10).initial_epoch == 3


def test_without_a_recorded_batch_nothing_is_scaled():
    assert resume_point(Progress(1, 7, 7), global_batch_size=8).initial_step == 7


@pytest.mark.parametrize(
    "wrong",
    [{"global_batch_size": 0}, {"data_skip_steps": -1}, {"steps_per_epoch": 0}],
)
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(LayoutError, match=next(iter(wrong))):
        resume_point(FORTY, **wrong)


@given(st.integers(0, 10**6), st.integers(1, 4096), st.integers(1, 4096))
def test_no_sample_is_skipped_that_was_not_seen(steps, before, now):
    point = resume_point(Progress(1, steps, steps, before), global_batch_size=now)
    assert point.data_skip_steps * now <= steps * before < (point.data_skip_steps + 1) * now


# --- when to save, and what to keep --------------------------------------------------------


def test_saving_is_due_by_steps_or_by_seconds_whichever_comes_first():
    cadence = Cadence(every_steps=100, every_seconds=60)
    due = [
        (step, now)
        for step, now in [(1, 1.0), (50, 59.9), (51, 60.0), (99, 70.0), (100, 71.0)]
        if cadence.is_due(step, now=now, last_step=None, last_time=0.0)
    ]
    assert due == [(51, 60.0), (99, 70.0), (100, 71.0)]


def test_a_step_is_not_saved_twice():
    assert not Cadence(every_steps=10).is_due(10, now=0, last_step=10, last_time=0)


def test_by_default_nothing_is_ever_due():
    assert not any(Cadence().is_due(n, now=9e9, last_step=0, last_time=0) for n in range(1, 100))


@pytest.mark.parametrize("wrong", [{"every_steps": -1}, {"every_seconds": -0.5}])
def test_a_negative_cadence_is_refused(wrong):
    with pytest.raises(LayoutError, match="negative"):
        Cadence(**wrong)


def _steps(*numbers):
    return {StepName(1, n): n for n in numbers}


@pytest.mark.parametrize(
    ("past", "left", "keep", "gone"),
    [
        ((10, 20, 30), (), {"keep_max": 2}, [10]),
        ((10, 20, 30), (), {"keep_max": 3}, []),
        ((10, 20, 30), (), {}, []),  # 0 keeps all
        ((10, 20, 30, 40, 50), (), {"keep_max": 1, "keep_every": 20}, [10, 30]),
        ((10, 20), (60, 70, 80), {"keep_max": 1}, [10]),  # 60 to 80 are of a run left behind
        ((10, 20), (60, 70, 80), {"keep_max": 2}, []),
        ((10, 20, 65), (60, 70, 80), {"keep_max": 2}, [60, 10]),  # which has got beyond 60
        ((10, 20, 95), (60, 70, 80), {"keep_max": 5}, [60]),
        ((100, 150, 80), (), {"keep_max": 2}, [100]),  # counted anew, with a larger batch
    ],
)
def test_the_oldest_whole_steps_go(past, left, keep, gone):
    found = RetentionPolicy(**keep).expired(_steps(*past), _steps(*left))
    assert [s.step for s in found] == gone


def test_keeping_every_nth_step_counts_over_epochs():
    steps = {StepName(1, 10): 10, StepName(2, 5): 15, StepName(2, 10): 20, StepName(3, 5): 25}
    assert RetentionPolicy(1, 10).expired(steps, {}) == (StepName(2, 5),)


@given(
    st.lists(st.integers(1, 60), min_size=1, unique=True),
    st.sets(st.integers(61, 90)),
    st.integers(0, 8),
    st.integers(0, 7),
)
def test_the_step_just_saved_and_enough_others_always_stay(past, left, most, every):
    gone = {
        s.step for s in RetentionPolicy(most, every).expired(_steps(*past), _steps(*sorted(left)))
    }
    assert past[-1] not in gone
    assert not gone & left  # of which the run has reached none
    assert len([n for n in past if n not in gone]) >= min(most or 99, len(past))
    assert gone <= set(past[: -most or None])


# --- names --------------------------------------------------------------------------------


def test_names_are_those_of_mindformers():
    step = StepName(1, 10)
    assert records.rank_file("llama", 0, step) == "rank_0/llama_rank_0-1_10.safetensors"
    assert (
        records.rank_file("llama", 7, step, NETWORK)
        == "rank_7/llama_rank_7-network-1_10.safetensors"
    )
    assert (
        records.rank_file("llama", 7, step, TRAINABLE)
        == "rank_7/llama_rank_7-trainable_params-1_10.safetensors"
    )
    assert records.iteration_folder(10) == "iteration_00000010"


def test_meta_json_is_byte_for_byte_what_json_dump_writes():
    said = records.meta_json("llama", 3, StepName(2, 5))
    assert (
        said == b'{"last_epoch": 2, "last_step": 5, "last_ckpt_file": '
        b'"llama_rank_3-2_5.safetensors"}'
    )


@given(st.integers(1, 10**6), st.none() | st.integers(1, 1000))
def test_step_numbers_are_within_their_epoch_and_count_from_one(number, per_epoch):
    name = records.step_name(number, per_epoch)
    if per_epoch is None:
        assert name == StepName(1, number)
    else:
        assert 1 <= name.step <= per_epoch
        assert (name.epoch - 1) * per_epoch + name.step == number


@given(st.sampled_from([records.CHECKPOINT, NETWORK, TRAINABLE]), st.integers(0, 9999))
def test_what_is_named_is_recognised(kind, rank):
    step = StepName(3, 14)
    path = records.rank_file("net-v2_rank_1", rank, step, kind)
    assert records.parse_rank_file(path, kind) == RankFile(rank, "net-v2_rank_1", step)


@pytest.mark.parametrize(
    "path",
    [
        "rank_0/llama_rank_1-1_10.safetensors",  # another rank's
        "rank_0/llama-1_10.safetensors",
        "rank_0/llama_rank_0-network-1_10.safetensors",  # of another kind
        "rank_0/sub/llama_rank_0-1_10.safetensors.tmp",
        "rank_0/meta.json",
    ],
)
def test_other_files_are_not_taken_for_a_ranks(path):
    assert records.parse_rank_file(path) is None


def test_a_file_of_a_second_task_is_recognised():
    found = records.parse_rank_file("rank_0/llama_rank_0_1-2_5.safetensors")
    assert found == RankFile(0, "llama", StepName(2, 5), task=1)


def test_mindformers_default_files_are_recognised():
    found = records.parse_rank_file("rank_0/llama_rank_0-2_5.ckpt")
    assert found == RankFile(0, "llama", StepName(2, 5), extension="ckpt")


@pytest.mark.parametrize("wish", ["latest", "", "1-10", True, 1.5, object()])
def test_what_names_no_step_is_refused(wish):
    with pytest.raises(LayoutError, match="is not a step"):
        records.parse_step_argument(wish)


@pytest.mark.parametrize("prefix", ["", "../x", "a/b", ".hidden", "a\0"])
def test_a_prefix_cannot_lead_elsewhere(prefix):
    with pytest.raises(LayoutError, match="prefix"):
        records.check_prefix(prefix)


# --- what is kept beside the data ----------------------------------------------------------


def _record() -> records.Record:
    sums = checksums.FileSums(6, ((0, 4, 11), (4, 2, 22)))
    return records.Record(
        StepName(2, 5),
        15,
        "ranks",
        "crc32",
        ("checkpoint/rank_0/a.safetensors",),
        {"checkpoint/rank_0/a.safetensors": sums},
        ".jaxshard/strategy-1",
        {"data": {"file": 3, "at": 0.1}, "text": "é"},
        {"step_num": 15, "loss_scale": 0.5},
        1700000000.25,
        Lineage(7, ((3, 4), (6, 6))),
    )


def test_a_record_comes_back_as_it_was():
    record = _record()
    assert records.from_bytes(records.to_bytes(record), "r") == record


def test_a_record_of_before_saves_were_counted_is_read():
    said = json.loads(records.to_bytes(_record()).split(b"\n")[0])
    del said["order"], said["left"]
    line = json.dumps(said).encode()
    assert records.from_bytes(line + b"\n%08x\n" % zlib.crc32(line), "r").lineage == Lineage()


def test_no_single_flipped_bit_of_a_record_goes_unnoticed():
    data = records.to_bytes(_record())
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            records.from_bytes(bytes(flipped), "r")


def test_no_shortened_record_goes_unnoticed():
    data = records.to_bytes(_record())
    for length in range(len(data)):
        with pytest.raises(FormatError):
            records.from_bytes(data[:length], "r")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("units", ["../outside"]),
        ("units", ["/etc/passwd"]),
        ("units", ["a/../../b"]),
        ("order", -1),
        ("left", [[1]]),
        ("left", 3),
        ("epoch", -1),
        ("epoch", True),
        ("files", {"a": [6, [[0, 4, 1]]]}),  # two bytes without a checksum
        ("files", {"a": [6, [[0, 4, 1], [3, 3, 1]]]}),
        ("files", None),
        ("extras", 3),
    ],
)
def test_a_record_that_says_impossible_things_is_refused(key, value):
    said = json.loads(records.to_bytes(_record()).split(b"\n")[0]) | {key: value}
    line = json.dumps(said).encode()
    with pytest.raises(FormatError):
        records.from_bytes(line + b"\n%08x\n" % zlib.crc32(line), "r")


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, (1, 2), object(), b"x", {"a": {2}}])
def test_extras_that_json_would_change_are_refused(value):
    with pytest.raises(LayoutError, match="extras"):
        records.check_extras({"it": value})


@pytest.mark.parametrize("name", list(checksums.ALGORITHMS))
def test_checksums_find_every_single_flipped_bit(name):
    random.seed(1)
    data = random.randbytes(600)
    gathered = checksums.Gathered(name)
    for start in (300, 0, 500):  # chunks come in any order
        gathered.add("f", start, memoryview(data)[start : {0: 300, 300: 500, 500: 600}[start]])
    sums = gathered.of("f", 600)
    assert checksums.first_difference(sums, gathered.compute, lambda o, n: data[o : o + n]) is None
    for bit in range(0, 4800, 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        at = checksums.first_difference(
            sums, gathered.compute, lambda o, n, b=bytes(flipped): b[o : o + n]
        )
        assert at == max(s for s in (0, 300, 500) if s <= bit // 8)


def test_a_file_that_was_not_covered_is_not_called_whole():
    gathered = checksums.Gathered("crc32")
    gathered.add("f", 0, b"abc")
    with pytest.raises(FormatError, match="3 bytes of 4"):
        gathered.of("f", 4)


def test_checksums_of_a_kind_that_nothing_here_computes_are_refused(monkeypatch):
    monkeypatch.setattr(checksums, "ALGORITHMS", {"crc32": zlib.crc32})
    with pytest.raises(LayoutError, match="pip install google-crc32c"):
        checksums.algorithm("crc32c")
    with pytest.raises(FormatError, match="md5"):
        checksums.algorithm("md5")


def test_crc32c_is_the_one_with_the_published_check_value():
    assert checksums.BEST == "crc32c"
    assert checksums.algorithm("crc32c")(b"123456789") == 0xE3069283


@pytest.mark.parametrize("with_numpy", [True, False])
def test_google_crc32c_sums_bytes_and_writable_views_alike(with_numpy, monkeypatch):
    pytest.importorskip("google_crc32c")
    monkeypatch.setitem(sys.modules, "crc32c", None)  # as where it is not installed
    if not with_numpy:
        monkeypatch.delitem(sys.modules, "numpy")
    compute = checksums._find_crc32c()
    writable = memoryview(bytearray(b"123456789"))
    assert [compute(b"123456789"), compute(writable), compute(writable[:0])] == [0xE3069283] * 2 + [
        0
    ]
    assert compute(memoryview(bytearray(8)).cast("d")) == compute(bytes(8))
