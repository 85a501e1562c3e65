"""Strategies as targets for arrays on devices: what each name becomes, and what is refused."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxshard as js
from jaxshard import resharding
from jaxshard.devices import pytree
from jaxshard.devices.pytree import target_of
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.rules import Rules

P = PartitionSpec
ROW, COLUMN, WHOLE = P("mp"), P(None, "mp"), P()


def names_and_specs():
    """A model of two layers in the names of llama: shape, and how Megatron cuts it."""
    found = {
        "model.embed_tokens.weight": ((64, 16), ROW),
        "model.norm.weight": ((16,), WHOLE),
        "lm_head.weight": ((64, 16), ROW),
    }
    for n in range(2):
        at = f"model.layers.{n}."
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            found[f"{at}{part}.weight"] = ((16, 16), ROW)
        found[f"{at}self_attn.o_proj.weight"] = ((16, 16), COLUMN)
        found[f"{at}mlp.gate_proj.weight"] = ((32, 16), ROW)
        found[f"{at}mlp.up_proj.weight"] = ((32, 16), ROW)
        found[f"{at}mlp.down_proj.weight"] = ((16, 32), COLUMN)
        found[f"{at}input_layernorm.weight"] = ((16,), WHOLE)
        found[f"{at}post_attention_layernorm.weight"] = ((16,), WHOLE)
    return found


def mesh_of(sizes, numbers=range(8)):
    return Mesh(np.array(jax.devices(), dtype=object)[list(numbers)].reshape(sizes), ("dp", "mp"))


def one_mesh(sizes):
    return {name: mesh_of(sizes) for name in names_and_specs()}


def two_stages():
    """Layer 0 and what comes before it on devices 0 to 3, all else on 4 to 7."""
    first, second = mesh_of((1, 4), range(4)), mesh_of((1, 4), range(4, 8))
    return {
        name: first if ".0." in name or "embed" in name else second for name in names_and_specs()
    }


STRATEGIES = {
    "dp2mp4": lambda: one_mesh((2, 4)),
    "dp4mp2": lambda: one_mesh((4, 2)),
    "mp8": lambda: one_mesh((1, 8)),
    "mp4pp2": two_stages,
}


def tree_in(strategy):
    """Every tensor placed by JAX alone, and its values."""
    rng = np.random.default_rng(5)
    values = {n: rng.random(s, dtype=np.float32) for n, (s, _) in names_and_specs().items()}
    placed = expected(strategy)
    return {n: jax.device_put(v, placed[n]) for n, v in values.items()}, values


def expected(strategy):
    meshes = STRATEGIES[strategy]()
    return {n: NamedSharding(meshes[n], spec) for n, (_, spec) in names_and_specs().items()}


def assert_arrived(moved, values, strategy):
    assert moved.keys() == values.keys()
    for name, sharding in expected(strategy).items():
        assert moved[name].sharding.is_equivalent_to(sharding, moved[name].ndim), name
        assert np.array_equal(np.asarray(moved[name]), values[name]), name


@pytest.mark.parametrize("route", ["auto", "device"])
@pytest.mark.parametrize(
    ("before", "after"), [("dp2mp4", "dp4mp2"), ("mp8", "mp4pp2"), ("mp4pp2", "dp2mp4")]
)
def test_a_strategy_moves_every_name_to_where_its_rule_says(before, after, route):
    tree, values = tree_in(before)
    wanted = pytree.target_of(tree, after)
    assert_arrived(resharding.reshard(tree, wanted, route=route), values, after)


@pytest.mark.parametrize(("before", "after"), [("dp2mp4", "dp4mp2"), ("mp8", "mp4pp2")])
def test_descriptions_suffice_to_prepare_for_a_strategy(before, after):
    tree, values = tree_in(before)
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    prepared = js.prepare_reshard(described, js.Strategy.parse(after))
    assert_arrived(prepared(tree), values, after)


def test_names_of_a_nested_tree_are_its_keys_joined_by_dots():
    tree, _ = tree_in("dp2mp4")
    flat = js.reshard(tree, "dp4mp2")
    nested = {"model": {"norm": {"weight": tree["model.norm.weight"]}}}
    nested["model"]["layers"] = [
        {"mlp": {"down_proj": {"weight": tree[f"model.layers.{n}.mlp.down_proj.weight"]}}}
        for n in range(2)
    ]
    moved = js.reshard(nested, "dp4mp2")["model"]["layers"][1]["mlp"]["down_proj"]["weight"]
    assert moved.sharding == flat["model.layers.1.mlp.down_proj.weight"].sharding


def test_rules_of_ones_own_go_before_those_of_the_family():
    tree, values = tree_in("dp2mp4")
    name = "model.layers.0.mlp.up_proj.weight"
    mine = Rules("mine", specs=(("*.0.mlp.up_proj.*", "-,mp"),))
    moved = js.reshard(tree, "dp4mp2", rules=mine)
    columns = NamedSharding(mesh_of((4, 2)), COLUMN)
    assert moved[name].sharding.is_equivalent_to(columns, 2)
    others = {n: x for n, x in moved.items() if n != name}
    for other, x in others.items():
        assert x.sharding.is_equivalent_to(expected("dp4mp2")[other], x.ndim)
    assert np.array_equal(np.asarray(moved[name]), values[name])


def test_rules_of_ones_own_suffice_for_names_of_no_family():
    tree = {"w": jax.device_put(np.ones((8, 8), np.float32), expected("dp2mp4")["lm_head.weight"])}
    moved = js.reshard(tree, "mp8", rules=Rules("mine", specs=(("w", "-,mp"),)))
    assert moved["w"].sharding.is_equivalent_to(NamedSharding(mesh_of((1, 8)), COLUMN), 2)


def test_the_devices_given_are_the_ranks_in_their_order():
    tree, values = tree_in("dp2mp4")
    backwards = jax.devices()[::-1]
    moved = js.reshard(tree, "dp2mp4", devices=backwards)
    for name, (_, spec) in names_and_specs().items():
        there = NamedSharding(mesh_of((2, 4), range(7, -1, -1)), spec)
        assert moved[name].sharding.is_equivalent_to(there, moved[name].ndim)
        assert np.array_equal(np.asarray(moved[name]), values[name])
    four = js.reshard(tree, "mp4", devices=backwards)
    assert four["lm_head.weight"].sharding.device_set == set(jax.devices()[4:])


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        ("dp4mp4", {}, LayoutError, "dp4mp4 needs 16 devices; there are 8"),
        ("mp4", {"devices": 2}, LayoutError, "mp4 needs 4 devices; there are 2"),
        ("mp3", {}, LayoutError, "does not divide"),
        ("fast", {}, LayoutError, "fast"),
        (P(), {"devices": 8}, LayoutError, "only valid with a strategy or a mesh, not with P"),
        (P(), {"rules": Rules("mine")}, LayoutError, "only valid with a strategy"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_moves(target, options, error, words):
    tree, _ = tree_in("dp2mp4")
    if "devices" in options:
        options = {**options, "devices": jax.devices()[: options["devices"]]}
    with pytest.raises(error, match=words):
        js.reshard(tree, target, **options)


def test_names_without_a_rule_are_refused():
    array = jax.device_put(np.ones((8, 8)), expected("dp2mp4")["lm_head.weight"])
    with pytest.raises((LayoutError, NotFoundError), match="w"):
        js.reshard({"w": array}, "mp8")
    tree, _ = tree_in("dp2mp4")
    with pytest.raises((LayoutError, NotFoundError), match="another"):
        js.reshard({**tree, "another": array}, "mp8")


def test_targets_that_are_no_strategy_are_left_as_they_are():
    sharding = NamedSharding(mesh_of((2, 4)), ROW)
    assert target_of({}, sharding) is sharding
