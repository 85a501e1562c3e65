"""The demo: convert, load, reshard, save and verify one checkpoint, bit for bit.

Each result is compared with the original.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..api import convert, merge, slice, verify
from ..conversion.load_rank import load_rank
from ..conversion.open import open_checkpoint
from ..core.catalog import Catalog
from ..core.dtypes import dtype
from ..errors import CoverageError, LayoutError, StorageError, format_list
from ..formats.safetensors import layout_file
from ..models.facts import text_config
from ..planning import pictures
from . import write_json

_LAYERS, _HIDDEN, _FFN, _VOCAB, _KV = 4, 512, 1408, 8192, 256


def run_demo(
    path: str | None, *, keep: str | None = None, quiet: bool = False, as_json: bool = False
) -> int:
    """Run the demo on the checkpoint at ``path``, or on a generated one.

    Results are written to ``keep``, which must be new or empty, or to a temporary directory.
    Returns the exit status, which is 0 because any difference raises.
    """
    echo: Callable[[str], None] = (lambda text: None) if quiet else print
    with _workplace(keep) as place:
        source = Path(path) if path else _make_llama(place / "llama")
        catalog = open_checkpoint(source)
        echo(pictures.catalog_text(catalog))
        steps = [*_on_files(catalog, place, echo), *_on_devices(catalog, place, echo)]
        echo(
            "\nevery result equals the source, bit for bit" + (f"; kept in {keep}" if keep else "")
        )
    if as_json:
        write_json({"source": str(source), "steps": steps})
    return 0


def _on_files(
    catalog: Catalog, place: Path, echo: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    echo("\nfile to file")
    with _step("slice into 8 ranks, dp2mp4, each shard stored once", echo) as done:
        slice(catalog, place / "dp2mp4", "dp2mp4", remove_redundancy=True, fsync=False)
        yield done
    with _step("convert to 4 ranks in 2 stages, dp1mp2pp2", echo) as done:
        convert(place / "dp2mp4", place / "dp1mp2pp2", "dp1mp2pp2", fsync=False)
        yield done
    with _step("merge, and compare with the source", echo) as done:
        merge(place / "dp1mp2pp2", place / "merged", fsync=False)
        _compare(place / "merged", catalog)
        yield done


def _on_devices(
    catalog: Catalog, place: Path, echo: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    import jax  # noqa: PLC0415 - the file-to-file part needs no JAX

    from ..api import reshard  # noqa: PLC0415
    from ..loader import load  # noqa: PLC0415
    from ..saver import save  # noqa: PLC0415

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    echo(f"\non {jax.device_count()} CPU devices")
    tensors = {n: t for n, t in catalog.tensors.items() if n not in catalog.scalars}
    weights = replace(catalog, tensors=tensors)  # rules place weights, not training scalars
    config = dict(catalog.model.config) or None
    kv_heads = text_config(catalog.model.config).get("num_key_value_heads")
    ways = next(n for n in (4, 2, 1) if not isinstance(kv_heads, int) or kv_heads % n == 0)
    first, second = f"dp{8 // ways}mp{ways}", "dp4mp2" if ways > 1 else "fsdp8"
    with _step(f"load as {first}", echo) as done:
        params = jax.block_until_ready(load(weights, first))
        yield done
    with _step(f"reshard on the devices to {second}", echo) as done:
        params = jax.block_until_ready(reshard(params, second, config=config))
        yield done
    with _step("save from the devices, and compare with the source", echo) as done:
        save(params, place / "saved", config=config, fsync=False)
        _compare(place / "saved", weights)
        yield done
    with _step("load the rank files of dp1mp2pp2 as fsdp8, and compare", echo) as done:
        _compare_arrays(load(place / "dp1mp2pp2", "fsdp8"), catalog)
        yield done


def _compare(made: Path, catalog: Catalog) -> None:
    problems = verify(made, against=catalog).problems
    if problems:
        raise CoverageError(f"{made} differs from the original: {problems[0]}")


def _compare_arrays(params: dict[str, Any], catalog: Catalog) -> None:
    """Compare arrays with the tensors of ``catalog``, read as NumPy arrays."""
    original = load_rank(catalog, "full", keep_accu_grads=True)
    if params.keys() != original.keys():
        raise CoverageError(
            f"{format_list(sorted(params.keys() ^ original.keys()))}: not in both checkpoints."
        )
    for name, array in params.items():
        if np.asarray(array).tobytes() != original[name].tobytes():
            raise CoverageError(f"{name} differs from the original.")


@contextmanager
def _step(what: str, echo: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    done: dict[str, Any] = {"step": what}
    start = perf_counter()
    yield done
    done["seconds"] = round(perf_counter() - start, 3)
    echo(f"  {what:<54} {done['seconds']:6.2f} s")


@contextmanager
def _workplace(keep: str | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="jaxshard-demo-") as name:
            yield Path(name)
        return
    try:
        Path(keep).mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in Path(keep).iterdir())
    except OSError as error:
        raise StorageError(f"--keep {keep}: {error.strerror}. Choose another folder.") from error
    if found:
        raise LayoutError(
            f"--keep {keep}: the folder is not empty ({format_list(found, 3)}). Choose a new or an "
            "empty folder."
        )
    yield Path(keep)


def _make_llama(folder: Path) -> Path:
    """Write a small Llama checkpoint with grouped-query attention and random bfloat16 weights."""
    shapes = dict(_llama_shapes())
    folder.mkdir(parents=True, exist_ok=True)
    file = layout_file([(n, dtype("BF16"), s) for n, s in shapes.items()], {"format": "pt"})
    random = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(file.segments[0][1])
        for name in file.offsets:
            values = random.standard_normal(int(np.prod(shapes[name])), np.float32) * 0.02
            out.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    config = {
        "model_type": "llama",
        "num_hidden_layers": _LAYERS,
        "hidden_size": _HIDDEN,
        "intermediate_size": _FFN,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": _VOCAB,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _llama_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (_VOCAB, _HIDDEN)
    for i in range(_LAYERS):
        layer = f"model.layers.{i}."
        yield layer + "self_attn.q_proj.weight", (_HIDDEN, _HIDDEN)
        yield layer + "self_attn.k_proj.weight", (_KV, _HIDDEN)
        yield layer + "self_attn.v_proj.weight", (_KV, _HIDDEN)
        yield layer + "self_attn.o_proj.weight", (_HIDDEN, _HIDDEN)
        yield layer + "mlp.gate_proj.weight", (_FFN, _HIDDEN)
        yield layer + "mlp.up_proj.weight", (_FFN, _HIDDEN)
        yield layer + "mlp.down_proj.weight", (_HIDDEN, _FFN)
        yield layer + "input_layernorm.weight", (_HIDDEN,)
        yield layer + "post_attention_layernorm.weight", (_HIDDEN,)
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (_VOCAB, _HIDDEN)
