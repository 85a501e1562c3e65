"""Patterns of an untrusted config: PEFT's answer, in a counted number of steps."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora import save, small

from jaxshard.errors import FormatError
from jaxshard.lora import with_adapter
from jaxshard.lora.peft_patterns import MAX_STEPS, ByPattern, check_patterns


def as_peft_has_it(patterns: list[str], module: str) -> int | None:
    """What ``peft.utils.other.get_pattern_key`` finds, as a number."""
    found = (i for i, p in enumerate(patterns) if re.match(rf"(.*\.)?({p})$", module))
    return next(found, None)


def find(patterns: list[str], module: str) -> int | None:
    numbers = {p: i for i, p in enumerate(patterns)}
    check_patterns(numbers, "config")
    return ByPattern(numbers, "config").find(module, None)


def steps(pattern: str, *modules: str) -> int:
    """How many steps the names take."""
    by = ByPattern({pattern: 1}, "config")
    for module in modules:
        by.find(module, 0)
    return MAX_STEPS - by._steps.left


@pytest.mark.parametrize(
    ("pattern", "module", "found"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "model.layers.0.xq_proj", False),
        ("layers.0.q_proj", "model.layers.0.q_proj", True),
        ("^model.layers.0.q_proj", "model.layers.0.q_proj", True),
        ("^layers.0.q_proj", "model.layers.0.q_proj", False),
        (r".*\.layers\.[0-5]\..*\.(q|v)_proj", "model.layers.3.self_attn.v_proj", True),
        (r".*\.layers\.[0-5]\..*\.(q|v)_proj", "model.layers.7.self_attn.v_proj", False),
        (r"layers\.(0|1|2|3|10)\.(self_attn|mlp)\.(q|k|v|o)_proj", "layers.10.mlp.o_proj", True),
        (r"(?:model\.)?layers\.\d+\.q", "model.layers.12.q", True),
    ],
)
def test_the_patterns_of_real_configs_are_taken_as_peft_takes_them(pattern, module, found) -> None:
    assert (find([pattern], module) == 0) is found
    assert (as_peft_has_it([pattern], module) == 0) is found


ATOMS = ["a", "b", ".", r"\.", "a.b", "_", "[ab]", "[^a]", "[a-c.]", r"\w", r"\d", r"\W", "[^]a]"]
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "*?", "+?"]


def expressions() -> st.SearchStrategy[str]:
    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        group = st.builds(lambda x, r: f"(?:{x}){r}", inner, st.sampled_from(REPEATS))
        ways = st.builds(lambda x, y: f"({x}|{y})", inner, inner)
        return st.lists(group | ways | inner, min_size=1, max_size=2).map("".join)

    atom = st.builds(str.__add__, st.sampled_from(ATOMS), st.sampled_from(REPEATS))
    plain = st.sampled_from(["a", "a.b", "b.a_1", "^a", "a$"])
    return st.recursive(atom | plain, grown, max_leaves=4)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(expressions(), min_size=1, max_size=3, unique=True),
    st.lists(st.text("ab._1", max_size=6), min_size=1, max_size=4),
)
def test_patterns_find_what_peft_finds(patterns, modules) -> None:
    for module in modules:
        for name in (module, module + "\n", "a\n" + module):
            assert find(patterns, name) == as_peft_has_it(patterns, name), (patterns, name)


@pytest.mark.parametrize(
    "pattern",
    [
        "x*x*x*y",  # a cubic time with re
        "(x+x+)+y",  # an exponential one
        "(x*)*y",
        "(x|xx)*y",
        "(x|x)*y",
        ".*.*.*.*.*y",
        "x?" * 40 + "x" * 40,
        "(x|xx)" * 40,
        r"(\w+\.)*\w+y",
        r".*\.layers\.[0-5]\..*\.(q|v)_proj",
    ],
)
@pytest.mark.parametrize("name", ["x", ".x", "x.layers.0."])
def test_steps_grow_no_faster_than_the_square_of_a_name(pattern, name) -> None:
    check_patterns({pattern: 1}, "config")
    few, many = (steps(pattern, name * n) for n in (64, 256))
    assert many <= 16 * few
    assert few <= 64 * len(pattern) * len(name * 64)


@pytest.mark.parametrize(
    ("patterns", "name", "names"),
    [
        (["(a|aa)+"], "a" * 100_000, 1),
        (["((((a?){50}){50}){50}){50}"], "a" * 300, 1),
        ([f"a?b{i}" for i in range(1000)], "model.layers.0.q", 1000),
        ([".".join("a" * n) for n in range(1, 3000)], "a." * 4000, 1000),
    ],
)
def test_patterns_that_take_too_many_steps_are_refused_with_what_to_do(
    monkeypatch, patterns, name, names
) -> None:
    monkeypatch.setattr("jaxshard.lora.peft_patterns.MAX_STEPS", 200_000)
    numbers = dict.fromkeys(patterns, 1)
    check_patterns(numbers, "config: alpha_pattern")
    by = ByPattern(numbers, "config: alpha_pattern")
    with pytest.raises(FormatError, match=r"alpha_pattern: \d+ patterns need more than \d+ steps"):
        _ = [by.find(f"{name}{i}", 0) for i in range(names)]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("(", "not a regular expression"),
        ("a)|(b", r"a \) without its \("),
        ("q{99999999999}", "not a regular expression"),
        ("(?i)q", "not a regular expression"),
        ("(?=a)b", r"with \(\? …"),
        ("(?i:q)", r"with \(\? …"),
        (r"(a)\1", r"with \\1"),
        (r"\bq", r"with \\b"),
        ("a*+", "possessive"),
        ("(" * 30 + "a" + ")" * 30, "nested deeper than"),
        ("(a)" * 400, "of 1200 characters"),
    ],
)
def test_unsupported_expressions_are_refused_when_the_config_is_read(pattern, told) -> None:
    with pytest.raises(FormatError, match=told):
        check_patterns({pattern: 1}, "config: alpha_pattern")


def test_a_config_with_too_many_patterns_is_refused() -> None:
    with pytest.raises(FormatError, match="2000 regular expressions, expected at most 1024"):
        check_patterns({f"a*{i}": 1 for i in range(2000)}, "config")
    with pytest.raises(FormatError, match="100000 patterns, expected at most 65536"):
        check_patterns({f"a{i}": 1 for i in range(100_000)}, "config")


def test_thousands_of_names_are_looked_up_by_their_shape() -> None:
    """A rank for every module, as EVA's adapters have it, costs each name a few steps."""
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{p}"
        for i in range(24)
        for e in range(64)
        for p in ("gate_proj", "up_proj", "down_proj")
    ]
    by = ByPattern({n: i for i, n in enumerate(names)}, "config")
    assert [by.find(n, -1) for n in names] == list(range(len(names)))
    assert MAX_STEPS - by._steps.left < 100 * len(names)
    assert by.find("base.model.layers.1.mlp.experts.2.up_proj", -1) == names.index(names[199])


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_an_adapter_with_a_pattern_that_re_never_ends_is_merged_soon(tmp_path, key) -> None:
    module = "x" * 20_000
    tensors = {n.replace("l.0.q", module): x for n, x in small().items()}
    pattern = {"x*x*x*y": 8}
    place = save(tensors, tmp_path / "a", lora_alpha=4, r=2, **{key: pattern})
    assert module + ".weight" in with_adapter(place).tensors
