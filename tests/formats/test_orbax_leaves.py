"""Every kind of leaf that Orbax stores: loaded, converted or refused by its name, never lost.

Orbax's own restore is the oracle for values, and Flax's guide for states of NNX.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import safe_open

import jaxshard as js
from jaxshard.core.dtypes import OF_ARRAYS
from jaxshard.devices.pytree import is_key
from jaxshard.errors import FormatError, LayoutError, NotFoundError
from jaxshard.formats.orbax import leaf_names

ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
P = PartitionSpec

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

# What TensorStore has, and Orbax therefore stores; float8_e4m3, uint2 and uint4 it refuses.
IN_FILES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "float4_e2m1fn"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
OF_JAX_ALONE = ("int2", "int4", "float8_e3m4", "float8_e4m3b11fnuz", "complex128")


def array_of(dtype: str, shape: tuple[int, ...] = (8, 4)) -> np.ndarray:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    counted = np.arange(np.prod(shape)).reshape(shape) % (2 if dtype in ("bool", "int2") else 7)
    return counted.astype(np.float32).astype(kind)


def the_leaves() -> dict[str, Any]:
    with jax.enable_x64(True):
        return {
            "of_jax": {d: jnp.asarray(array_of(d)) for d in (*IN_FILES, *OF_JAX_ALONE)},
            "of_numpy": {d: array_of(d) for d in (*IN_FILES, *OF_JAX_ALONE)},
            "odd": jnp.asarray(array_of("float4_e2m1fn", (3, 3))),  # not a whole number of bytes
            "numbers": {"int": 3, "float": 2.5, "bool": True, "np": np.float32(7)},
            "array0": jnp.float32(1),
            "nested": [jnp.ones(2), (jnp.zeros(3), {"a": jnp.ones(4)})],
            "key": jax.random.key(1),
            "keys": jax.random.split(jax.random.key(2, impl="rbg"), 8),
            "text": "gemma",
            "empty": {"none": None, "dict": {}, "list": [], "tuple": ()},
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("leaves") / "all"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
        saver.save(where, args=ocp.args.PyTreeSave(the_leaves()))
    return where


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, np.ndarray]:
    """All leaves but the text by name, as Orbax restores them; keys as their data."""
    with jax.enable_x64(True), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(place)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    assert found.pop("text") == "gemma"
    for name in ("key", "keys"):
        found[name] = jax.random.key_data(found[name])
    found["numbers.np"] = np.float32(found["numbers.np"])  # which Orbax makes a float of
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def unwritable(names: Any) -> list[str]:
    return [n for n in names if n.split(".")[-1] in OF_JAX_ALONE or n == "odd"]


def check(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert np.asarray(array).tobytes() == expected[name].tobytes(), name


def rows(array: np.ndarray) -> PartitionSpec:
    return P("x") if array.ndim and array.shape[0] % 8 == 0 else P()


@pytest.mark.parametrize("how", [{}, {"copy": True}, {"host_bytes": 1 << 20}], ids=str)
def test_every_array_is_loaded_as_orbax_restores_it(place, expected, how) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    lies = {name: NamedSharding(mesh, rows(array)) for name, array in expected.items()}
    found = js.load(place, lies, exclude=["^text$"], **how)
    check(found, expected)
    assert all(found[name].sharding == named for name, named in lies.items())


def test_leaves_of_every_dtype_may_be_tied(place, expected) -> None:
    here = SingleDeviceSharding(jax.devices()[3])
    target = {n: here for name in expected for n in (name, f"again {name}")}
    found = js.load(place, target, exclude=["^text$"], name_of=lambda n: n.removeprefix("again "))
    check({n: a for n, a in found.items() if n in expected}, expected)
    check({n[6:]: a for n, a in found.items() if n not in expected}, expected)


@pytest.mark.parametrize("target", [SingleDeviceSharding, lambda d: {"w": d}])
def test_what_is_not_an_array_is_refused_by_name_unless_it_is_left_out(tmp_path, target) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
        saver.save(tmp_path / "in", {"w": np.ones(4, np.float32), "meta": {"family": "gemma"}})
    where = target(jax.devices()[0])
    for work in (
        lambda **how: js.load(tmp_path / "in", where, **how),
        lambda **how: js.convert(tmp_path / "in", tmp_path / "out", overwrite=True, **how),
        lambda **how: js.convert(
            tmp_path / "in", tmp_path / "again", format="orbax", overwrite=True, **how
        ),
    ):
        with pytest.raises(LayoutError, match=r"meta\.family \(a text\).*exclude="):
            work()
        work(exclude=["family"])
        work(include=["^w$"])
    assert np.array_equal(js.load(tmp_path / "again", where)["w"], np.ones(4, np.float32))
    loaded = js.load(tmp_path / "in", {"w": jax.devices()[0]}, strict=False)
    assert loaded.keys() == {"w"}


def test_no_leaf_is_lost_in_files(place, expected, tmp_path) -> None:
    with pytest.raises(LayoutError, match=r"text \(a text\)"):
        js.convert(place, tmp_path / "out")
    some = unwritable(expected)
    assert len(some) == 11
    with pytest.raises(LayoutError, match=r"11 tensors have dtypes that weight files do not have"):
        js.convert(place, tmp_path / "out", exclude=["^text$"])
    for name in some:
        with pytest.raises(LayoutError, match=rf"{name} \((int|float|complex)"):
            js.convert(place, tmp_path / "out", include=[f"^{name}$"])
    assert not (tmp_path / "out").exists()
    left = [f"^{name}$" for name in (*some, "text")]
    js.convert(place, tmp_path / "out", exclude=left)
    written = {n: a for n, a in expected.items() if n not in some}
    here = SingleDeviceSharding(jax.devices()[0])
    check(js.load(tmp_path / "out", here), written)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert set(file.keys()) == written.keys()


@pytest.mark.parametrize("format", ["huggingface", "unified", "ckpt", "iteration"])
def test_no_format_of_weight_files_takes_a_dtype_of_arrays(place, tmp_path, format) -> None:
    with pytest.raises(LayoutError, match=r"weight files do not have: of_jax\.int4"):
        js.convert(place, tmp_path / "out", format=format, include=[r"int4$"])


def test_orbax_keeps_every_array(place, expected, tmp_path, caplog) -> None:
    js.convert(place, tmp_path / "out", format="orbax", exclude=["^text$"])
    assert "2 PRNG keys are written as integers" in caplog.text
    assert "key (threefry2x32), keys (rbg)" in caplog.text
    check(js.load(tmp_path / "out", SingleDeviceSharding(jax.devices()[0])), expected)
    verdict = js.verify(tmp_path / "out", against=place)
    (problem,) = verdict.problems
    assert problem.startswith(f"text: a text in {place}")


def test_save_for_orbax_takes_every_dtype_and_files_name_what_they_refuse(tmp_path) -> None:
    tree = {dtype: the_leaves()["of_jax"][dtype] for dtype in OF_JAX_ALONE}
    js.save(tree, tmp_path / "out", format="orbax")
    found = js.load(tmp_path / "out", SingleDeviceSharding(jax.devices()[0]))
    check(found, {dtype: np.asarray(array) for dtype, array in tree.items()})
    for dtype, array in tree.items():
        with pytest.raises(LayoutError, match=rf"w: files have no dtype for {dtype}"):
            js.save({"w": array}, tmp_path / "files")


def test_verify_does_not_speak_for_what_it_left_out(place, expected, tmp_path, capsys) -> None:
    assert checkpoints.run("verify", place) == 0
    said = capsys.readouterr().out
    assert "all is well" not in said
    assert "not checked: text (a text)" in said
    assert js.verify(place).unchecked == ("text (a text)",)
    js.convert(place, tmp_path / "out", include=["^nested", "^array0$"])
    assert checkpoints.run("verify", tmp_path / "out") == 0
    assert checkpoints.run("verify", tmp_path / "out", "--against", place) == 3
    said = capsys.readouterr().out
    assert "of_jax.int4: only in" in said
    assert "text: a text in" in said


def test_inspect_shows_every_leaf(place, expected, capsys) -> None:
    assert checkpoints.run("inspect", place, "--tensors") == 0
    said = capsys.readouterr().out
    for name, array in expected.items():
        line = next(line for line in said.splitlines() if line.split()[:1] == [name])
        if array.dtype.name in OF_ARRAYS and name != "of_jax.float4_e2m1fn":
            assert array.dtype.name in line or "F4" in line
    assert "beside tensors: text (a text)" in said


# --- random keys ----------------------------------------------------------------------------


def key_target(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    def struct(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, rows(np.empty(leaf.shape)))
        )

    return jax.tree.map(struct, tree)


def test_keys_are_restored_where_the_target_has_keys(place, tmp_path, caplog) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    keys = {n: the_leaves()[n] for n in ("key", "keys")}
    js.convert(place, tmp_path / "out", include=["^keys?$"])  # as data, of which they are made too
    caplog.clear()
    for source in (place, tmp_path / "out"):
        found = js.load(source, key_target(keys, mesh), include=["^keys?$"])
        for name, key in keys.items():
            assert found[name].dtype == key.dtype
            assert np.array_equal(jax.random.key_data(found[name]), jax.random.key_data(key))
        assert found["keys"].sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 1)
    assert "random keys" not in caplog.text
    js.load(place, SingleDeviceSharding(jax.devices()[0]), include=["^keys?$"])
    assert "2 random keys are loaded as their data" in caplog.text


def test_keys_of_another_generator_are_refused(place) -> None:
    here = SingleDeviceSharding(jax.devices()[0])
    other = jax.random.key(0, impl="unsafe_rbg")  # its data have the shape of rbg's
    keys = jax.random.split(other, 8)
    target = {"keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=here)}
    with pytest.raises(LayoutError, match="target has keys of unsafe_rbg, the checkpoint of rbg"):
        js.load(place, target, include=["^keys$"])


def test_a_damaged_description_of_arrays_is_an_error_with_its_path(tmp_path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
        saver.save(tmp_path / "in", {"key": jax.random.key(0), "w": jnp.ones(2)})
    (said,) = (tmp_path / "in" / "array_metadatas").iterdir()
    for text in ("{", "[]", "{}", '{"array_metadatas": [3]}'):
        said.write_text(text)
        with pytest.raises(FormatError, match="array_metadatas/process_0"):
            js.open(tmp_path / "in")


# --- states of Flax NNX ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.value", "b.value"], ["a", "b"]),
        (["a.value"], ["a"]),
        (["value"], ["value"]),
        (["attn.query", "attn.value"], ["attn.query", "attn.value"]),
        (["attn.query.value", "attn.value.value"], ["attn.query", "attn.value"]),
        # one that has neighbours: the word is a name in this checkpoint
        (["a.value", "b.value", "c.value", "c.key"], ["a.value", "b.value", "c.value", "c.key"]),
        (
            ["a.value", "b.value", "c.value", "c.value.w"],
            ["a.value", "b.value", "c.value", "c.value.w"],
        ),
        # a branch that is a state, beside others
        (["p.a.value", "p.b.value", *"cdef"], ["p.a", "p.b", *"cdef"]),
        (["v_head.value", *"abc"], ["v_head.value", *"abc"]),
    ],
)
def test_the_value_of_a_variable_adds_nothing_to_its_name(paths, names) -> None:
    assert leaf_names([tuple(path.split(".")) for path in paths]) == names


def test_a_short_name_that_another_leaf_has_is_not_used() -> None:
    assert leaf_names([("a", "b", "value"), ("a.b",)]) == ["a.b.value", "a.b"]


@pytest.fixture(scope="module")
def nnx() -> Any:
    return pytest.importorskip("flax.nnx", reason="flax is not installed")


def model_of(nnx: Any) -> Any:
    class Block(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.lin = nnx.Linear(8, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.blocks = nnx.List([Block(rngs), Block(rngs)])
            self.value = nnx.Linear(16, 1, rngs=rngs)  # a module of that name

    return Model


def abstract(nnx: Any, *filters: Any) -> Any:
    """The state as Flax's guide describes it, on this host's mesh."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    shapes = nnx.state(nnx.eval_shape(lambda: model_of(nnx)(nnx.Rngs(0))), *filters)

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        named = NamedSharding(mesh, rows(np.empty(leaf.shape, bool)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named)

    return jax.tree.map(struct, shapes)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for both in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (jax.random.key_data(z) if is_key(z) else z for z in both)
        assert both[0].dtype == both[1].dtype
        assert np.array_equal(x, y)


def saved_by_the_guide(nnx: Any, place: Path) -> Any:
    state = nnx.state(model_of(nnx)(nnx.Rngs(1)))
    with ocp.StandardCheckpointer() as saver:
        saver.save(place, state)
    return state


def test_a_state_that_the_guide_saves_loads_into_the_same_abstract_state(nnx, tmp_path) -> None:
    state = saved_by_the_guide(nnx, tmp_path / "in")
    with ocp.StandardCheckpointer() as reader:
        oracle = reader.restore(tmp_path / "in", abstract(nnx))
    found = js.load(tmp_path / "in", abstract(nnx))
    same(found, oracle)
    same(found, state)
    names = js.open(tmp_path / "in").tensors
    assert {"blocks.0.lin.kernel", "blocks.1.drop.rngs.key", "value.bias"} <= names.keys()


@pytest.mark.parametrize(
    "through", ["orbax", "huggingface", "orbax with .value", "files with .value"]
)
def test_both_spellings_of_a_variables_name_are_understood(nnx, tmp_path, through) -> None:
    state = saved_by_the_guide(nnx, tmp_path / "in")
    source = tmp_path / "in"
    if through == "huggingface":
        source = tmp_path / "out"
        js.convert(tmp_path / "in", source)
    elif "with" in through:  # as tensors were called before, or by others
        source = tmp_path / "out"
        format = "orbax" if "orbax" in through else "huggingface"
        found = js.load(tmp_path / "in", SingleDeviceSharding(jax.devices()[0]))
        js.save({f"{n}.value": a for n, a in found.items()}, source, format=format)
    same(js.load(source, abstract(nnx)), state)
    params = js.load(source, abstract(nnx, nnx.Param), exclude=["rngs", "norm.mean", "norm.var"])
    same(params, nnx.state(nnx.merge(nnx.graphdef(model_of(nnx)(nnx.Rngs(0))), state), nnx.Param))
    long = js.load(source, abstract(nnx), name_of=lambda name: f"{name}.value")
    same(long, state)
    (kernel,) = jax.tree.leaves(abstract(nnx)["value"]["kernel"])
    plain = js.load(source, {"value": {"kernel": {"value": kernel}}}, strict=False)
    same(plain["value"]["kernel"]["value"], *jax.tree.leaves(state["value"]["kernel"]))


def test_a_name_that_is_another_leafs_own_is_not_taken_for_it(tmp_path) -> None:
    js.save({"a": np.ones(2, np.float32)}, tmp_path / "in")
    here = SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(NotFoundError, match=r"1 names of the target .* a\.value"):
        js.load(tmp_path / "in", {"a": here, "a.value": here})


def test_flax_restores_by_its_guide_what_is_saved_for_orbax(nnx, tmp_path) -> None:
    state = nnx.state(model_of(nnx)(nnx.Rngs(1)))
    js.save(state, tmp_path / "out", format="orbax")
    with ocp.StandardCheckpointer() as reader:
        same(reader.restore(tmp_path / "out", abstract(nnx)), state)
    same(js.load(tmp_path / "out", abstract(nnx)), state)


def test_a_training_state_of_optax_and_linen_boxes_loads_into_itself(tmp_path) -> None:
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    boxed = {"w": nn.Partitioned(jnp.arange(8.0), ("x",)), "b": nn.Partitioned(jnp.ones(2), ())}
    state = {"params": boxed, "opt_state": optax.adam(1e-3).init(boxed), "key": jax.random.key(0)}
    here = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "theirs", state)
    js.save(state, tmp_path / "ours", format="orbax")
    for name in ("theirs", "ours"):
        same(js.load(tmp_path / name, like), state)
    with ocp.StandardCheckpointer() as reader:
        same(reader.restore(tmp_path / "ours", like), state)


@pytest.mark.parametrize(
    "names", ["llama-nnx:llama-hf", "llama-nnx-scan:llama-hf", "llama-maxtext:llama-hf"]
)
def test_tables_take_a_state_of_nnx_that_orbax_saved(nnx, tmp_path, names) -> None:
    checkpoints.write_llama(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    config.write_text(json.dumps({**json.loads(config.read_text()), **heads}))
    theirs = names.split(":")[0]
    arrays = js.load(
        tmp_path / "hf", SingleDeviceSharding(jax.devices()[0]), names=f"llama-hf:{theirs}"
    )
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = nnx.Param(array)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "in", nnx.State(tree))
    (tmp_path / "in" / "config.json").write_bytes(config.read_bytes())
    js.convert(tmp_path / "in", tmp_path / "out", names=names)
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(tmp_path / "hf")


def test_the_log_is_left_as_it_was(place) -> None:
    before = logging.getLogger("absl").level
    js.open(place)
    assert logging.getLogger("absl").level == before
