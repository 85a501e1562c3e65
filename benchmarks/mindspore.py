"""MindSpore rank folders against ``cp -r``: merged, cut, and cut anew.

    python benchmarks/mindspore.py [--gigabytes 1.9] [--rounds 5] [--dir DISK] [--save] [--smoke]

The checkpoint is one of a job in training: two pipeline stages of dp2 x mp2, bfloat16
weights and both Adam states, every replica stored, in MindFormers' names. Each result is
compared byte for byte with the tensors that it was made from, by code that shares nothing
with jaxshard. A conversion is held against ``cp -r`` of its own result: as many bytes
written. Peak memory is asserted; times are told. How long one large ``.ckpt`` takes to open is
told too, for each thousand tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
from measure import JAXSHARD, Sample
from models import _base, _data

import jaxshard
from jaxshard.core.dtypes import BY_NAME
from jaxshard.core.layout import Strategy
from jaxshard.formats import mindspore_ckpt, strategy_files
from jaxshard.rules import layout as lay_out
from jaxshard.rules import rules_for

_SOURCE, _TARGET = "dp2mp2pp2", "dp1mp4"
_MP, _STAGE_RANKS, _STAGES = 2, 4, 2
_STATES = ("", "adam_m.", "adam_v.")
_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # split by columns; norms by nothing
_SLACK_BYTES = 100_000_000  # beside the budget: the interpreter, the plan
_BUDGETS = {"64MiB": 64 << 20, "256MiB": 256 << 20}
_REAL_BYTES = 10**8


@dataclass(frozen=True, slots=True)
class Job:
    """The sizes of the model; as they stand, 1.93 GB with its states."""

    layers: int = 20
    hidden: int = 1024
    intermediate: int = 2816
    vocab: int = 32000

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, states included, in the order of the files."""
        h, f = self.hidden, self.intermediate
        weights: dict[str, tuple[int, ...]] = {
            "model.tok_embeddings.embedding_weight": (self.vocab, h)
        }
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            weights |= {f"{layer}attention.{n}.weight": (h, h) for n in ("wq", "wk", "wv", "wo")}
            weights |= {
                f"{layer}attention_norm.weight": (h,),
                f"{layer}feed_forward.w1.weight": (f, h),
                f"{layer}feed_forward.w2.weight": (h, f),
                f"{layer}feed_forward.w3.weight": (f, h),
                f"{layer}ffn_norm.weight": (h,),
            }
        weights |= {"model.norm_out.weight": (h,), "lm_head.weight": (self.vocab, h)}
        return {f"{state}{n}": shape for state in _STATES for n, shape in weights.items()}

    def stage(self, name: str) -> int:
        """The pipeline stage of a tensor: half of the layers each."""
        if "tok_embeddings" in name:
            return 0
        if "layers." not in name:
            return 1
        return int(int(name.split("layers.")[1].split(".", maxsplit=1)[0]) >= self.layers // 2)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return sum(2 * math.prod(shape) for shape in self.shapes().values())


SMOKE = Job(layers=4, hidden=64, intermediate=128, vocab=256)


def job_of(num_bytes: int) -> Job:
    """The job of about ``num_bytes``."""
    fixed = Job(layers=0).num_bytes
    each = Job(layers=1).num_bytes - fixed
    return Job(layers=2 * max(1, round((num_bytes - fixed) / each / 2)))


@dataclass(frozen=True)
class Bench:
    """The folders of one run, all on one disk."""

    work: Path
    job: Job

    def place(self, what: str) -> Path:
        return self.work / what

    def command(self, what: str, out: Path, *more: str) -> list[str]:
        """The jaxshard command that makes ``what``."""
        ranks, whole = str(self.place("ranks")), str(self.place("whole"))
        verbs = {
            "merge": ["merge", ranks, str(out)],
            "slice": ["slice", whole, str(out), "--to", _SOURCE],
            "convert": ["convert", ranks, str(out), "--to", _TARGET],
        }
        return [*JAXSHARD, *verbs[what], "--json", *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="the disk to measure on (default: temporary)")
    parser.add_argument("--save", action="store_true", help="keep the results with the project's")
    parser.add_argument("--smoke", action="store_true", help="tiny: the answers, not the clock")
    options = parser.parse_args()
    job = SMOKE if options.smoke else job_of(int(options.gigabytes * 1e9))
    results: dict[str, object] = {"bytes": job.num_bytes, "load_before": measure.load()}
    with _bench(job, options.dir) as bench:
        results["file_system"] = measure.file_system(bench.work)
        results["counts"] = check_answers(bench)
        results["memory"] = check_memory(bench)
        results["opening"] = time_opening(bench, 20 if options.smoke else 5000)
        results["time"] = time_all(bench, 1 if options.smoke else options.rounds)
    results["load_after"] = measure.load()
    show(results)
    if options.save:
        print(f"kept in {measure.save('mindspore', results)}")


@contextmanager
def _bench(job: Job, disk: Path | None) -> Iterator[Bench]:
    work = Path(tempfile.mkdtemp(prefix="jaxshard-bench-", dir=disk))
    try:
        bench = Bench(work, job)
        write_ranks(bench.place("ranks"), job)
        yield bench
    finally:
        shutil.rmtree(work, ignore_errors=True)


# --- the checkpoint ------------------------------------------------------------------------


def write_ranks(folder: Path, job: Job) -> None:
    """Write the job's rank folders and its strategy files."""
    shapes = job.shapes()
    layout = lay_out(shapes, Strategy.parse(_SOURCE), rules_for(None, shapes))
    files = strategy_files.raw_files(strategy_files.from_layout(layout, shapes))
    (folder / "strategy").mkdir(parents=True)
    for name, data in files.items():
        (folder / "strategy" / name).write_bytes(data)
    base = _base(0)
    for stage in range(_STAGES):
        with ExitStack() as stack:
            paths = [
                folder / f"rank_{r}" / f"llama_rank_{r}-1_10.safetensors"
                for r in range(stage * _STAGE_RANKS, (stage + 1) * _STAGE_RANKS)
            ]
            for path in paths:
                path.parent.mkdir()
            opened = [stack.enter_context(open(path, "wb")) for path in paths]
            names = [n for n in shapes if job.stage(n) == stage]
            head = _header({n: _part_shape(n, shapes[n]) for n in names})
            for file in opened:
                file.write(head)
            for name in names:
                whole = tensor(name, shapes[name], base)
                for rank, file in enumerate(opened):
                    file.write(np.ascontiguousarray(_part(name, whole, rank % _MP, _MP)).data)


def tensor(name: str, shape: tuple[int, ...], base: np.ndarray) -> np.ndarray:
    """All of a tensor, as bits."""
    parts = list(_data(name, math.prod(shape), base, 0))
    return np.concatenate(parts).view(np.uint16).reshape(shape)


def _part(name: str, whole: np.ndarray, part: int, ways: int) -> np.ndarray:
    """One of ``ways`` parts of a tensor, cut as tensor parallelism cuts it."""
    if "norm" in name:
        return whole
    return np.split(whole, ways, axis=int(name.endswith(_COLUMNS)))[part]


def _part_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _part(name, np.broadcast_to(np.uint16(0), shape), 0, _MP).shape


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    said: dict[str, object] = {"__metadata__": {"format": "ms", "remove_redundancy": "False"}}
    at = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        said[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(said, separators=(",", ":")).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- answers -------------------------------------------------------------------------------


def check_answers(bench: Bench) -> dict[str, object]:
    """Merge, cut and cut anew once; every byte is looked at."""
    found: dict[str, object] = {}
    for what, out in (("merge", "whole"), ("slice", "cut"), ("convert", "anew")):
        sample = measure.run(bench.command(what, bench.place(out)))
        found[what] = json.loads(sample.output)["counts"]
    shapes, base = bench.job.shapes(), _base(0)
    whole = _tensors(bench.place("whole"))
    ranks = {"cut": _ranks(bench.place("cut")), "anew": _ranks(bench.place("anew"))}
    assert whole.keys() == shapes.keys(), whole.keys() ^ shapes.keys()
    for name, shape in shapes.items():
        data = tensor(name, shape, base)
        assert np.array_equal(whole[name], data), f"{name} differs in the merged checkpoint"
        first = bench.job.stage(name) * _STAGE_RANKS
        for rank, held in enumerate(ranks["cut"]):
            inside = first <= rank < first + _STAGE_RANKS
            assert (name in held) == inside, f"{name} on rank {rank}"
            if inside:
                assert np.array_equal(held[name], _part(name, data, rank % _MP, _MP)), name
        for rank, held in enumerate(ranks["anew"]):
            assert np.array_equal(held[name], _part(name, data, rank, len(ranks["anew"]))), name
    return found


def _ranks(folder: Path) -> list[dict[str, np.ndarray]]:
    return [_tensors(folder / f"rank_{r}") for r in range(len(list(folder.glob("rank_*"))))]


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder of bfloat16 files, as bits."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = np.memmap(path, np.uint8, "r")
        base = 8 + int.from_bytes(data[:8].tobytes(), "little")
        said = json.loads(data[8:base].tobytes())
        said.pop("__metadata__", None)
        for name, one in said.items():
            start, stop = one["data_offsets"]
            found[name] = data[base + start : base + stop].view(np.uint16).reshape(one["shape"])
    return found


# --- memory and time -----------------------------------------------------------------------


def check_memory(bench: Bench) -> dict[str, object]:
    """Peak anonymous memory for each budget."""
    out, found = bench.place("out"), {}
    for text, budget in _BUDGETS.items():
        for what in ("merge", "slice", "convert"):
            measure.remove(out)
            command = bench.command(what, out, "--no-fsync", "--host-bytes", text)
            sample = measure.run(command, watch=True)
            assert sample.peak_anon_bytes <= budget + _SLACK_BYTES, (what, text, sample)
            found[f"{what} --host-bytes {text}"] = {
                "peak_anon_mib": round(sample.peak_anon_bytes / 2**20, 1),
                "peak_rss_mib": round(sample.peak_rss_bytes / 2**20, 1),
            }
    measure.remove(out)
    return found


def time_opening(bench: Bench, num_tensors: int, rounds: int = 7) -> dict[str, object]:
    """Opening one large ``.ckpt``: headers only, so a sparse file will do."""
    shape, path = (1024, 1024), bench.place("large.ckpt")
    names = [f"model.layers.{i}.weight" for i in range(num_tensors)]
    layout = mindspore_ckpt.layout_file((n, BY_NAME["BF16"], shape) for n in names)
    with open(path, "wb") as file:
        for at, data in layout.segments:
            file.seek(at)
            file.write(data)
        file.truncate(layout.num_bytes)
    wall, cpu = [], []
    for _ in range(rounds):
        start = time.perf_counter(), time.process_time()
        catalog = jaxshard.open(path)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
        assert list(catalog.tensors) == names
        assert all(t.shape == shape for t in catalog.tensors.values())
        assert all(
            catalog[n].shards[0].offset == layout.chunks.get(n, [layout.offsets[n]])[0]
            for n in names[:: 1 + num_tensors // 9]
        )
    path.unlink()
    return {
        f"{layout.num_bytes / 1e9:.1f} GB .ckpt, {num_tensors} tensors": {
            "ms_per_1000_tensors": round(1e6 * statistics.median(wall) / num_tensors, 1),
            "cpu_ms_per_1000_tensors": round(1e6 * statistics.median(cpu) / num_tensors, 1),
            "all_ms": [round(1e3 * t, 1) for t in wall],
        }
    }


def time_all(bench: Bench, rounds: int) -> dict[str, object]:
    """Medians, and ratios to ``cp -r`` of each result; neither waits for the disk."""
    out, made = bench.place("out"), {"merge": "whole", "slice": "cut", "convert": "anew"}

    def fresh(command: list[str], num_bytes: int) -> Callable[[], Sample]:
        def sample() -> Sample:
            measure.remove(out)
            if bench.job.num_bytes > _REAL_BYTES:
                measure.wait_for_quiet()
                measure.touch_memory(max(2 * num_bytes, 6 << 30))
            return measure.run(command)

        return sample

    for folder in ("ranks", *made.values()):
        measure.read_files(bench.place(folder))
    cases = {}
    for what, folder in made.items():
        place = bench.place(folder)
        num_bytes = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        cases[f"cp of {what}"] = fresh(["cp", "-r", str(place), str(out)], num_bytes)
        cases[what] = fresh(bench.command(what, out, "--no-fsync"), num_bytes)
    samples = measure.in_turns(cases, rounds)
    measure.remove(out)
    found: dict[str, object] = {name: measure.summary(each) for name, each in samples.items()}
    for what in made:
        found[f"{what}/cp"] = measure.ratio(samples[what], samples[f"cp of {what}"])
    return found


def show(results: dict[str, object]) -> None:
    """The results as a person reads them."""
    print(f"{measure.machine()}, {results['file_system']}, {results['bytes'] / 1e9:.2f} GB")
    print(f"load {results['load_before']} before, {results['load_after']} after")
    for what in ("counts", "memory", "opening"):
        for name, numbers in results[what].items():
            print(f"{what:>8} {name:<28} {numbers}")
    for name, value in results["time"].items():
        if isinstance(value, dict):
            text = f"{value['wall_s']:.3f} s, cpu {value['cpu_s']:.3f} s  {value['all_wall_s']}"
        else:
            text = f"{value:.2f}"
        print(f"{'time':>8} {name:<28} {text}")


if __name__ == "__main__":
    main()
