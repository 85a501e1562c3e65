"""Mutated texts for every decoder of text: a value or one of jaxshard's errors, never another.

    python tests/support/text_fuzz.py [--count 20000] [--seed 0]

Each input is a small valid checkpoint, adapter, configuration or rules file, one text of
which was changed: bytes flipped, cut or repeated, or a value of its tree replaced.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
from safetensors.numpy import save_file

import jaxshard as js
from jaxshard import mindformers
from jaxshard.lora import with_adapter
from jaxshard.mapping import read_mapping
from jaxshard.rules import read_rules

_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, 0.5, "", "x", "\x00", "\x1b[2J",
    "../x", "/etc/passwd", "é" * 3, "a" * 5000, [], {}, [[]], [None], {"": None}, [1] * 70,
    {"model_type": "llama"}, "llama", "F32", [2**40, 2**40], ["x"], {"x": "y"},
)  # fmt: skip
_TEXTS = (
    b"[" * 30000,
    b"{" * 30000,
    b"9" * 10000,
    b"",
    b"\xff\xfe",
    b"null",
    b"NaN",
    b"[1,2",
    b'{"a":1,"a":2}',
)
_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2,
    "tie_word_embeddings": False, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 4,
    "num_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 8, "torch_dtype": "bfloat16",
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "text_config": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "bits": 8},
}  # fmt: skip
_YAML = """\
load_checkpoint: ./src
auto_trans_ckpt: True
resume_training: False
use_parallel: &yes True
parallel_config: &sizes
  data_parallel: 1
  model_parallel: 2
  pipeline_stage: 1
parallel: {full_batch: *yes, <<: *sizes}
runner_config: {epochs: 2, sink_mode: True, sink_size: 1}
callbacks:
  - type: CheckpointMonitor
    prefix: llama
    save_checkpoint_steps: 10
    keep_checkpoint_max: 3
"""
_YAML_LINES = (
    "a: 2021-99-99", "a: !!int abc", "a: !!float x", "a: !!python/object:os.system x", "a: 1:2:3:4",
    "a: " + "1:" * 500 + "1", "a: " + "9" * 10000, "? [a]\n: b", "a: *nothing", "a: &x [*x]",
    "a: " + "[" * 5000, "<<: [1]", "a: !!binary x", "a: !!timestamp y", "a: !!set {x: y}",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]",
)  # fmt: skip
_RULES = """\
name = "mine"
[specs]
"*.up_proj.weight" = "mp,-"
[stages]
layers = "model.layers.{layer}."
first = ["model.embed_tokens.*"]
layers_per_stage = [1, 1]
[experts]
names = "*.experts.{expert}."
"""
_TOML_LINES = (
    "a=" + "[" * 20000, "a=" + "9" * 10000, "a." * 20000 + "b=1", '"a".' * 20000 + "b=1",
    "a=" + "{a=" * 5000, "d=2021-99-99", "t=25:00:00", "a=0x" + "f" * 9000, "a=nan", "[a]\n[a]",
    '"\\ud800"=1', "a=1e999999",
)  # fmt: skip
_MAPPING = """\
name = "mine:theirs"
[[op]]
op = "rename"
rules = [["h.{layer}.{rest*}", "layers.{layer}.{rest*}"]]
[[op]]
op = "transpose"
names = ["layers.{layer}.mlp.kernel"]
"""


@dataclass(frozen=True)
class Case:
    """One text of a valid input, and the call that decodes it."""

    name: str
    path: Path
    decode: Callable[[], object]
    lines: tuple[str, ...] = ()


def make_cases(folder: Path) -> list[Case]:
    """Write the valid inputs below ``folder``; one case for each text in them."""
    source = folder / "hf"
    checkpoints.write_llama(source, num_files=2)
    (source / "config.json").write_text(json.dumps(_CONFIG))
    made = {"hf": source}
    for name, to, options in (
        ("iteration", "dp1mp2", {"format": "iteration"}),
        ("unified", "full", {"format": "unified"}),
        ("ranks", "dp1mp2pp2", {}),
        ("layout", "dp1mp2", {"include": ["q_proj"], "names": None}),
        ("named", "full", {"names": "llama-hf:llama-mindformers"}),
    ):
        made[name] = folder / name
        js.convert(source, made[name], to, fsync=False, **options)
    cases = []
    for name, place in made.items():
        for path in sorted(p for p in place.rglob("*.json") if p.name != "tokenizer.json"):
            cases.append(Case(f"{name}/{path.name}", path, _opening(place, folder)))
    cases += _adapter(folder, source)
    for name, text, lines, decode in (
        ("job.yaml", _YAML, _YAML_LINES, mindformers.from_config),
        ("rules.toml", _RULES, _TOML_LINES, lambda p: read_rules(_text(p))),
        ("mapping.toml", _MAPPING, _TOML_LINES, lambda p: read_mapping(_text(p))),
    ):
        path = folder / name
        path.write_text(text)
        cases.append(Case(name, path, lambda d=decode, p=path: d(p), lines))
    return cases


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _opening(place: Path, folder: Path) -> Callable[[], object]:
    def decode() -> object:
        catalog = js.open(place)
        js.plan(catalog, "dp1mp2")
        if place.name == "hf":
            js.plan(catalog, "pp2", names="auto:mindformers")
        return js.plan(catalog, "dp1mp2", format="iteration")

    return decode


def _adapter(folder: Path, source: Path) -> Iterator[Case]:
    place = folder / "adapter"
    place.mkdir()
    pair = {"A": np.ones((2, 16), np.float32), "B": np.ones((16, 2), np.float32)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{module}.lora_{k}.weight": v for k, v in pair.items()},
        place / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 8}, "target_modules": ["q_proj"], "modules_to_save": None,
        "use_rslora": False, "fan_in_fan_out": False, "layers_pattern": None,
    }  # fmt: skip
    path = place / "adapter_config.json"
    path.write_text(json.dumps(config))
    yield Case("adapter_config.json", path, lambda: with_adapter(source, place))


def mutated(rng: random.Random, data: bytes, lines: tuple[str, ...]) -> bytes:
    """``data`` with one to three changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        what = rng.randrange(5)
        if what == 0 and lines:
            data = data + b"\n" + rng.choice(lines).encode("utf-8", "surrogatepass")
        elif what <= 1:
            data = _tree(rng, data)
        elif what == 2:
            at = rng.randrange(len(data) + 1)
            data = data[:at] + bytes((rng.randrange(256),)) + data[at + rng.randrange(3) :]
        elif what == 3:
            at, n = rng.randrange(len(data) + 1), rng.randrange(1, 40)
            data = rng.choice((data[:at], data[:at] + data[at : at + n] * 2 + data[at + n :]))
        else:
            at = rng.randrange(len(data) + 1)
            data = rng.choice((data[:at] + rng.choice(_TEXTS) + data[at:], rng.choice(_TEXTS)))
    return data


def _tree(rng: random.Random, data: bytes) -> bytes:
    """``data``, a JSON text, with one of its values replaced, removed or renamed."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    holders = list(_holders(tree))
    if not holders:
        return json.dumps(rng.choice(_VALUES)).encode()
    holder, key = rng.choice(holders)
    what = rng.randrange(4)
    if what == 0 and isinstance(holder, dict):
        holder[str(rng.choice(_VALUES))] = holder.pop(key)
    elif what == 1:
        del holder[key]
    else:
        holder[key] = rng.choice(_VALUES)
    return json.dumps(tree).encode()


def _holders(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield tree, key
        yield from _holders(value)


def run(count: int, seed: int, max_seconds: float = 5) -> tuple[Counter[str], list[str]]:
    """Decode ``count`` mutated texts; how they ended, and each failure."""
    rng = random.Random(seed)
    ended: Counter[str] = Counter()
    failures: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="text-fuzz-"))
    logging.disable(logging.WARNING)  # thousands of notes
    try:
        cases = make_cases(folder)
        originals = {c.name: c.path.read_bytes() for c in cases}
        for number in range(count):
            case = cases[number % len(cases)]
            data = mutated(rng, originals[case.name], case.lines)
            case.path.write_bytes(data)
            began = time.process_time()
            try:
                case.decode()
                ended["decoded"] += 1
            except js.JaxshardError as error:
                ended[type(error).__name__] += 1
            except Exception as error:
                ended["FAILED"] += 1
                failures.append(f"{case.name}: {type(error).__name__}: {error}: {data[:300]!r}")
            if time.process_time() - began > max_seconds:
                failures.append(f"{case.name}: more than {max_seconds} s: {data[:300]!r}")
            case.path.write_bytes(originals[case.name])
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder)
    return ended, failures


def main() -> int:
    """Print how the inputs ended; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    ended, failures = run(given.count, given.seed)
    print(dict(ended))
    print("\n".join(failures[:40]))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
