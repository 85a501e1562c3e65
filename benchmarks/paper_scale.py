"""What loading a 1.37 TB checkpoint onto 16,384 devices costs to plan, and each host to read.

The checkpoint has the names, shapes and dtypes of DeepSeek-V3 in sparse files, and the devices
are numbers: nothing is read but headers. Each host plans for its own devices alone, with the
planner that loads and converts; once to read all they hold, once no byte that another reads.

    python benchmarks/paper_scale.py [--to dp128mp8pp16ep32] [--devices-per-host 8] [--smoke]
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from deepseek import SMOKE, DeepSeek, write_deepseek

import jaxshard as js
from jaxshard.conversion.targets import lay_out_for
from jaxshard.core.catalog import Catalog
from jaxshard.core.layout import Layout, Placement, Strategy
from jaxshard.distributed.processes import cut_by_replicas, split_outputs
from jaxshard.planning.outputs import Outputs, arrange
from jaxshard.planning.plan import make_plan

MB = 1e6


@dataclass(frozen=True)
class Host:
    """What one host reads, and how long its plan took."""

    num_bytes: int
    num_requests: int
    num_files: int
    seconds: float


def main() -> int:
    arguments = parsed()
    model = SMOKE if arguments.smoke else DeepSeek()
    to = arguments.to or ("dp4mp2pp2ep2" if arguments.smoke else "dp128mp8pp16ep32")
    with tempfile.TemporaryDirectory() as folder:
        write_deepseek(folder, model, num_files=4 if arguments.smoke else 163)
        report(Path(folder), Strategy.parse(to), arguments.devices_per_host)
    return 0


def report(folder: Path, strategy: Strategy, per_host: int) -> None:
    catalog, seconds = timed(lambda: js.open(folder))
    print(
        f"{platform.machine()}, Python {platform.python_version()}, seconds of one core; {memory()}"
    )
    print(
        f"headers   {seconds:6.1f} s  {len(catalog.tensors):,} tensors, "
        f"{catalog.num_bytes / 1e12:.2f} TB, {len(catalog.files)} files"
    )
    layout, seconds = timed(lambda: lay_out_for(catalog, strategy))
    num_hosts = strategy.num_ranks // per_host
    print(
        f"layout    {seconds:6.1f} s  {strategy}: {strategy.num_ranks:,} ranks, {num_hosts:,} hosts"
    )
    outputs, seconds = timed(lambda: outputs_of(catalog, layout))
    print(f"shares    {seconds:6.1f} s  who holds what; {memory()}")
    hosts = range(0, num_hosts, max(1, num_hosts // 32))

    plain = [plan_host(catalog, outputs, n, per_host) for n in hosts]
    tell("plain", plain)
    finer, small_bytes = cut(catalog, layout)
    balanced_outputs = outputs_of(catalog, finer)
    tell("balanced", [plan_host(catalog, balanced_outputs, n, per_host) for n in hosts])
    print(
        f"          and {small_bytes / num_hosts / MB:.3f} MB a host on average of tensors that "
        "are too small to cut: one replica reads each"
    )
    if num_hosts <= 64:  # else it takes an hour
        found = [plan_host(catalog, balanced_outputs, n, per_host) for n in range(num_hosts)]
        assert sum(h.num_bytes for h in found) + small_bytes == catalog.num_bytes

    split, seconds = timed(lambda: split_outputs(outputs, range(layout.num_ranks), num_hosts))
    part, more = timed(lambda: make_plan(catalog, outputs, only=split[0]))
    print(
        f"convert   {seconds + more:6.1f} s  part 0 of {num_hosts:,}: {len(split[0])} of "
        f"{layout.num_ranks:,} rank files, {part.totals.bytes_read / MB:,.0f} MB read in "
        f"{part.totals.num_reads:,} requests, {part.totals.bytes_written / MB:,.0f} MB written"
    )
    print(f"peak memory of all this in one process: {memory()}")


def outputs_of(catalog: Catalog, layout: Layout) -> Outputs:
    """What each rank holds."""
    tensors = [t for t in catalog.tensors.values() if t.name in layout.placements]
    return arrange(tensors, layout, [f"rank_{r}" for r in range(layout.num_ranks)])


def plan_host(catalog: Catalog, outputs: Outputs, number: int, per_host: int) -> Host:
    """The reads of one host: each distinct shard of its devices once."""
    begun = time.process_time()
    ranks = frozenset(range(number * per_host, (number + 1) * per_host))
    totals = make_plan(catalog, outputs, only=ranks).totals
    seconds = time.process_time() - begun
    held = {e.tensor.name for r in ranks for e in outputs.contents[outputs.content_of[r]]}
    files = {piece.file for name in held for piece in catalog.tensors[name].shards}
    return Host(totals.bytes_read, totals.num_reads, len(files), seconds)


def cut(catalog: Catalog, layout: Layout) -> tuple[Layout, int]:
    """The layout in which no two ranks hold the same; and bytes of what cannot be cut so."""
    found: dict[str, tuple[Placement, ...]] = {}
    small_bytes = 0
    known: dict[tuple[Placement, tuple[int, ...]], Placement | None] = {}
    for name, placements in layout.placements.items():
        tensor = catalog.tensors[name]
        finer = []
        for placement in placements[:1]:  # of a tensor in several stages, the first reads it
            key = (replace(placement, first_rank=0), tensor.shape)
            if key not in known:
                known[key] = cut_by_replicas(*key)
            made = known[key]
            if made is not None:
                finer.append(replace(made, first_rank=placement.first_rank))
        if finer:
            found[name] = tuple(finer)
        else:
            small_bytes += tensor.num_bytes
    return replace(layout, placements=found), small_bytes


def tell(how: str, hosts: list[Host]) -> None:
    def most_and_median(values: Mapping[str, list[float]]) -> str:
        return ", ".join(
            f"{what} {median(v):,.0f} (most {max(v):,.0f})" for what, v in values.items()
        )

    told = {
        "MB": [h.num_bytes / MB for h in hosts],
        "requests": [float(h.num_requests) for h in hosts],
        "files": [float(h.num_files) for h in hosts],
    }
    print(f"{how:9} {median(h.seconds for h in hosts):6.1f} s  a host: {most_and_median(told)}")


def timed(work):  # type: ignore[no-untyped-def]
    begun = time.process_time()
    made = work()
    return made, time.process_time() - begun


def memory() -> str:
    """The most memory this process has had."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", help="the strategy")
    parser.add_argument("--devices-per-host", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on few devices")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
