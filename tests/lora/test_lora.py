"""Adapters merged while they stream: MindFormers' own results, bit for bit, and every refusal."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxshard.conversion.open import open_checkpoint
from jaxshard.errors import FormatError, JaxshardError, LayoutError, NotFoundError
from jaxshard.lora import is_adapter, merge_lora, with_adapter

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
QUICK = {"workers": 1, "fsync": False}


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {n: x for f in sorted(folder.rglob("*.safetensors")) for n, x in load_file(f).items()}


def save(tensors: dict[str, np.ndarray], where: Path, **config: object) -> Path:
    where.mkdir(parents=True)
    save_file(tensors, where / "model.safetensors", {"format": "pt"})
    if config:
        (where / "adapter_config.json").write_text(json.dumps(config))
    return where


def small(dtype: str = "float32", rank: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {
        "l.0.q.weight": random.normal(size=(8, 6)),
        "l.0.q.lora_a": random.normal(size=(rank, 6)),
        "l.0.q.lora_b": random.normal(size=(8, rank)),
        "l.0.norm.weight": random.normal(size=6),
    }
    return {n: x.astype(dtype) for n, x in made.items()}


@pytest.mark.parametrize(
    ("case", "alpha"),
    [("parallel_core", 32), ("mindpet", None), ("pynative", 16), ("mindpet_transposed", 16)],
)
def test_mindformers_merges_are_reproduced_exactly(tmp_path, case, alpha) -> None:
    source = GOLDEN / case / "src.safetensors"
    merge_lora(source, tmp_path / "m", alpha=alpha, reproducible=True, **QUICK)
    merge_lora(source, tmp_path / "fast", alpha=alpha, **QUICK)
    if case == "mindpet":  # its config lies beside the file
        assert (GOLDEN / case / "adapter_config.json").exists()
    made, expected = weights(tmp_path / "m"), load_file(GOLDEN / case / "merged.safetensors")
    assert made.keys() == expected.keys()
    for name, x in expected.items():
        assert made[name].dtype == x.dtype
        assert made[name].tobytes() == x.tobytes(), name
    for name, x in weights(tmp_path / "fast").items():
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, expected[name], rtol=2e-6, atol=4e-6)
        else:  # rounding hides the order of the sums, but for one in thousands
            different = x.view(np.uint16) != expected[name].view(np.uint16)
            assert different.mean() <= 1 / 1000


def test_mindformers_legacy_ckpt_is_reproduced(tmp_path) -> None:
    source = GOLDEN / "legacy_ckpt" / "src.ckpt"
    merge_lora(source, tmp_path / "m", scaling=2.0, reproducible=True, **QUICK)
    expected = open_checkpoint(GOLDEN / "legacy_ckpt" / "merged_lora.ckpt")
    made = weights(tmp_path / "m")
    assert made.keys() == expected.tensors.keys()
    data = (GOLDEN / "legacy_ckpt" / "merged_lora.ckpt").read_bytes()
    for name, tensor in expected.tensors.items():
        (piece,) = tensor.shards
        stored = data[piece.offset : piece.offset + tensor.num_bytes]
        assert made[name].tobytes() == stored, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_merge_is_computed_in_float32_and_rounded_once(tmp_path, dtype) -> None:
    kind = getattr(ml_dtypes, dtype, dtype)
    tensors = small()
    tensors["l.0.q.weight"] = tensors["l.0.q.weight"].astype(kind)
    save(tensors, tmp_path / "src")
    merge_lora(tmp_path / "src", tmp_path / "m", alpha=5, **QUICK)
    product = tensors["l.0.q.lora_b"] @ tensors["l.0.q.lora_a"] * np.float32(2.5)
    wide = tensors["l.0.q.weight"].astype(np.float64 if dtype == "float64" else np.float32)
    made = weights(tmp_path / "m")
    assert set(made) == {"l.0.q.weight", "l.0.norm.weight"}
    np.testing.assert_array_equal(made["l.0.q.weight"], (wide + product).astype(kind))
    np.testing.assert_array_equal(made["l.0.norm.weight"], tensors["l.0.norm.weight"])


def test_what_is_too_large_becomes_infinite_without_a_warning(tmp_path) -> None:
    base = {"q.weight": np.zeros((8, 16), ml_dtypes.bfloat16)}
    pair = {
        "q.lora_a": np.ones((1, 16), np.float32),
        "q.lora_b": np.full((8, 1), 3e38, np.float32),
    }
    source = save(base | pair, tmp_path / "src")
    merge_lora(source, tmp_path / "m", scaling=2.0, **QUICK)  # a warning would be an error
    assert np.isinf(weights(tmp_path / "m")["q.weight"].astype(np.float32)).all()


def test_optimizer_states_of_adapters_are_left_out_and_others_kept(tmp_path) -> None:
    tensors = small()
    tensors |= {f"adam_m.{n}": x for n, x in small().items()}
    save(tensors, tmp_path / "src")
    report = merge_lora(tmp_path / "src", tmp_path / "m", alpha=2, **QUICK)
    made = weights(tmp_path / "m")
    assert set(made) == {n for n in tensors if "lora" not in n}
    np.testing.assert_array_equal(made["adam_m.l.0.q.weight"], tensors["adam_m.l.0.q.weight"])
    assert any("2 optimizer states of adapters are dropped" in note for note in report.notes)


def test_a_merge_is_undone_but_for_rounding(tmp_path) -> None:
    tensors = small()
    base = {n: x for n, x in tensors.items() if "lora" not in n}
    pair = {n: x for n, x in tensors.items() if "lora" in n}
    save(base, tmp_path / "base")
    save(pair, tmp_path / "pair", lora_alpha=4, r=2)
    merge_lora(tmp_path / "base", tmp_path / "m", adapter=tmp_path / "pair", **QUICK)
    merge_lora(tmp_path / "m", tmp_path / "u", adapter=tmp_path / "pair", unmerge=True, **QUICK)
    made = weights(tmp_path / "u")
    assert not np.array_equal(weights(tmp_path / "m")["l.0.q.weight"], base["l.0.q.weight"])
    np.testing.assert_allclose(made["l.0.q.weight"], base["l.0.q.weight"], atol=1e-5)


def test_several_blocks_and_threads_give_the_same_as_one(tmp_path) -> None:
    random = np.random.default_rng(0)
    tensors = {
        f"l.{i}.q.{n}": random.normal(size=s).astype(np.float32)
        for i in range(5)
        for n, s in {"weight": (512, 700), "lora_a": (4, 700), "lora_b": (512, 4)}.items()
    }
    save(tensors, tmp_path / "src")
    small_blocks = {"workers": 4, "host_bytes": 4 << 20, "fsync": False}
    report = merge_lora(tmp_path / "src", tmp_path / "m", alpha=8, **small_blocks)
    made = weights(tmp_path / "m")
    for i in range(5):
        a, b = tensors[f"l.{i}.q.lora_a"], tensors[f"l.{i}.q.lora_b"]
        expected = tensors[f"l.{i}.q.weight"] + b @ a * np.float32(2)
        np.testing.assert_allclose(made[f"l.{i}.q.weight"], expected, rtol=1e-6, atol=1e-6)
    assert report.counts.bytes_needed == sum(x.nbytes for x in tensors.values())


def test_adapters_cut_into_ranks_merge_with_a_base_cut_into_ranks(tmp_path) -> None:
    from jaxshard.api import convert  # noqa: PLC0415
    from jaxshard.rules import read_rules  # noqa: PLC0415

    tensors = {f"model.layers.0.attention.w{n[5:]}": x for n, x in small().items() if "q" in n}
    save(tensors, tmp_path / "src")
    rules = read_rules(
        '[specs]\n"*.wq.weight" = "mp,-"\n"*.wq.lora_a" = "-,mp"\n"*.wq.lora_b" = "mp,-"\n'
        '"*.weight" = "mp,-"\n',
        "test",
    )
    convert(tmp_path / "src", tmp_path / "ranks", "mp2", rules=rules, **QUICK)
    merge_lora(tmp_path / "src", tmp_path / "one", alpha=2, **QUICK)
    merge_lora(tmp_path / "ranks", tmp_path / "two", alpha=2, **QUICK)
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()
    for name, x in weights(tmp_path / "one").items():
        np.testing.assert_array_equal(weights(tmp_path / "two")[name], x)


WITHOUT_BASE = {n: x for n, x in small().items() if n != "l.0.q.weight"}
WITHOUT_B = {n: x for n, x in small().items() if n != "l.0.q.lora_b"}
WRONG_SHAPE = {**small(), "l.0.q.weight": np.zeros((8, 5), np.float32)}
NO_PAIR = {**small(), "l.0.q.lora_b": np.zeros((8, 3), np.float32)}
WHOLE_NUMBERS = {**small(), "l.0.q.weight": np.zeros((8, 6), np.int8)}
DORA = {**small(), "l.0.q.lora_magnitude_vector": np.zeros(8, np.float32)}
TWICE = {**small(), "l.0.q.mindpet_delta_lora_a": np.zeros((2, 6), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "how", "kind", "said"),
    [
        (WITHOUT_BASE, {"alpha": 1}, NotFoundError, r"l.0.q.lora_a adapts l.0.q.weight, but .* no"),
        (WITHOUT_B, {"alpha": 1}, NotFoundError, "l.0.q.lora_a exists, but its B"),
        (WRONG_SHAPE, {"alpha": 1}, LayoutError, r"\(8, 5\) does not fit B @ A, which is 8 x 6"),
        (NO_PAIR, {"alpha": 1}, LayoutError, r"\(2, 6\) and .* \(8, 3\) are not a pair"),
        (WHOLE_NUMBERS, {"alpha": 1}, LayoutError, "is I8; adapters can be added to"),
        (DORA, {"alpha": 1}, LayoutError, "DoRA"),
        (TWICE, {"alpha": 1}, LayoutError, "two sources for one target"),
        (small(), {}, NotFoundError, "alpha is unknown. Searched for lora_alp"),
        (small(), {"alpha": 1, "scaling": 1}, LayoutError, "exclude each other"),
        (
            small(),
            {"alpha": 1, "adapter_rank": 3},
            LayoutError,
            r"has rank 2, but adapter_rank= \(.*\) is 3",
        ),
        ({"l.0.q.weight": small()["l.0.q.weight"]}, {"alpha": 1}, NotFoundError, "no adapters"),
    ],
)
def test_unsupported_merges_are_refused_before_anything_is_written(
    tmp_path, tensors, how, kind, said
) -> None:
    save(tensors, tmp_path / "src")
    with pytest.raises(kind, match=said):
        merge_lora(tmp_path / "src", tmp_path / "m", **QUICK, **how)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        ({"peft_type": "IA3"}, LayoutError, "expected LORA"),
        ({"lora_alpha": "16"}, FormatError, "not a number"),
        ({"lora_alpha": 4, "r": 3}, FormatError, "has rank 2, but"),
        ({"lora_alpha": 4, "use_dora": True}, LayoutError, "use_dora"),
        ({"lora_alpha": 4, "alpha_pattern": {"(": 1}}, FormatError, "not a regular expression"),
    ],
)
def test_an_invalid_config_is_refused(tmp_path, config, kind, said) -> None:
    save(small(), tmp_path / "src", **config)
    with pytest.raises(kind, match=said):
        with_adapter(tmp_path / "src")


def test_the_config_is_found_above_the_checkpoint(tmp_path) -> None:
    save(small(), tmp_path / "a" / "b")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 7}')
    catalog = with_adapter(tmp_path / "a" / "b")
    (piece,) = catalog["l.0.q.weight"].shards
    assert piece.view is not None
    assert piece.view.steps[0].scaling == 3.5


def test_a_square_weight_of_unknown_orientation_gets_a_note(tmp_path) -> None:
    tensors = {
        "q.weight": np.zeros((4, 4), np.float32),
        "q.lora_a": np.ones((2, 4), np.float32),
        "q.lora_b": np.arange(8, dtype=np.float32).reshape(4, 2),
    }
    save(tensors, tmp_path / "src")
    report = merge_lora(tmp_path / "src", tmp_path / "m", alpha=2, **QUICK)
    assert any("Square weights are read as (out, in)" in n for n in report.notes)
    merge_lora(tmp_path / "src", tmp_path / "t", alpha=2, fan_in_fan_out=True, **QUICK)
    one, other = (weights(tmp_path / x)["q.weight"] for x in "mt")
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, other.T)


def test_a_source_that_changes_while_it_is_merged_is_refused(tmp_path) -> None:
    tensors = small()
    save({n: x for n, x in tensors.items() if "lora" not in n}, tmp_path / "base")
    save({n: x for n, x in tensors.items() if "lora" in n}, tmp_path / "pair", lora_alpha=1)
    catalog = with_adapter(tmp_path / "base", tmp_path / "pair")
    save_file(tensors, tmp_path / "pair" / "model.safetensors")
    from jaxshard.api import convert  # noqa: PLC0415

    with pytest.raises(JaxshardError):
        convert(catalog, tmp_path / "m", **QUICK)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.x.lora_A.weight", True),
        ("base_model.model.x.lora_A.default.weight", True),
        ("x.lora_embedding_B", True),
        ("x.mindpet_delta_lora_b", True),
        ("adam_v.x.lora_a", True),
        ("x.lora.weight", False),
        ("lora_head.weight", False),
    ],
)
def test_names_of_adapters_are_known(name, expected) -> None:
    assert is_adapter(name) is expected


@settings(max_examples=30, deadline=None)
@given(
    experts=st.integers(1, 4),
    rank=st.integers(1, 3),
    shape=st.sampled_from([(6, 4), (4, 10), (2, 6)]),
    kind=st.sampled_from(["stacked", "turned", "apart"]),
    reproducible=st.booleans(),
)
def test_stacked_experts_get_the_sums_of_pefts_layout(
    experts, rank, shape, kind, reproducible
) -> None:
    """A is (experts · rank, in) and B (out, rank · experts), as PEFT's ParamWrapper has them."""
    rows, columns = shape
    random = np.random.default_rng(0)
    a = random.normal(size=(experts, rank, columns)).astype(np.float32)
    b = random.normal(size=(rows, rank, experts)).astype(np.float32)
    weight = random.normal(size=(experts, rows, columns)).astype(np.float32)
    total = weight + np.einsum("ore,eri->eoi", b, a) * np.float32(2)
    stem, is_turned = "l.0.experts", kind == "turned" and experts > 1
    if kind == "apart":
        half = rows // 2
        names = [(e, n, at) for e in range(experts) for n, at in (("gate", 0), ("up", half))]
        base = {f"{stem}.{e}.{n}_proj.weight": weight[e, at : at + half] for e, n, at in names}
        expected = {f"{stem}.{e}.{n}_proj.weight": total[e, at : at + half] for e, n, at in names}
    else:
        order = (0, 2, 1) if is_turned else (0, 1, 2)
        base = {f"{stem}.gate_up_proj": weight.transpose(order)}
        expected = {f"{stem}.gate_up_proj": total.transpose(order)}
    pair = {
        f"base_model.model.{stem}.lora_A.weight": a.reshape(experts * rank, columns),
        f"base_model.model.{stem}.lora_B.weight": b.reshape(rows, rank * experts),
    }
    config = {"target_parameters": ["experts.gate_up_proj"], "r": rank, "lora_alpha": 2 * rank}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        save({n: np.ascontiguousarray(x) for n, x in base.items()}, where / "base")
        save(pair, where / "a", **config)
        how = {"adapter": where / "a", "reproducible": reproducible, **QUICK}
        merge_lora(where / "base", where / "m", **how)
        made = weights(where / "m")
    assert made.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(made[name], x, rtol=1e-5, atol=1e-6)
