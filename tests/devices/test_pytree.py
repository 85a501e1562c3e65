"""Names of leaves: a path with dots, in every verb the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxshard.core.layout import Strategy
from jaxshard.devices.pytree import named_leaves, shardings_by_rules, show
from jaxshard.errors import LayoutError
from jaxshard.loader import load
from jaxshard.resharding import reshard
from jaxshard.rules import read_rules
from jaxshard.saver import save


@jax.tree_util.register_dataclass
@dataclass
class Attention:
    """A module whose projections are called as in many a transformer."""

    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclass
class Variable:
    """Not Flax's, though it is called so."""

    value: Any


def a_tree() -> dict[str, Any]:
    made = [np.full((4, 4), n, np.float32) for n in range(4)]
    return {"attn": Attention(*map(jax.numpy.asarray, made[:3])), "v": Variable(made[3])}


def names_of(tree: Any) -> list[str]:
    return [name for name, _ in named_leaves(tree)[0]]


def test_an_attribute_called_value_is_one_like_any_other():
    assert names_of(a_tree()) == ["attn.query", "attn.key", "attn.value", "v.value"]


def test_a_flax_variable_is_called_what_it_is_in():
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert names_of({"layers": [state]}) == ["layers.0.bias", "layers.0.kernel"]
    boxed = {"w": nn.Partitioned(np.ones(2), ("x",)), "v": nn.LogicallyPartitioned(np.ones(2), ())}
    assert names_of(boxed) == ["v", "w"]


def test_the_structure_is_that_of_the_leaves():
    tree = a_tree()
    leaves, structure = named_leaves(tree)
    again = structure.unflatten([leaf for _, leaf in leaves])
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert again["attn"].value is tree["attn"].value


def test_two_leaves_of_one_name_are_refused_where_names_matter():
    tree = {"a.b": 1, "a": {"b": 2}}
    with pytest.raises(LayoutError, match=r"1 names stand for several leaves of the tree: a\.b"):
        named_leaves(tree)
    assert [name for name, _ in named_leaves(tree, unique=False)[0]] == ["a.b", "a.b"]


def test_every_verb_calls_a_leaf_the_same(tmp_path):
    tree = a_tree()
    save(tree, tmp_path / "out")
    mesh = jax.make_mesh((4,), ("mp",))
    here = NamedSharding(mesh, PartitionSpec("mp"))
    filled = load(tmp_path / "out", jax.tree.map(lambda _: here, tree))
    moved = reshard(filled, dict.fromkeys(names_of(tree), NamedSharding(mesh, PartitionSpec())))
    rules = read_rules('[specs]\n"*" = "mp,-"\n')
    placed = shardings_by_rules(tree, Strategy(mp=4), rules=rules)
    assert list(placed) == names_of(tree)
    for back in (filled, moved):
        for ours, first in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert np.array_equal(ours, first)


def test_a_tree_is_shown_with_one_row_per_sharding_and_the_bytes_per_device():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    over = NamedSharding(mesh, PartitionSpec("model", None))
    same = NamedSharding(mesh, PartitionSpec("model"))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = {
        "layers": [jax.ShapeDtypeStruct((8, 64), "float32", sharding=s) for s in (over, same)],
        "<norm>": jax.device_put(np.zeros(16, np.float32), whole),
        "table": np.zeros(4, np.int8),
        "name": "llama",
    }
    table = show(tree)
    assert [(r.spec, r.num_leaves, r.num_bytes, r.bytes_per_device) for r in table.rows] == [
        ("P('model')", 2, 4096, 1024),
        ("P()", 1, 64, 64),
        ("none", 1, 4, 4),
    ]
    assert str(table).splitlines()[1].split() == (
        ["P('model')", "data=2,", "model=4", "2", "4.1", "KB", "1.02", "KB", "layers.0"]
    )
    assert "&lt;norm&gt;" in table._repr_html_()
    assert "<norm>" not in table._repr_html_()
