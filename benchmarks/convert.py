"""File to file against ``cp -r``: a model is cut for dp2mp4, and merged back.

    python benchmarks/convert.py [--gigabytes 2.0] [--rounds 5] [--dir DISK] [--save] [--smoke]

Twice, at equal durability: neither with an fsync, and both with one of every file. Answers
are compared byte for byte, by code that shares nothing with jaxshard; bytes read and peak
memory are held against what was promised, and are asserted: for two sizes of the model, for
weights that are transposed on the way, and for a few tensors of a terabyte of sparse files.
Times are told, not asserted.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import measure
import numpy as np
from deepseek import SMOKE as SMOKE_DEEPSEEK
from deepseek import DeepSeek, write_deepseek
from measure import JAXSHARD, Sample
from models import SMOKE, Llama, llama_of, write_llama

MP = 4
_COPY = ["cp", "-r"]
_COPY_SYNC = ["sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +']
_CUT = ["--to", "dp2mp4", "--remove-redundancy", "--json"]
_SLACK_BYTES = 100_000_000  # beside the budget: the interpreter, NumPy, the plan
_READ_RATIO = 1.01
_REAL_BYTES = 10**9  # below, start-up is all there is to measure
_BUDGETS = {"64MiB": 64 << 20, "1GiB": 1 << 30}


@dataclass(frozen=True)
class Bench:
    """The folders of one run, all on one disk."""

    work: Path
    model: Llama

    @property
    def whole(self) -> Path:
        return self.work / "model"

    @property
    def cut(self) -> Path:
        return self.work / "cut"

    def command(self, verb: str, out: Path, *more: str) -> list[str]:
        """The jaxshard command that cuts the model, or merges the cut, into ``out``."""
        source = self.whole if verb == "convert" else self.cut
        how = _CUT if verb == "convert" else ["--json"]
        return [*JAXSHARD, verb, str(source), str(out), *how, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="the disk to measure on (default: temporary)")
    parser.add_argument("--save", action="store_true", help="keep the results with the project's")
    parser.add_argument("--smoke", action="store_true", help="tiny: the answers, not the clock")
    options = parser.parse_args()
    model = SMOKE if options.smoke else llama_of(int(options.gigabytes * 1e9))
    measure.patience_s = 0 if options.smoke else measure.patience_s
    results: dict[str, object] = {"bytes": model.num_bytes, "load_before": measure.load()}
    with _bench(model, options.dir) as bench:
        results["file_system"] = measure.file_system(bench.work)
        results["bytes_read"] = check_answers(bench)
        results["memory"] = check_memory(bench)
        results["time"] = time_all(bench, 1 if options.smoke else options.rounds)
    results["load_after"] = measure.load()
    show(results)
    if options.save:
        print(f"kept in {measure.save('convert', results)}")


@contextmanager
def _bench(model: Llama, disk: Path | None) -> Iterator[Bench]:
    work = Path(tempfile.mkdtemp(prefix="jaxshard-bench-", dir=disk))
    try:
        bench = Bench(work, model)
        write_llama(bench.whole, model)
        yield bench
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_answers(bench: Bench) -> dict[str, object]:
    """Cut and merge once; every byte is looked at. What was read, over what was needed."""
    back = bench.work / "back"
    found: dict[str, object] = {}
    start_up = measure.run([*JAXSHARD, "--help"]).read_bytes
    for verb, out in (("convert", bench.cut), ("merge", back)):
        sample = measure.run(bench.command(verb, out))
        counts = json.loads(sample.output)["counts"]
        planned = json.loads(
            measure.run([*bench.command(verb, out, "--overwrite"), "--dry-run"]).output
        )
        different = {k: (planned[k], n) for k, n in counts.items() if planned[k] != n}
        assert not different, f"{verb}: planned and counted differ: {different}"
        need = bench.model.num_bytes
        assert counts["bytes_needed"] == counts["bytes_written"] == need, counts
        assert counts["bytes_read"] <= _READ_RATIO * need, counts
        found[verb] = {
            "counted_ratio": round(counts["bytes_read"] / need, 4),
            "kernel_ratio": round((sample.read_bytes - start_up) / need, 4),
        }
        if need > _REAL_BYTES:  # headers, config and modules are nothing only against a real model
            assert sample.read_bytes <= _READ_RATIO * need, (sample.read_bytes, need)
    check_cut(bench)
    check_whole(bench, back)
    measure.remove(back)
    return found


def check_whole(bench: Bench, out: Path) -> None:
    """Whether ``out`` holds the model, bit for bit."""
    theirs, ours = _folder(bench.whole), _folder(out)
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    for name, tensor in theirs.items():
        assert tensor.shape == ours[name].shape, name
        assert np.array_equal(tensor, ours[name]), f"{name} differs"


def check_cut(bench: Bench) -> None:
    """Whether each rank's file holds its slices, and each slice is in one file of its replicas."""
    model = _folder(bench.whole)
    seen: dict[tuple[str, int], int] = {}
    for rank in range(2 * MP):
        (path,) = (bench.cut / f"rank_{rank}").glob("*.safetensors")
        for name, tensor in _file(path).items():
            part = 0 if "norm" in name else rank % MP
            dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            want = model[name] if "norm" in name else np.split(model[name], MP, dim)[part]
            assert np.array_equal(tensor, want), f"{name} of rank {rank} differs"
            seen[name, part] = seen.get((name, part), 0) + 1
    assert set(seen.values()) == {1}, "a slice is stored twice"
    assert len(seen) == sum(1 if "norm" in n else MP for n in model), "a slice is missing"


def _folder(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in _file(path).items()}


def _file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a bfloat16 file, as bits."""
    data = np.memmap(path, np.uint8, "r")
    base = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:base].tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name, said in header.items():
        start, stop = said["data_offsets"]
        assert said["dtype"] == "BF16", said
        assert stop - start == 2 * math.prod(said["shape"]), said
        found[name] = data[base + start : base + stop].view(np.uint16).reshape(said["shape"])
    return found


def check_memory(bench: Bench) -> dict[str, object]:
    """Peak anonymous memory for each budget, which is the same whatever the size and the way."""
    small = Bench(
        bench.work / "small", replace(bench.model, layers=max(1, bench.model.layers // 4))
    )
    write_llama(small.whole, small.model)
    measure.run(small.command("convert", small.cut, "--no-fsync"))
    found = {}
    for size, each in (("", bench), (" of a quarter", small)):
        found |= {
            f"{verb}{size}": _peaks(lambda out, b=each, v=verb: b.command(v, out), bench.work)
            for verb in ("convert", "merge")
        }
    turned = ["--names", "hf:linen", "--json"]
    found["convert, transposing"] = _peaks(
        lambda out: [*JAXSHARD, "convert", str(bench.whole), str(out), *turned], bench.work
    )
    measure.remove(small.work)
    found["convert a part of DeepSeek"] = check_sparse_memory(bench)
    return found


def check_sparse_memory(bench: Bench) -> dict[str, object]:
    """Peaks for a few of the 91,991 tensors of a terabyte: all headers are read all the same."""
    work = bench.work / "deepseek"
    model, num_files = (SMOKE_DEEPSEEK, 3) if bench.model == SMOKE else (DeepSeek(), 163)
    write_deepseek(work, model, num_files=num_files)
    experts = rf"layers\.{model.dense_layers}\.mlp\.experts\.[0-7]\.\w+\.weight$"
    how = ["--to", "mp4", "--include", experts, "--json"]
    peaks = _peaks(lambda out: [*JAXSHARD, "convert", str(work), str(out), *how], bench.work)
    measure.remove(work)
    return peaks


def _peaks(command: Callable[[Path], list[str]], work: Path) -> dict[str, object]:
    """Peaks of ``command`` for each budget, held against it."""
    out, found = work / "out", {}
    for text, budget in _BUDGETS.items():
        measure.remove(out)
        sample = measure.run([*command(out), "--no-fsync", "--host-bytes", text], watch=True)
        assert sample.peak_anon_bytes <= budget + _SLACK_BYTES, (command(out), text, sample)
        found[text] = {
            "peak_anon_mib": round(sample.peak_anon_bytes / 2**20, 1),
            "peak_rss_mib": round(sample.peak_rss_bytes / 2**20, 1),
        }
    measure.remove(out)
    return found


def time_all(bench: Bench, rounds: int) -> dict[str, object]:
    """Medians, and ratios to ``cp -r`` of the same bytes, with and without fsync."""
    out = bench.work / "out"

    def fresh(command: list[str]) -> Callable[[], Sample]:
        def sample() -> Sample:
            measure.wait_for_quiet()
            measure.remove(out)  # last: its pages are the ones that the sample fills
            return measure.run(command)

        return sample

    measure.read_files(bench.whole)
    measure.read_files(bench.cut)
    shutil.copytree(bench.whole, out)  # so that the first sample finds what the others do
    found: dict[str, object] = {}
    for durability, copy, flag in (
        ("no fsync", _COPY, ["--no-fsync"]),
        ("every file fsynced", _COPY_SYNC, []),
    ):
        cases = {
            "cp model": fresh([*copy, str(bench.whole), str(out)]),
            "convert": fresh(bench.command("convert", out, *flag)),
            "cp cut": fresh([*copy, str(bench.cut), str(out)]),
            "merge": fresh(bench.command("merge", out, *flag)),
        }
        samples = measure.in_turns(cases, rounds)
        found[durability] = {
            **{name: measure.summary(each) for name, each in samples.items()},
            "convert/cp": measure.ratio(samples["convert"], samples["cp model"]),
            "merge/cp": measure.ratio(samples["merge"], samples["cp cut"]),
        }
    measure.remove(out)
    return found


def show(results: dict[str, object]) -> None:
    """The results as a person reads them."""
    print(f"{measure.machine()}, {results['file_system']}, {results['bytes'] / 1e9:.2f} GB")
    print(f"load {results['load_before']} before, {results['load_after']} after")
    for what in ("bytes_read", "memory"):
        for name, numbers in results[what].items():
            print(f"{what:>11} {name:<28} {numbers}")
    for durability, numbers in results["time"].items():
        for name, value in numbers.items():
            text = (
                f"{value['wall_s']:.3f} s, cpu {value['cpu_s']:.3f} s"
                if isinstance(value, dict)
                else f"{value:.2f}"
            )
            every = value["all_wall_s"] if isinstance(value, dict) else ""
            print(f"{durability:>20}  {name:<12} {text}  {every}")


if __name__ == "__main__":
    main()
