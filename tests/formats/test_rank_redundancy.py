"""Who keeps a shard: MindSpore's rule, written again here from what its loader does.

For each parameter of a stage: the groups of ranks that hold the same slice. Names sorted;
those with the same groups form a list; the i-th of the list goes to ``group[i % len(group)]``.
All parameters of the network count, also those that no file has.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from pathlib import Path

import mindspore_files as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore_ranks import QUICK, held_by, write_ranks, write_strategy

import jaxshard as js
from jaxshard.core.layout import Layout, Placement

AXES = (("dp", 2), ("cp", 2), ("mp", 2))
SPECS = [(), (("mp",),), ((), ("mp",)), (("dp",), ("mp",)), (("cp",),), (("dp", "cp"), ("mp",))]
STATES = ("adam_m.", "adam_v.", "accu_grads.")


def slices_of(placement: Placement) -> dict[int, tuple[int, ...]]:
    """Which part of each dim each rank of a stage has, the last axis varying fastest."""
    found = {}
    sizes = [n for _, n in placement.axes]
    for number, at in enumerate(product(*map(range, sizes))):
        where = dict(zip((a for a, _ in placement.axes), at, strict=True))
        index = []
        for axes in placement.spec:
            part = 0
            for axis in axes:
                part = part * dict(placement.axes)[axis] + where[axis]
            index.append(part)
        found[placement.first_rank + number] = tuple(index)
    return found


def keeps(layout: Layout) -> dict[int, set[str]]:
    """The names that each rank keeps, by MindSpore's rule."""
    alike: dict[tuple[tuple[int, ...], ...], list[str]] = defaultdict(list)
    for name in sorted(layout.placements):
        for placement in layout.placements[name]:
            groups = defaultdict(list)
            for rank, index in slices_of(placement).items():
                groups[index].append(rank)
            alike[tuple(map(tuple, groups.values()))].append(name)
    found: dict[int, set[str]] = defaultdict(set)
    for groups, names in alike.items():
        for turn, name in enumerate(names):
            for group in groups:
                found[group[turn % len(group)]].add(name)
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(SPECS), min_size=3, max_size=8),
    st.integers(1, 3),
    st.sets(st.sampled_from(STATES), min_size=1),
    st.sampled_from(["", "adam_v."]),
    st.data(),
)
def test_turns_are_those_of_all_names_of_the_strategy(
    tmp_path_factory: pytest.TempPathFactory, specs, stages, states, drop, data
):
    base: Path = tmp_path_factory.mktemp("ranks")
    names = [f"layers.{i}.weight" for i in range(len(specs) * stages)]
    placements = {
        f"{state}{name}": (Placement(AXES, specs[i % len(specs)], 8 * (i // len(specs))),)
        for i, name in enumerate(names)
        for state in ("", *states)
    }
    layout = Layout(8 * stages, placements)
    saved = data.draw(st.sets(st.sampled_from(sorted(states))))  # accu_grads are never saved
    arrays = {
        name: np.arange(64, dtype=np.float32).reshape(8, 8)
        for name in placements
        if name in names or any(name.startswith(s) for s in saved)
    }
    write_strategy(base / "strategy", layout, {n: np.empty((8, 8)) for n in placements})
    write_ranks(
        base / "c",
        lambda r: held_by(r, arrays, layout) | {"step": np.ones(1)},
        ranks=range(8 * stages),
    )
    how = {**QUICK, "remove_redundancy": True, "drop_prefix": [drop] if drop else []}
    js.convert(base / "c", base / "o", "same", keep_accu_grads=True, **how)
    js.convert(base / "o", base / "again", "same", keep_accu_grads=True, **how)
    wanted = keeps(layout)
    taken = {n for n in arrays if not (drop and n.startswith(drop))}
    for out in ("o", "again"):
        for rank, held in ms.rank_weights_of(base / out).items():
            assert held.keys() - {"step"} == wanted[rank] & taken, (out, rank)


def test_the_rule_of_this_file_is_mindspores(tmp_path: Path) -> None:
    """Of ranks (0, 2) and (1, 3), alphabetical names take turns."""
    rows = (Placement((("dp", 2), ("mp", 2)), (("mp",),)),)
    found = keeps(Layout(4, {"w2": rows, "w1": rows, "adam_m.w1": rows}))
    assert found == {0: {"adam_m.w1", "w2"}, 1: {"adam_m.w1", "w2"}, 2: {"w1"}, 3: {"w1"}}
