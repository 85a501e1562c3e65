"""Names of rank files: what is written is read back as that save, and no other.

The names are made by MindSpore's own rules, written again here: a callback's
``{prefix}[_{task}]-{epoch}_{step}``, with ``_rank_{r}`` in the prefix where MindFormers
saves; a transform's ``{prefix}{r}``; a slice's ``net``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxshard.errors import CoverageError
from jaxshard.formats import rank_names

Namer = Callable[[int], str]

PREFIXES = st.sampled_from(
    [
        "net",
        "checkpoint_",
        "checkpoint",
        "llama2",
        "llama2-",
        "llama2_7b",
        "lora_rank_8",
        "a_1",
        "1",
    ]
) | st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)
RANKS = st.one_of(
    st.integers(1, 13).map(lambda n: list(range(n))),
    st.lists(st.integers(0, 130), min_size=1, max_size=6, unique=True),  # some are missing
)
SAVES = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2)), min_size=1, unique=True
)


def stepped(prefix: str, epoch: int, step: int, task: int, kind: str, *, marked: bool) -> Namer:
    """The name of a callback's file: each job of the same prefix has a number of its own."""
    added = f"_{task}" if task else ""
    rank = "_rank_{r}" if marked else ""
    return lambda r: f"{prefix}{rank.format(r=r)}{added}{kind}-{epoch}_{step}"


def folder(names: dict[int, list[str]], kind: str = "safetensors") -> list[str]:
    return [f"rank_{r}/{name}.{kind}" for r, held in names.items() for name in held]


@settings(max_examples=300, deadline=None)
@given(
    PREFIXES,
    RANKS,
    SAVES,
    st.sampled_from(["", "-network", "-trainable_params"]),
    st.booleans(),
    st.data(),
)
def test_the_newest_save_of_all_ranks_is_read_back(prefix, ranks, saves, kind, marked, data):
    written = {save: set(ranks) for save in saves}
    if len(ranks) > 1 and len(saves) > 1:  # the newest may be on its way, and older ones gone
        for save in data.draw(st.lists(st.sampled_from(saves), max_size=len(saves) - 1)):
            written[save] -= set(data.draw(st.lists(st.sampled_from(ranks), max_size=3)))
    names = {
        r: [
            stepped(prefix, e, s, task, kind, marked=marked)(r)
            for (e, s, task), holders in written.items()
            if r in holders
        ]
        for r in ranks
    }
    if not all(names.values()):
        return
    whole = [save for save, holders in written.items() if len(holders) == len(ranks)]
    tasks = {task for *_, task in saves}
    if not whole:
        with pytest.raises(CoverageError, match="has a file in every one of"):
            rank_names.choose(folder(names))
        return
    epoch, step, task = max(whole)
    found = rank_names.choose(folder(names))
    name = stepped(prefix, epoch, step, task, kind, marked=marked)
    assert found.paths == {r: f"rank_{r}/{name(r)}.safetensors" for r in ranks}
    assert found.step.numbers == (epoch, step)
    for epoch, step, task in whole:
        if kind or (not marked and len(tasks) == 1):
            continue  # a suffix then has the kind in it, or a job's number is taken for the prefix
        suffix = f"_{task}-{epoch}_{step}" if task else f"-{epoch}_{step}"
        name = stepped(prefix, epoch, step, task, kind, marked=marked)
        found = rank_names.choose(folder(names), suffix)
        assert found.paths == {r: f"rank_{r}/{name(r)}.safetensors" for r in ranks}


@settings(max_examples=300, deadline=None)
@given(PREFIXES, RANKS, st.sampled_from(["safetensors", "ckpt"]))
def test_names_that_end_in_the_rank_are_read_back_whatever_the_prefix(prefix, ranks, kind):
    names = {r: [f"{prefix}{r}"] for r in ranks}
    try:
        found = rank_names.choose(folder(names, kind))
    except CoverageError:  # net-1_2 and net-1_3 are steps of MindSpore's: no such prefix is safe
        assert "-" in prefix
        assert prefix.rsplit("-", 1)[1].replace("_", "").isdigit()
        return
    assert found.paths == {r: f"rank_{r}/{prefix}{r}.{kind}" for r in ranks}


@settings(max_examples=200, deadline=None)
@given(PREFIXES, RANKS)
def test_names_alike_in_all_folders_are_read_back(prefix, ranks):
    found = rank_names.choose(folder({r: [prefix] for r in ranks}))
    assert found.paths == {r: f"rank_{r}/{prefix}.safetensors" for r in ranks}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        # the documents' own example, where the step is a rank's number
        ([["example-1_1"]] * 8, ["example-1_1"] * 8),
        ([["example-1_20", "example-2_5"]] * 8, ["example-2_5"] * 8),
        ([[f"example-1_{s}" for s in range(1, 9)]] * 8, ["example-1_8"] * 8),
        ([["example-1_1", "example-1_3", "example_1-1_2"]] * 4, ["example-1_3"] * 4),
        ([["example-1_2", "example_1-1_2"]] * 4, ["example_1-1_2"] * 4),
        # MindSpore's transform, and ours before
        ([[f"net{r}"] for r in range(12)], [f"net{r}" for r in range(12)]),
        ([[f"llama2-{r}"] for r in range(12)], [f"llama2-{r}" for r in range(12)]),
        ([[f"checkpoint{r}"] for r in range(2)], [f"checkpoint{r}" for r in range(2)]),
        ([[f"v1_{r}"] for r in range(12)], [f"v1_{r}" for r in range(12)]),
        ([[f"net-1_{r}"] for r in range(3)], [f"net-1_{r}" for r in range(3)]),
        # a prefix with a rank in it that is another one
        ([["lora_rank_1-1_9", "lora_rank_1-1_10"]] * 3, ["lora_rank_1-1_10"] * 3),
        (
            [[f"lora_rank_1_rank_{r}-1_9", f"lora_rank_1_rank_{r}-1_10"] for r in range(3)],
            [f"lora_rank_1_rank_{r}-1_10" for r in range(3)],
        ),
        # a prefix that ends in a number, and its second job
        ([["llama_2-1_10", "llama_2_1-1_10"]] * 2, ["llama_2_1-1_10"] * 2),
        # saved when training broke off
        ([["net-1_9", "net-1_10_breakpoint"]] * 2, ["net-1_10_breakpoint"] * 2),
        # one rank alone
        ([["net-1_9", "net-1_10"]], ["net-1_10"]),
        ([["net_rank_0-1_9", "net_rank_0-1_10"]], ["net_rank_0-1_10"]),
    ],
)
def test_names_are_read_by_the_names_of_all_ranks(names, wanted):
    found = rank_names.choose(folder(dict(enumerate(names))))
    assert found.paths == {r: f"rank_{r}/{name}.safetensors" for r, name in enumerate(wanted)}


def test_a_file_of_another_rank_is_passed_over_with_a_note():
    names = {r: [f"net_rank_{r}-1_10"] for r in range(2)}
    names[1].append("net_rank_0-1_20")
    found = rank_names.choose(folder(names))
    assert found.paths == {r: f"rank_{r}/net_rank_{r}-1_10.safetensors" for r in range(2)}
    (note,) = found.notes
    assert note == "rank_1/net_rank_0-1_20.safetensors is named after rank 0; it is skipped."


def test_one_name_of_a_rank_in_all_folders_is_noted():
    names = folder({r: ["net_rank_0-1_10"] for r in range(2)})
    (note,) = rank_names.choose(names).notes
    assert "If these are copies of one rank, fetch the others." in note
    assert not rank_names.choose(folder({r: ["lora_rank_8-1_10"] for r in range(4)})).notes


@pytest.mark.parametrize(
    "names",
    [
        {0: ["net_rank_1-1_10"], 1: ["net_rank_0-1_10"]},  # exchanged
        {0: ["net_rank_0-1_10"], 1: ["net_rank_1-1_20"]},
        {0: ["checkpoint_0"], 1: ["checkpoint_0_old", "checkpoint_2"]},
        {0: ["net-1_10"], 1: ["net-1_11"]},  # each has a step that the other has not
        {0: ["example-1_3"], 1: ["example-1_1"], 2: ["example-1_2"]},
    ],
)
def test_files_of_several_steps_or_ranks_are_never_taken_together(names):
    with pytest.raises(CoverageError, match="no step has a file in every one of"):
        rank_names.choose(folder(names))


def test_prefixes_are_not_compared_as_steps():
    names = folder({r: [f"llama2_{r}", f"llama3_{r}"] for r in range(4)})
    with pytest.raises(CoverageError, match="of the same step"):
        rank_names.choose(names)
    for prefix in ("llama2", "llama3"):
        found = rank_names.choose(names, f"{prefix}_")
        assert found.paths == {r: f"rank_{r}/{prefix}_{r}.safetensors" for r in range(4)}
