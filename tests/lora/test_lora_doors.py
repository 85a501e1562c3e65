"""Adapters from the command line, and adapters cut into ranks, in every spelling and place."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_lora import QUICK, save, weights

import jaxshard
from jaxshard.api import convert
from jaxshard.conversion.open import open_checkpoint
from jaxshard.errors import CoverageError
from jaxshard.lora import merge_lora, with_adapter
from jaxshard.rules import read_rules

WQ = "model.layers.0.attention.wq."
RULES = read_rules('[specs]\n"*.wq.weight" = "mp,-"\n"*norm.weight" = "-"\n', "test")
SPELLINGS = {
    "parallel core": ("lora_A.weight", "lora_B.weight"),
    "mindpet": ("mindpet_delta_lora_a", "mindpet_delta_lora_b"),
    "pynative": ("lora_a", "lora_b"),
}


def model(spelling: str, out: int = 8) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A base and a pair, in float32."""
    random = np.random.default_rng(0)
    a, b = SPELLINGS[spelling]

    def values(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    base = {WQ + "weight": values(out, 6), "model.layers.0.attention_norm.weight": values(6)}
    return base, {WQ + a: values(2, 6), WQ + b: values(out, 2)}


def expected(base: dict, pair: dict, scaling: float) -> np.ndarray:
    a, b = pair.values()
    return base[WQ + "weight"] + b @ a * np.float32(scaling)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("place", ["inside", "beside", "beside, with one file of strategies"])
@pytest.mark.parametrize("format", ["ranks", "ckpt"])
def test_adapters_cut_into_ranks_are_merged(tmp_path, spelling, place, format) -> None:
    base, pair = model(spelling)
    how = {"rules": RULES, "format": format, **QUICK}
    given = {}
    if place == "inside":
        save(base | pair, tmp_path / "whole")
        convert(tmp_path / "whole", tmp_path / "base", "mp2", **how)
    else:
        save(base, tmp_path / "whole")
        save(pair, tmp_path / "pair")
        convert(tmp_path / "whole", tmp_path / "base", "mp2", **how)
        convert(tmp_path / "pair", tmp_path / "cut", "mp2", **how)
        b = next(n for n in pair if n.lower().endswith(("_b", "_b.weight")))
        assert len(open_checkpoint(tmp_path / "cut")[b].shards) == 2
        given["adapter"] = tmp_path / "cut"
        if "one file" in place:
            (tmp_path / "cut" / "strategy").rename(tmp_path / "strategies")
            given["adapter_strategy"] = tmp_path / "strategies"
            given["src_strategy"] = tmp_path / "base" / "strategy"
    merge_lora(tmp_path / "base", tmp_path / "m", alpha=4, **QUICK, **given)
    made = weights(tmp_path / "m")
    assert made.keys() == base.keys()
    np.testing.assert_allclose(made[WQ + "weight"], expected(base, pair, 2), rtol=1e-6, atol=1e-6)


def test_the_command_line_merges_and_takes_back(tmp_path: Path) -> None:
    base, pair = model("pynative")
    save(base, tmp_path / "base")
    save(pair, tmp_path / "pair", lora_alpha=4, r=2)
    how = ("--adapter", tmp_path / "pair", "--quiet")
    assert checkpoints.run("lora", tmp_path / "base", tmp_path / "m", *how) == 0
    made = weights(tmp_path / "m")[WQ + "weight"]
    np.testing.assert_allclose(made, expected(base, pair, 2), rtol=1e-6, atol=1e-6)
    more = ("--alpha", 16, "--adapter-rank", 2, "--reproducible")
    assert checkpoints.run("lora", tmp_path / "base", tmp_path / "s", *how, *more) == 0
    strong = weights(tmp_path / "s")[WQ + "weight"]
    np.testing.assert_allclose(strong, expected(base, pair, 8), rtol=1e-6, atol=1e-6)
    assert checkpoints.run("lora", tmp_path / "m", tmp_path / "u", *how, "--unmerge") == 0
    back = weights(tmp_path / "u")[WQ + "weight"]
    np.testing.assert_allclose(back, base[WQ + "weight"], atol=1e-5)
    assert checkpoints.run("lora", tmp_path / "base", tmp_path / "h", *how, "--scaling", 0.5) == 0
    half = weights(tmp_path / "h")[WQ + "weight"]
    np.testing.assert_allclose(half, expected(base, pair, 0.5), rtol=1e-6, atol=1e-6)


def test_the_command_line_writes_ranks_and_reports_errors(tmp_path: Path, capsys) -> None:
    base, pair = model("mindpet")
    save(base | pair, tmp_path / "src")
    (tmp_path / "rules.toml").write_text('[specs]\n"*.wq.weight" = "mp,-"\n"*norm.weight" = "-"\n')
    how = ("--to", "mp2", "--rules", tmp_path / "rules.toml", "--json")
    assert checkpoints.run("lora", tmp_path / "src", tmp_path / "m", *how) == 2
    assert "alpha is unknown" in json.loads(capsys.readouterr().out)["message"]
    wrong = ("--alpha", 4, "--adapter-rank", 3)
    assert checkpoints.run("lora", tmp_path / "src", tmp_path / "m", *how, *wrong) == 2
    assert "(--adapter-rank) is 3" in json.loads(capsys.readouterr().out)["message"]
    right = ("--alpha", 4, "--rank", 1)  # of the result
    assert checkpoints.run("lora", tmp_path / "src", tmp_path / "m", *how, *right) == 0
    made = weights(tmp_path / "m")[WQ + "weight"]
    half = expected(base, pair, 2)[4:]
    np.testing.assert_allclose(made, half, rtol=1e-6, atol=1e-6)


def test_square_weights_are_turned_from_the_command_line(tmp_path: Path) -> None:
    base, pair = model("pynative", out=6)
    save(base | pair, tmp_path / "src")
    how = ("--alpha", 2, "--quiet")
    assert checkpoints.run("lora", tmp_path / "src", tmp_path / "m", *how) == 0
    turned = (*how, "--fan-in-fan-out")
    assert checkpoints.run("lora", tmp_path / "src", tmp_path / "t", *turned) == 0
    delta = expected(base, pair, 1) - base[WQ + "weight"]
    made = weights(tmp_path / "t")[WQ + "weight"] - base[WQ + "weight"]
    np.testing.assert_allclose(made, delta.T, atol=1e-5)
    plain = weights(tmp_path / "m")[WQ + "weight"] - base[WQ + "weight"]
    np.testing.assert_allclose(plain, delta, atol=1e-5)


GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
GOLDEN_RULES = read_rules(
    '[specs]\n"*.wq.weight" = "mp,-"\n"*.wo.weight" = "-,mp"\n"*.w1.weight" = "mp,-"\n'
    '"*norm.weight" = "-"\n',
    "test",
)


@pytest.mark.parametrize("case", ["parallel_core", "mindpet", "pynative"])
@pytest.mark.parametrize("format", ["ranks", "ckpt"])
@pytest.mark.parametrize("to", ["same", "strategy folder", "strategy file"])
@pytest.mark.parametrize("remove_redundancy", [False, True])
def test_a_merge_keeps_the_layout_of_the_job_that_trained_the_adapters(
    tmp_path, case, format, to, remove_redundancy
) -> None:
    """MindFormers' adapters in rank files with strategy files, Adam's moments among them."""
    tensors = load_file(GOLDEN / case / "src.safetensors")
    lora = [n for n in tensors if "lora" in n]
    tensors |= {f"adam_m.{n}": tensors[n] + 1 for n in lora}
    save(tensors, tmp_path / "whole")
    how = {"format": format, **QUICK}
    convert(tmp_path / "whole", tmp_path / "job", "dp2mp2", rules=GOLDEN_RULES, **how)
    strategy = tmp_path / "job" / "strategy"
    target = {"same": "same", "strategy folder": strategy}.get(to)
    if target is None:
        target = tmp_path / "merged.ckpt"
        assert checkpoints.run("strategy", "merge", strategy, target, "--quiet") == 0
    report = merge_lora(
        tmp_path / "job",
        tmp_path / "m",
        target,
        alpha=16,
        remove_redundancy=remove_redundancy,
        **how,
    )
    assert any(f"{2 * len(lora)} names of adapters in the target" in n for n in report.notes)
    made = open_checkpoint(tmp_path / "m")
    assert made.layout is not None
    assert set(made.layout.placements) == {n for n in tensors if "lora" not in n}
    convert(tmp_path / "m", tmp_path / "one", **QUICK)
    merge_lora(tmp_path / "whole", tmp_path / "expected", alpha=16, **QUICK)
    for name, x in weights(tmp_path / "expected").items():
        np.testing.assert_allclose(
            weights(tmp_path / "one")[name].astype(np.float32),
            x.astype(np.float32),
            rtol=2**-7 if x.dtype != np.float32 else 1e-6,
            atol=1e-5,
        )


def test_merged_adapters_are_not_missed_by_a_load_or_a_dry_run(tmp_path, capsys) -> None:
    base, pair = model("pynative")
    save(base | pair, tmp_path / "whole", lora_alpha=4)
    convert(tmp_path / "whole", tmp_path / "job", "mp2", rules=RULES, **QUICK)
    source = with_adapter(tmp_path / "job", alpha=4)
    loaded = jaxshard.load(source, tmp_path / "job" / "strategy")
    assert loaded.keys() == base.keys()
    np.testing.assert_allclose(loaded[WQ + "weight"], expected(base, pair, 2), rtol=1e-6, atol=1e-6)
    how = ("--alpha", 4, "--to", "same", "--dry-run")
    assert checkpoints.run("lora", tmp_path / "job", tmp_path / "m", *how) == 0
    assert "2 names of adapters" in capsys.readouterr().out


def test_adapters_that_were_not_merged_are_missed_still(tmp_path) -> None:
    base, pair = model("pynative")
    save(base | pair, tmp_path / "whole")
    save(base, tmp_path / "base")
    convert(tmp_path / "whole", tmp_path / "job", "mp2", rules=RULES, **QUICK)
    with pytest.raises(CoverageError, match="2 weights of the target's strategy are not in"):
        convert(tmp_path / "base", tmp_path / "m", tmp_path / "job" / "strategy", **QUICK)
