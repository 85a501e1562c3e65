"""Real MindSpore checkpoints, merged and cut again: what comes out is the truth.

The truth is the manifest beside the files. Where MindSpore's own tools are wrong, and a
few of their outputs are kept because they are, ours are held against the truth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mindspore_files as ms
import numpy as np
import pytest
from golden_files import HERE, LAYOUTS, golden, manifest

import jaxshard as js
from jaxshard.conversion.open import open_strategy
from jaxshard.core.layout import Layout
from jaxshard.errors import CoverageError

FULL_SET = Path(os.environ.get("JAXSHARD_GOLDEN", "/nowhere"))
QUICK = {"fsync": False, "workers": 1}
SOURCES = ("src_safetensors", "src_safetensors_dedup", "src_safetensors_dedup_right", "src_ckpt")
LOSSY = {("dp2cp2mp2_2axis", "src_safetensors_dedup")}
TWO_AXES = "dp2cp2mp2_2axis"


def sources() -> list[tuple[str, str]]:
    """(layout, folder) of every checkpoint that holds all of its model."""
    right = {(TWO_AXES, "src_safetensors_dedup_right")}
    pairs = [(n, s) for n in LAYOUTS for s in SOURCES if not s.endswith("_right")]
    return sorted({*pairs, *right} - LOSSY)


def targets() -> list[tuple[str, str]]:
    """(layout, strategy file) of every target there is."""
    found = [(p.parent.parent.name, p.name) for p in HERE.glob("dp*/targets/*_strategy.ckpt")]
    assert len(found) > 30
    return sorted(found)


@cache
def full(name: str) -> ms.Tensors:
    return ms.weights(golden(name, "full", "full.safetensors"))


def cut(
    tensors: ms.Tensors, layout: Layout, rank: int, scalars: Mapping[str, object]
) -> ms.Tensors:
    """What ``rank`` holds of complete tensors, cut by NumPy."""
    found: ms.Tensors = {}
    for name, (dtype, shape, data) in tensors.items():
        if name in scalars:
            found[name] = (dtype, shape, data)
        elif (box := layout.box_of(name, shape, rank)) is not None:
            array = np.frombuffer(data, f"V{ms.ITEM_BYTES[dtype]}").reshape(shape)
            found[name] = (dtype, box.shape, array[box.slices].tobytes())
    return found


@pytest.mark.parametrize(("name", "source"), sources())
def test_a_merge_is_the_truth(name: str, source: str, tmp_path: Path) -> None:
    js.merge(golden(name, source), tmp_path / "whole", **QUICK)
    merged = ms.hashed(ms.folder_weights(tmp_path / "whole"))
    assert merged == ms.truth(name, states=source != "src_ckpt")


@pytest.mark.parametrize(("name", "source"), [(TWO_AXES, s) for s in SOURCES if "dedup" in s])
def test_what_mindspore_merges_wrongly_is_merged_right_or_refused(
    name: str, source: str, tmp_path: Path
) -> None:
    """It takes tensors whose dim two axes split for replicas, drops them, and repeats one."""
    if (name, source) in LOSSY:
        with pytest.raises(CoverageError, match=r"1536 elements, of which the source holds 384"):
            js.merge(golden(name, source), tmp_path / "whole", **QUICK)
    else:
        js.merge(golden(name, source), tmp_path / "whole", **QUICK)
        assert ms.hashed(ms.folder_weights(tmp_path / "whole")) == ms.truth(name)


@pytest.mark.parametrize(("name", "target"), targets())
@pytest.mark.parametrize("source", ["full", "src_safetensors_dedup"])
def test_slices_and_conversions_to_every_target_are_the_truth(
    name: str, target: str, source: str, tmp_path: Path
) -> None:
    if name == TWO_AXES and "dedup" in source:
        source += "_right"
    where = golden(name, "full", "full.safetensors") if source == "full" else golden(name, source)
    strategy = golden(name, "targets", target)
    layout = open_strategy(strategy)
    adam = any(n.startswith("adam_") for n in layout.placements)
    drop = () if adam else "adam_"
    report = js.convert(where, tmp_path / "o", strategy, **QUICK, drop_prefix=drop)
    ranks = ms.rank_weights_of(tmp_path / "o")
    assert len(ranks) == layout.num_ranks == report.num_files
    wanted = {n: t for n, t in full(name).items() if adam or not n.startswith("adam_")}
    for rank, held in ranks.items():
        assert held == cut(wanted, layout, rank, manifest(name)["hyper"]), rank


def test_the_same_check_fails_for_another_rank(tmp_path: Path) -> None:
    strategy = golden("dp2mp2pp2", "targets", "dp1mp4_strategy.ckpt")
    js.convert(golden("dp2mp2pp2", "src_ckpt"), tmp_path / "o", strategy, **QUICK)
    held, layout = ms.rank_weights_of(tmp_path / "o")[1], open_strategy(strategy)
    wanted = {n: t for n, t in full("dp2mp2pp2").items() if not n.startswith("adam_")}
    assert held == cut(wanted, layout, 1, manifest("dp2mp2pp2")["hyper"])
    assert held != cut(wanted, layout, 2, manifest("dp2mp2pp2")["hyper"])


@pytest.mark.parametrize("target", ["dp2mp2pp2", "dp1mp2pp2"])
def test_more_stages_than_ranks_in_a_stage_of_the_source_are_no_matter(
    target: str, tmp_path: Path
) -> None:
    """MindSpore's transform raises for these two, with half of the output written."""
    strategy = golden(target, "targets", "dp1mp1pp4_strategy.ckpt")
    js.convert(golden(target, "src_safetensors"), tmp_path / "o", strategy, **QUICK)
    layout, scalars = open_strategy(strategy), manifest(target)["hyper"]
    assert len(layout.placements) > 80
    for rank, held in ms.rank_weights_of(tmp_path / "o").items():
        assert held == cut(full(target), layout, rank, scalars)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("format", "target"), [("ranks", "strategy"), ("ckpt", "strategy"), ("ranks", "same")]
)
@pytest.mark.parametrize("drop", ["", "adam_"])
def test_each_rank_keeps_what_mindspore_has_it_keep(
    name: str, format: str, target: str, drop: str, tmp_path: Path
) -> None:
    """Its loader works out who keeps what, over all names of the network, and looks there only."""
    to = golden(name, "strategy") if target == "strategy" else "same"
    how = {**QUICK, "remove_redundancy": True, "format": format}
    how["drop_prefix"] = [drop] if drop else []
    js.convert(golden(name, "src_safetensors"), tmp_path / "o", to, **how)
    right = "_right" if name == TWO_AXES else ""  # where MindSpore itself loses data
    theirs = ms.rank_weights_of(golden(name, f"src_safetensors_dedup{right}"))
    js.convert(tmp_path / "o", tmp_path / "again", "same", **how)  # by the strategy of the first
    for out in ("o", "again"):
        ours = ms.rank_weights_of(tmp_path / out)
        assert ours.keys() == theirs.keys()
        for rank, held in theirs.items():
            wanted = {n: t for n, t in held.items() if not (drop and n.startswith(drop))}
            assert ours[rank] == wanted, rank


# --- against what MindSpore itself made --------------------------------------------------


def calls(name: str) -> dict[str, Any]:
    """What was asked of MindSpore and how it went; only the full set tells."""
    place = FULL_SET / name / "manifest.json"
    return json.loads(place.read_text())["calls"] if place.exists() else {}


def outputs(kind: str) -> list[tuple[str, str]]:
    """(layout, call) of MindSpore's outputs that are right; the small set has no others."""
    found = {(p.parent.name, p.name) for p in HERE.glob(f"dp*/{kind}*")}
    for name in LAYOUTS:
        for call, told in calls(name).items():
            verdict = told.get("vs_full") or told.get("vs_expected") or {}
            right = verdict.get("ok") or verdict.get("all_ok")
            if call.startswith(kind) and right and told.get("stored", True):
                found.add((name, call))
    assert len(found) >= 3
    return sorted(found)


def test_the_full_set_has_what_mindspore_got_wrong() -> None:
    golden(TWO_AXES, "ms_unified_dedup")
    wrong = [calls(TWO_AXES)[f"ms_unified_dedup{which}"]["vs_full"] for which in ("", "_right")]
    assert [w["n_different"] for w in wrong] == [8, 8]
    refused = [calls(n)["ms_transform_dp1mp1pp4"] for n in ("dp2mp2pp2", "dp1mp2pp2")]
    assert all(r["raised"] and not r["vs_expected"]["all_ok"] for r in refused)
    assert len(outputs("ms_slices") + outputs("ms_transform")) > 15


@pytest.mark.parametrize(("name", "call"), outputs("ms_unified"))
def test_a_unified_folder_is_that_of_mindspore(name: str, call: str, tmp_path: Path) -> None:
    theirs = golden(name, call)
    source = "src_safetensors" + call.removeprefix("ms_unified")
    js.merge(golden(name, source), tmp_path / "u", format="unified", **QUICK)
    assert {p.name for p in theirs.iterdir()} == {p.name for p in (tmp_path / "u").iterdir()}
    for path in theirs.glob("*.safetensors"):
        assert ms.weights(tmp_path / "u" / path.name) == ms.weights(path)
    assert js.verify(theirs, tmp_path / "u").problems == ()


@pytest.mark.parametrize(("name", "call"), outputs("ms_slices") + outputs("ms_transform"))
def test_rank_files_are_those_of_mindspore(name: str, call: str, tmp_path: Path) -> None:
    theirs = ms.rank_weights_of(golden(name, call))
    is_ckpt = "_ckpt_" in call
    target = call.removeprefix("ms_slices_").removeprefix("ms_transform_").removeprefix("ckpt_")
    strategy = golden(name, "targets", f"{target}_strategy.ckpt")
    source = golden(name, "src_ckpt" if is_ckpt else "src_safetensors")
    drop = () if any(n.startswith("adam_") for n in theirs[0]) else "adam_"
    how = {"format": "ckpt"} if is_ckpt else {}
    js.convert(source, tmp_path / "o", strategy, **QUICK, drop_prefix=drop, **how)
    ours = ms.rank_weights_of(tmp_path / "o")
    assert ours.keys() == theirs.keys()
    for rank, held in theirs.items():
        assert ours[rank] == held, rank
