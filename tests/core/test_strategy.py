"""Strategies: what a text means, and how its ranks are numbered."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.core.layout import Strategy
from jaxshard.errors import LayoutError

sizes = st.integers(1, 8)


@given(sizes, sizes, sizes, sizes, sizes, st.sampled_from([-1, 1, 2, 4]), st.sampled_from([1, 2]))
def test_a_strategy_is_read_as_it_is_written(dp, fsdp, mp, pp, cp, opt, ep):
    made = Strategy(dp=dp * ep, fsdp=fsdp, mp=mp, pp=pp, cp=cp, ep=ep, optimizer_shard=opt)
    assert Strategy.parse(str(made)) == made
    assert eval(repr(made)) == made
    assert made.num_ranks == dp * fsdp * ep * mp * pp * cp


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("mp8", Strategy(mp=8)),
        ("tp8", Strategy(mp=8)),
        (" DP2MP4 ", Strategy(dp=2, mp=4)),
        ("pp2dp3", Strategy(dp=3, pp=2)),
        ("dp4mp2ep2", Strategy(dp=4, mp=2, ep=2)),
        ("dp2mp2optall", Strategy(dp=2, mp=2, optimizer_shard=-1)),
        ("dp4opt2", Strategy(dp=4, optimizer_shard=2)),
        ("fsdp4mp2", Strategy(fsdp=4, mp=2)),
        ("mp2fsdp4dp2", Strategy(dp=2, fsdp=4, mp=2)),
    ],
)
def test_axes_come_in_any_order_and_case(text, strategy):
    assert Strategy.parse(text) == strategy


@pytest.mark.parametrize(
    "text",
    ["", "full", "dp", "2dp", "dp2dp3", "mp2tp2", "dp2,mp4", "dp-1", "mpall", "dp2x", "dp²", "dp٢"],
)
def test_what_is_no_strategy_is_refused_with_examples(text):
    with pytest.raises(LayoutError, match=r"is not a strategy.*dp2mp4"):
        Strategy.parse(text)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp": 0}, "dp=0; it must be 1 or more"),
        ({"fsdp": 0}, "fsdp=0; it must be 1 or more"),
        ({"dp": 4, "ep": 3}, "ep=3 does not divide dp=4"),
        ({"optimizer_shard": 0}, "optimizer_shard=0"),
        ({"dp": 2**11, "mp": 2**11}, "4194304 ranks"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(LayoutError, match=message):
        Strategy(**sizes)


def test_the_text_of_an_error_is_short_however_long_the_input():
    with pytest.raises(LayoutError) as caught:
        Strategy.parse("dp" + "9" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["fsdp4mp2", "fsdp8", "dp2fsdp4mp2pp2", "dp4fsdp2ep2optall"])
def test_a_fully_sharded_strategy_is_written_without_the_axes_that_it_lacks(text):
    assert str(Strategy(text)) == text


def test_fully_sharded_ranks_are_between_the_replicas_and_the_tensor_parallel_ones():
    made = Strategy("dp2fsdp4mp2cp2pp2")
    assert made.stage_axes == (("dp", 2), ("fsdp", 4), ("cp", 2), ("mp", 2))
    assert made.mesh_axes.axes == (("pp", 2), *made.stage_axes)
    experts = Strategy("dp4fsdp2mp2ep2")
    assert experts.stage_axes == (("ep", 2), ("edp", 2), ("fsdp", 2), ("mp", 2))
    assert experts.mesh_axes.named("dp") == ("ep", "edp", "fsdp")


def test_tensor_parallel_ranks_are_neighbours_and_stages_far_apart():
    """Rank = ((stage * dp) + dp rank) * mp + mp rank: the order of MindSpore and Megatron."""
    made = Strategy.parse("dp2mp4pp2")
    assert made.stage_axes == (("dp", 2), ("mp", 4))
    numbers = np.arange(made.num_ranks).reshape(made.pp, *(n for _, n in made.stage_axes))
    assert numbers[1, 0, 2] - numbers[1, 0, 1] == 1
    assert numbers[1, 1, 0] - numbers[1, 0, 0] == 4
    assert numbers[1, 0, 0] - numbers[0, 0, 0] == made.stage_ranks == 8


def test_experts_are_the_slow_part_of_data_parallel_ranks():
    assert Strategy.parse("dp4mp2ep2cp3").stage_axes == (
        ("ep", 2),
        ("edp", 2),
        ("cp", 3),
        ("mp", 2),
    )


def test_a_strategy_may_be_written_as_text_or_with_tp():
    assert Strategy("dp2mp4") == Strategy(dp=2, tp=4) == Strategy.parse("dp2tp4")
    assert replace(Strategy("dp2mp4"), dp=1) == Strategy(mp=4)
    assert pickle.loads(pickle.dumps(Strategy("dp2mp4"))) == Strategy("dp2mp4")
    assert {Strategy("mp4"): 1}[Strategy(tp=4)] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Strategy("dp2", pp=2), r"'dp2' and pp=2 are both given"),
        (lambda: Strategy("dp2", vocab_emb_dp=True), "vocab_emb_dp=True"),
        (lambda: Strategy(mp=4, tp=4), "mp=4 and tp=4 are the same axis"),
        (lambda: Strategy(2), "'2' is not a strategy"),
        (lambda: Strategy(""), "'' is not a strategy"),
    ],
    ids=["text and axis", "text and flag", "mp and tp", "a number", "nothing"],
)
def test_a_strategy_is_said_in_one_way(make, message):
    with pytest.raises(LayoutError, match=message):
        make()
