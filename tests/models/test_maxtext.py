"""The forms ``maxtext`` and ``maxtext-unscanned`` against MaxText's own conversion."""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
maxtext_oracle = pytest.importorskip("maxtext_oracle", exc_type=ImportError)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from maxtext_oracle import Converter, nested  # noqa: E402
from tiny_models import MODELS, SQUARE, saved, tiny  # noqa: E402

import jaxshard as js  # noqa: E402
from jaxshard.conversion.execute import execute  # noqa: E402
from jaxshard.conversion.prepare import prepare  # noqa: E402
from jaxshard.devices.pytree import named_leaves  # noqa: E402
from jaxshard.loader import load  # noqa: E402
from jaxshard.models import Sizes, family_of  # noqa: E402
from jaxshard.rules import read_rules  # noqa: E402

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PERIOD = ["linear_attention"] * 3 + ["full_attention"]
#: by case: a model's kind and settings, and a model of MaxText with the same family
CASES = {
    "llama3": ("llama", {"attention_bias": False, "rope_parameters": SCALED}, "llama3.1-8b"),
    "qwen2": ("qwen2", {}, "qwen2.5-7b"),
    "qwen3": ("qwen3", {}, "qwen3-8b"),
    "gemma2": ("gemma2", {"num_hidden_layers": 4}, "gemma2-2b"),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 14}, "gemma3-4b"),
    "mixtral": ("mixtral", {"hidden_size": 120}, "mixtral-8x7b"),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}, "qwen3-30b-a3b"),
    "deepseek_v2": ("deepseek_v2_lite", {}, "deepseek2-16b"),
    "deepseek_v3": ("deepseek_v3", {}, "deepseek3-671b"),
    "gpt_oss": ("gpt_oss", {"num_hidden_layers": 4}, "gpt-oss-20b"),
    "olmo3": ("olmo3", {"num_hidden_layers": 8}, "olmo3-7b"),
    "qwen3_next": (
        "qwen3_next",
        {"num_hidden_layers": 8, "layer_types": PERIOD * 2},
        "qwen3-next-80b-a3b",
    ),
}
EVERY = [
    (case, form)
    for case in CASES
    for form in ("maxtext", "maxtext-unscanned")
    if (case, form) != ("qwen3_next", "maxtext")
]
HERE = jax.devices()[0]


def write(folder, kind, settings, dtype="float32", halved=False):
    """Save a tiny model with ``settings``; return its folder, config.json and tensors.

    The values of a ``halved`` one are also of float16.
    """
    model, config, others = MODELS[kind]
    MODELS["made"] = model, config, {**others, **settings}
    made = tiny("made").half() if halved else tiny("made")
    made.to(getattr(torch, dtype)).save_pretrained(folder)
    config, tensors = saved(folder)
    arrays = {n: np.asarray(jnp.asarray(t.float().numpy(), dtype)) for n, t in tensors.items()}
    return folder, config, arrays


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    @functools.cache
    def one(case, dtype="float32"):
        kind, settings, name = CASES[case]
        return (*write(tmp_path_factory.mktemp(case), kind, settings, dtype), name)

    return one


class Theirs:
    """MaxText's conversion of the model in ``folder``; gemma3's names are those of its images'."""

    def __init__(self, name, config, arrays, form):
        sizes = Sizes(family_of(config), config)
        self._before = "model."
        config = {**config, "head_dim": sizes["head_dim"]}
        if name.startswith("gemma3"):
            config = {"text_config": config, "vision_config": {"num_hidden_layers": 0}}
            self._before = "model.language_model."
        self._converter = Converter(name, config, form == "maxtext")
        self._converter.settings.num_experts = sizes.get("expert") or 0
        self._converter.settings.weight_dtype = str(next(iter(arrays.values())).dtype)
        self._arrays = self._named(arrays)
        self.names = self._converter.names(self._arrays)

    def _named(self, arrays):
        return {n.replace("model.", self._before, 1): x for n, x in arrays.items()}

    def to_maxtext(self, shapes):
        return self._converter.to_maxtext(self._arrays, shapes)

    def to_hf(self, arrays):
        found = self._converter.to_hf(arrays, {n: x.shape for n, x in self._arrays.items()})
        return {n.replace(self._before, "model.", 1): x for n, x in found.items()}


def same(mine, theirs):
    assert sorted(mine) == sorted(theirs)
    for name, array in mine.items():
        a, b = np.asarray(array), np.asarray(theirs[name])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "form"), EVERY)
def test_weights_are_what_maxtext_converts_them_to(models, case, form, dtype):
    folder, config, arrays, name = models(case, dtype)
    theirs = Theirs(name, config, arrays, form)
    mine = js.load(folder, HERE, names=f"hf:{form}")
    assert sorted(mine) == sorted(theirs.names)
    same(mine, theirs.to_maxtext({n: x.shape for n, x in mine.items()}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "form"), EVERY)
def test_maxtexts_weights_become_what_maxtext_exports(models, tmp_path, case, form, dtype):
    folder, config, arrays, name = models(case, dtype)
    theirs = Theirs(name, config, arrays, form)
    mine = js.load(folder, HERE, names=f"hf:{form}")
    js.save(mine, tmp_path / "maxtext", extras=folder)
    back = js.load(tmp_path / "maxtext", HERE, names=f"{form}:hf")
    exported = theirs.to_hf({n: np.asarray(x) for n, x in mine.items()})
    assert sorted(back) == sorted(exported) == sorted(arrays)
    for n, x in back.items():
        if n == "model.embed_tokens.weight" and case.startswith("gemma") and dtype == "float32":
            # MaxText divides by the factor; here values are multiplied by its inverse
            np.testing.assert_array_almost_equal_nulp(np.asarray(x), exported[n], nulp=2)
        else:
            same({n: x}, {n: exported[n]})


OLDER = {"llama2": ("llama", "llama2-7b"), "mistral": ("mistral", "mistral-7b"),
         "mixtral": ("mixtral", "mixtral-8x7b")}  # fmt: skip


@pytest.mark.parametrize("case", OLDER)
def test_older_models_return_by_maxtexts_script_of_their_own(tmp_path, case):
    kind, name = OLDER[case]
    wide = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    settings = {**SQUARE, **wide, "attention_bias": False}
    folder, config, arrays = write(tmp_path / "hf", kind, settings, halved=True)
    mine = js.load(folder, HERE, names="hf:maxtext")
    theirs = maxtext_oracle.older_to_hf(name, config, jax.tree.map(np.asarray, mine))
    same(theirs, {n: x.astype(np.float16) for n, x in arrays.items()})


@pytest.mark.parametrize(
    ("listed", "model"),
    [("llama3", "llama3.1-8b"), ("gemma3", "gemma3-4b"), ("qwen3", "qwen3-4b")],
)
def test_names_and_shapes_of_published_models_are_in_maxtexts_lists(listed, model):
    config = maxtext_oracle.published_config(model)
    config = config.get("text_config", config)
    family, shapes = family_of(config), maxtext_oracle.listed_shapes(listed)
    text = {n: shape for n, shape in shapes.items() if "vision" not in n}
    sizes = Sizes(family, config)
    rows = {n: family.find("maxtext-unscanned", n) for n in text}
    assert [n for n, weight in rows.items() if weight is None] == []
    for n, weight in rows.items():
        axes = family.form("maxtext-unscanned")[weight].axes
        assert tuple(map(sizes.length, axes.dims)) == text[n], n


# --- Trees and checkpoints as MaxText has them


NESTINGS = {
    "weights": lambda tree: tree["params"],
    "collection": lambda tree: tree,
    "state": lambda tree: {"params": tree},
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_tree_is_filled_however_its_params_are_nested(models, nesting):
    folder, *_ = models("llama3")
    mine = js.load(folder, HERE, names="hf:maxtext")
    tree = NESTINGS[nesting](nested(mine))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    filled = js.load(folder, abstract, names="hf:maxtext")
    assert jax.tree.structure(filled) == jax.tree.structure(tree)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, filled, tree)))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_checkpoint_returns_however_its_params_are_nested(models, tmp_path, nesting):
    ocp = pytest.importorskip("orbax.checkpoint")
    folder, config, arrays, _ = models("qwen3")
    tree = NESTINGS[nesting](nested(js.load(folder, HERE, names="hf:maxtext")))
    if nesting == "state":  # what the trainer saves
        tree |= {"step": jnp.zeros((), int), "opt_state": {"mu": jnp.zeros(3)}}
    with ocp.PyTreeCheckpointer() as saver:
        saver.save((tmp_path / "0" / "items").absolute(), tree)
    chosen = {"include": ["^params"]} if nesting == "state" else {}
    path = tmp_path / "0"
    same(js.load(path, HERE, names="maxtext:hf", config=config, **chosen), arrays)
    same(js.load(path, HERE, names="auto:hf", config=config, **chosen), arrays)


def test_a_vocabulary_is_padded_as_maxtext_pads_it_and_returns(models, tmp_path, caplog):
    folder, config, arrays, name = models("gemma2")
    mine = js.load(folder, HERE, names="hf:maxtext")
    here = jax.sharding.SingleDeviceSharding(HERE)
    wanted = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for n, x in mine.items()}
    embed = "params.token_embedder.embedding"
    wanted[embed] = jax.ShapeDtypeStruct((128, 84), mine[embed].dtype, sharding=here)
    filled = dict(named_leaves(js.load(folder, {"params": nested(wanted)}, names="hf:maxtext"))[0])
    filled = {n.removeprefix("params."): x for n, x in filled.items()}
    shapes = {n: x.shape for n, x in filled.items()}
    same(filled, Theirs(name, config, arrays, "maxtext").to_maxtext(shapes))
    js.save(filled, tmp_path / "maxtext", extras=folder)
    back = js.load(tmp_path / "maxtext", HERE, names="maxtext:hf")
    assert {n: x.shape for n, x in back.items()} == {n: x.shape for n, x in arrays.items()}
    assert "the vocabulary of 104 is padded with zeros to 128" in caplog.text
    assert "the vocabulary is padded to 128; 104 are taken" in caplog.text


#: where MaxText's logical axes are on a mesh of fsdp and tensor
ON_MESH = {
    "embed": "fsdp",
    **dict.fromkeys(("heads", "kv_heads", "mlp", "moe_mlp", "token", "vocab"), "tensor"),
}


def specs(config, form, names):
    """Return the mesh axis of each dim of each name, by its row's axes."""
    family, made = family_of(config), {}
    for name in names:
        axes = family.form(form)[family.find(form, name)].axes
        made[name] = [ON_MESH.get(dim.names[0]) for dim in axes.dims]
    return made


@pytest.mark.parametrize("case", ["llama3", "gemma2", "qwen3_moe"])
def test_all_devices_together_read_every_byte_once(models, case):
    folder, config, arrays, _ = models(case)
    whole = js.load(folder, HERE, names="hf:maxtext")
    mesh, counts = jax.make_mesh((4, 2), ("fsdp", "tensor")), []
    target = {
        n: NamedSharding(mesh, PartitionSpec(*spec))
        for n, spec in specs(config, "maxtext", whole).items()
    }
    made = load(folder, nested(target), names="hf:maxtext", counted=counts.append)
    same(dict(named_leaves(made)[0]), whole)
    assert counts[0].bytes_read == counts[0].bytes_needed == sum(x.nbytes for x in arrays.values())


@pytest.mark.parametrize("case", ["llama3", "gemma2"])
def test_a_rank_reads_the_bytes_of_its_shards(tmp_path, case):
    kind, settings, _ = CASES[case]
    wide = {  # the parts of a row that one of two ranks has are longer than a page
        "hidden_size": 64,
        "intermediate_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "num_hidden_layers": 2,
    }
    folder, config, arrays = write(tmp_path / "hf", kind, {**settings, **wide})
    whole = js.load(folder, HERE, names="hf:maxtext")
    cut = {
        n: ["mp" if axis == "tensor" else "-" for axis in spec]
        for n, spec in specs(config, "maxtext", whole).items()
    }
    rules = read_rules(
        "[specs]\n" + "\n".join(f'"{n}" = "{",".join(spec)}"' for n, spec in cut.items()), "test"
    )
    prepared = prepare(folder, "mp2", names="hf:maxtext", rules=rules, rank=[1])
    counts = execute(prepared, tmp_path / "rank", fsync=False).counts
    needed = sum(x.nbytes // (2 if "mp" in cut[n] else 1) for n, x in whole.items())
    assert counts.bytes_needed == needed < 0.6 * sum(x.nbytes for x in arrays.values())
    assert counts.bytes_read <= 1.05 * needed


def test_a_family_that_maxtext_does_not_have_is_refused(tmp_path):
    folder, _, _ = write(tmp_path / "hf", "granite", {})
    with pytest.raises(js.JaxshardError, match=r"granite.*maxtext"):
        js.load(folder, HERE, names="hf:maxtext")
