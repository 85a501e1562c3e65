"""The layout file: what is written is read back, and nothing damaged is believed."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from random_layouts import models

from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import FormatError
from jaxshard.formats import strategy_layouts
from jaxshard.formats.folder import MemoryFolder

LAYOUT = Layout(
    8,
    {"w": (Placement((("mp", 2),), (("mp",), ()), 2),), "n": (Placement((("all", 8),)),)},
    (("dp", 4), ("mp", 2)),
)


def read(data: bytes) -> Layout:
    return strategy_layouts.read_layout_file(MemoryFolder({"layout.json": data}), "layout.json")


@given(models(num_layouts=1))
def test_a_layout_is_read_as_it_was_written(model):
    (layout,) = model.layouts
    assert read(strategy_layouts.layout_file_bytes(layout, layout.placements)) == layout


def test_it_is_found_in_a_folder_and_alone_and_not_by_its_name_only():
    data = strategy_layouts.layout_file_bytes(LAYOUT, LAYOUT.placements)
    assert (
        strategy_layouts.find_layout_file(MemoryFolder({"layout.json": data, "other": b""}))
        == "layout.json"
    )
    assert strategy_layouts.find_layout_file(MemoryFolder({"mine.json": data})) == "mine.json"
    assert strategy_layouts.find_layout_file(MemoryFolder({"layout.json": b"{}"})) is None
    assert strategy_layouts.find_layout_file(MemoryFolder({"below/layout.json": data})) is None


def changed(path: list, value: object) -> bytes:
    told = json.loads(strategy_layouts.layout_file_bytes(LAYOUT, LAYOUT.placements))
    at = told
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(told).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["jaxshard_layout"], 2),
        (["num_ranks"], 0),
        (["num_ranks"], 2**40),
        (["num_ranks"], True),
        (["stage_axes"], [["dp", 0]]),
        (["stage_axes"], [["dp", 2**60]]),
        (["placements"], {}),
        (["placements", 0, "first_rank"], 7),
        (["placements", 0, "first_rank"], -1),
        (["placements", 0, "axes"], [["mp", 2], ["mp", 2]]),
        (["placements", 0, "spec"], [["dp"]]),
        (["placements", 0, "spec"], [["mp"], ["mp"]]),
        (["placements", 0, "spec"], "mp"),
        (["tensors", "w"], [2]),
        (["tensors", "w"], [-1]),
        (["tensors", "w"], []),
        (["tensors", "w"], [0, 1]),
        (["tensors"], []),
    ],
)
def test_what_is_no_layout_is_refused(path, value):
    with pytest.raises(FormatError, match=r"^layout.json"):
        read(changed(path, value))


def test_random_damage_is_refused_or_harmless():
    rng, data = random.Random(0), strategy_layouts.layout_file_bytes(LAYOUT, LAYOUT.placements)
    for _ in range(2000):
        spoiled = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        try:
            found = read(bytes(spoiled))
        except FormatError:
            continue
        assert all(p.ranks.stop <= found.num_ranks for ps in found.placements.values() for p in ps)
