"""A private model in 25 lines: it is loaded, sharded, mapped and merged as the known ones.

python examples/own_model.py
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax

jax.config.update("jax_num_cpu_devices", 8)
import numpy as np  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

import jaxshard as js  # noqa: E402

TABLE = """
name = "ours"
types = ["ours"]
like = "common"
listed = ["hf", "nnx-scan", "trainer"]

[sizes]
token = "words"
embed = "width"
mlp = "inner"
heads = "heads"
kv_heads = "heads"
head_dim = "width / heads"

[forms.hf]
adapters = [
    "base_model.model.$module.lora_A.weight rank in",
    "base_model.model.$module.lora_B.weight out rank",
]
rows = '''
embed  words.weight                   token embed
-      block.{layer}.qkv.weight       (heads (q + k + v) head_dim) embed
o      block.{layer}.out.weight       embed (heads head_dim)
up     block.{layer}.up.weight        mlp embed
down   block.{layer}.down.weight      embed mlp
'''
[forms.trainer]
rows = '''
embed  params.words                   token embed | * sqrt(embed)
q      params.block.q                 layer embed heads head_dim
k      params.block.k                 layer embed heads head_dim
v      params.block.v                 layer embed heads head_dim
o      params.block.out               layer heads head_dim embed
up     params.block.up                layer embed mlp
down   params.block.down              layer mlp embed
'''
"""
CONFIG = {"model_type": "ours", "words": 96, "width": 64, "inner": 128, "heads": 8, "n_layer": 3}
RANK, ALPHA = 2, 4


def write(folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint of the model, and an adapter of its matrices ``up``, with random values."""
    random = np.random.default_rng(0)
    width, inner = CONFIG["width"], CONFIG["inner"]
    shapes = {
        "qkv": (3 * width, width),
        "out": (width, width),
        "up": (inner, width),
        "down": (width, inner),
    }
    model = {"words.weight": random.normal(size=(CONFIG["words"], width)).astype("float32")}
    adapter = {}
    for layer in range(CONFIG["n_layer"]):
        for name, shape in shapes.items():
            model[f"block.{layer}.{name}.weight"] = random.normal(size=shape).astype("float32")
        at = f"base_model.model.block.{layer}.up."
        adapter[at + "lora_A.weight"] = random.normal(size=(RANK, width)).astype("float32")
        adapter[at + "lora_B.weight"] = random.normal(size=(inner, RANK)).astype("float32")
    for name, tensors, config in (("model", model, CONFIG), ("adapter", adapter, None)):
        (folder / name).mkdir()
        file = "model" if config else "adapter_model"
        save_file(tensors, folder / name / f"{file}.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["up"], "peft_type": "LORA"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return {**model, **adapter}


def main() -> None:
    """Write a checkpoint, and do with it what can be done with any model."""
    js.register_models(TABLE)  # on the command line: --models FILE
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        true = write(folder)

        # sharded: heads and hidden units over mp; nobody wrote a rule
        params = js.load(folder / "model", "dp2mp4")
        for name in ("block.0.qkv.weight", "block.0.down.weight", "words.weight"):
            print(f"{name:22} {params[name].sharding.spec}")
            np.testing.assert_array_equal(params[name], true[name])

        # mapped: fused heads apart, layers stacked, matrices transposed, the embedding scaled
        trainer = js.load(folder / "model", "dp2mp4", names="hf:trainer")
        for name, x in trainer.items():
            print(f"{name:22} {x.shape!s:16} {x.sharding.spec}")
        q = true["block.1.qkv.weight"].reshape(8, 3, 8, 64)[:, 0]
        np.testing.assert_array_equal(trainer["params.block.q"][1], q.transpose(2, 0, 1))
        np.testing.assert_array_equal(trainer["params.words"], true["words.weight"] * 8)

        # saved as the checkpoint it was
        js.save(trainer, folder / "back", names="ours-trainer:ours-hf", config=CONFIG)
        for name, x in js.load(folder / "back", jax.devices()[0]).items():
            np.testing.assert_array_equal(x, true[name])

        # merged with an adapter
        js.merge_lora(folder / "model", folder / "merged", adapter=folder / "adapter")
        merged = js.load(folder / "merged", "mp4")["block.2.up.weight"]
        at = "base_model.model.block.2.up.lora_"
        product = true[at + "B.weight"] @ true[at + "A.weight"] * (ALPHA / RANK)
        np.testing.assert_allclose(merged, true["block.2.up.weight"] + product, atol=1e-5)
    print("loaded, sharded, mapped, saved and merged")


if __name__ == "__main__":
    main()
