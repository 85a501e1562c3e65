"""Planning at scale and starting up: what a person waits for before any byte moves.

    python benchmarks/plan.py [--rounds 5] [--dir DISK] [--save] [--smoke]

A checkpoint in the shape of DeepSeek-V3 (91,991 tensors in 163 sparse files with real
headers) is inspected, and planned for 2,048 ranks in several ways. Answers are checked
against sums made here from names and shapes alone. Every sample is a fresh process; times are
told, memory is asserted.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import measure
from deepseek import ITEM_BYTES, SMOKE, DeepSeek, write_deepseek
from measure import JAXSHARD

_MOST_BYTES = 10**9
_PROMISED_S = {"import jaxshard": 0.15, "jaxshard --help": 0.3, "inspect": 3.0, "plan": 10.0}
_LAYOUTS = ("dp8mp16pp16", "dp16mp8pp16ep16", "dp128mp16")
_SMOKE_LAYOUTS = ("dp2mp4pp2", "dp4mp2pp2ep4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to put the sparse files")
    parser.add_argument("--save", action="store_true", help="keep the results with the project's")
    parser.add_argument("--smoke", action="store_true", help="tiny: the answers, not the clock")
    options = parser.parse_args()
    model, num_files = (SMOKE, 3) if options.smoke else (DeepSeek(), 163)
    layouts = _SMOKE_LAYOUTS if options.smoke else _LAYOUTS
    rounds = 1 if options.smoke else options.rounds
    measure.patience_s = 0 if options.smoke else measure.patience_s
    work = Path(tempfile.mkdtemp(prefix="jaxshard-bench-", dir=options.dir))
    try:
        num_tensors, num_bytes = write_deepseek(work, model, num_files=num_files)
        results: dict[str, object] = {
            "tensors": num_tensors,
            "bytes": num_bytes,
            "load_before": measure.load(),
            "start_up": start_up(rounds * 2 + 1),
            "inspect": inspect(work, num_tensors, num_bytes, rounds),
            "plan": plan(work, model, layouts, rounds),
            "load_after": measure.load(),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(results)
    if options.save:
        print(f"kept in {measure.save('plan', results)}")


def start_up(rounds: int) -> dict[str, object]:
    """Wall and processor time of the shortest commands, beside those of Python alone."""
    python = [sys.executable, "-c"]
    commands = {
        "python": [*python, "pass"],
        "import numpy": [*python, "import numpy"],
        "import jaxshard": [*python, "import jaxshard"],
        "jaxshard --help": [*JAXSHARD, "--help"],
    }
    measure.wait_for_quiet()
    samples = measure.in_turns(
        {name: lambda c=command: measure.run(c) for name, command in commands.items()}, rounds
    )
    loaded = measure.run([*python, "import jaxshard, sys; print(*sys.modules)"]).output.split()
    assert not {"jax", "numpy"} & set(loaded), "import jaxshard woke JAX or NumPy"
    return {name: measure.summary(each) for name, each in samples.items()}


def inspect(work: Path, num_tensors: int, num_bytes: int, rounds: int) -> dict[str, object]:
    """``inspect``: its time, its memory, and whether it counts right."""
    command = [*JAXSHARD, "inspect", str(work)]
    watched = measure.run([*command, "--json"], watch=True)
    told = json.loads(watched.output)
    assert (told["num_tensors"], told["num_bytes"]) == (num_tensors, num_bytes), "miscounted"
    assert watched.peak_rss_bytes < _MOST_BYTES, watched
    samples = []
    for _ in range(rounds):
        measure.wait_for_quiet()
        samples.append(measure.run(command))
    return {**measure.summary(samples), "peak_rss_mb": round(watched.peak_rss_bytes / 1e6)}


def plan(
    work: Path, model: DeepSeek, layouts: tuple[str, ...], rounds: int
) -> dict[str, dict[str, object]]:
    """``plan`` for each layout, with and without redundancy."""
    found: dict[str, dict[str, object]] = {}
    for layout in layouts:
        for more in ([], ["--remove-redundancy"]):
            command = [*JAXSHARD, "plan", str(work), "--to", layout, *more]
            watched = measure.run([*command, "--json"], watch=True)
            told = json.loads(watched.output)
            check(told, model, layout, is_lean=bool(more))
            assert watched.peak_rss_bytes < _MOST_BYTES, watched
            samples = []
            for _ in range(rounds):
                measure.wait_for_quiet()
                samples.append(measure.run(command))
            found[" ".join([layout, *more])] = {
                **measure.summary(samples),
                "peak_rss_mb": round(watched.peak_rss_bytes / 1e6),
                "num_copies": told["num_copies"],
                "num_writes": told["num_writes"],
            }
    return found


def check(told: dict, model: DeepSeek, layout: str, *, is_lean: bool) -> None:
    """Whether a plan's bytes are those that names, shapes and the strategy ask for."""
    ways = {axis: int(n) for axis, n in re.findall(r"([a-z]+)(\d+)", layout)}
    dp, mp, ep, pp = ways["dp"], ways["mp"], ways.get("ep", 1), ways.get("pp", 1)
    needed = written = 0
    for name, kind, shape in model.tensors():
        size = ITEM_BYTES[kind] * math.prod(shape)
        needed += size
        replicas = dp // ep if ".experts." in name else dp
        written += size * (1 if is_lean else replicas * (1 if _is_cut(name) else mp))
    assert told["bytes_needed"] == told["bytes_read"] == needed, (told["bytes_read"], needed)
    assert told["bytes_written"] == written, (layout, told["bytes_written"], written)
    assert sum(told["rank_bytes"]) == written, layout
    assert len(told["rank_bytes"]) == dp * mp * pp, layout


_CUT = re.compile(
    r"(embed_tokens|lm_head|shared_head\.head|q_b_proj|kv_b_proj|o_proj"
    r"|gate_proj|up_proj|down_proj)\.weight(_scale_inv)?$"
)


def _is_cut(name: str) -> bool:
    """Whether tensor-parallel ranks hold parts of it, and not all of it."""
    return bool(_CUT.search(name))


def show(results: dict[str, object]) -> None:
    """The results as a person reads them."""
    print(measure.machine())
    print(f"{results['tensors']:,} tensors, {results['bytes'] / 1e12:.2f} TB")
    print(f"load {results['load_before']} before, {results['load_after']} after")
    rows = {**results["start_up"], "inspect": results["inspect"]}
    rows |= {f"plan {name}": numbers for name, numbers in results["plan"].items()}
    for name, row in rows.items():
        limit = _PROMISED_S.get(name.split()[0], _PROMISED_S.get(name))
        print(
            f"{name:<42} {row['wall_s']:.3f} s"
            + (f" of {limit}" if limit else "")
            + f", cpu {row['cpu_s']:.3f} s"
            + (f", {row['peak_rss_mb']} MB" if "peak_rss_mb" in row else "")
            + f"  {row['all_wall_s']}"
        )


if __name__ == "__main__":
    main()
