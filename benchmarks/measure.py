"""Measuring: fresh processes, taken in turns, from the same state of disk and memory.

A sample is one process from its start to its end, interpreter and imports included. Samples
of different commands alternate, so that whatever else the machine does falls on all of them
alike, and what is told is a ratio of medians within one run.

On a machine that is shared, every sample first waits a while for it to be quiet, and says what
others took meanwhile. On a virtual machine that hands free memory back to its host, the first
write to a page costs up to ten times more where it was free for seconds. So a sample begins
right after the result of the one before was removed, and fills the pages that this freed; or
after free memory was touched.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
JAXSHARD = [sys.executable, "-m", "jaxshard"]
HAVE_BYTES = 4 << 30  # of free memory, had before what is timed: twice what any sample fills
_PERIOD_S = 0.002
patience_s = 5.0  # how long a sample waits for the machine to be quiet; a smoke run does not


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process took.

    Attributes:
        cpu_s: its user and system time.
        read_bytes: what it asked the kernel to read, imports included.
        others_cpu_s: what everything else on the machine took meanwhile, writeback by the
            kernel among it.
        peak_anon_bytes: its largest RssAnon, where it was watched.
        peak_rss_bytes: its VmHWM, where it was watched: mapped libraries are in it.
    """

    wall_s: float
    cpu_s: float
    read_bytes: int
    others_cpu_s: float = 0.0
    peak_anon_bytes: int = 0
    peak_rss_bytes: int = 0
    output: str = field(default="", repr=False)


def run(command: Sequence[str], *, watch: bool = False) -> Sample:
    """One run of ``command``. Watching its memory costs it time: do not do both at once.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled, too
    read_before, cpu_before, busy_before = _bytes_read(), _children_cpu(), _busy()
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    watcher = _Watcher(process.pid) if watch else None
    output = process.communicate()[0].decode()
    wall = time.perf_counter() - start
    anon, rss = watcher.stop() if watcher else (0, 0)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {output[-2000:]}")
    read = _bytes_read() - read_before - len(output)
    cpu = _children_cpu() - cpu_before
    return Sample(wall, cpu, read, max(0.0, _busy() - busy_before - cpu), anon, rss, output)


class _Watcher:
    """Looks at a process's memory every few milliseconds."""

    def __init__(self, pid: int) -> None:
        self._status, self._anon, self._rss = Path(f"/proc/{pid}/status"), 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(_PERIOD_S):
            try:
                text = self._status.read_text()
            except OSError:
                return
            self._anon = max(self._anon, _kib(text, "RssAnon") << 10)
            self._rss = max(self._rss, _kib(text, "VmHWM") << 10)

    def stop(self) -> tuple[int, int]:
        self._done.set()
        self._thread.join()
        return self._anon, self._rss


def _kib(text: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _bytes_read() -> int:
    """Bytes read by this process and by its children that have ended."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # finer than the ticks of os.times
    return used.ru_utime + used.ru_stime


def _busy() -> float:
    """Seconds that all processors together have worked since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(limit_s: float | None = None) -> None:
    """Wait until the machine is nearly idle, or until ``limit_s`` (or patience) is over."""
    end = time.perf_counter() + (patience_s if limit_s is None else limit_s)
    while time.perf_counter() < end:
        before = _busy()
        time.sleep(0.3)
        if _busy() - before <= 0.03:
            return


def remove(*paths: Path) -> None:
    """Delete ``paths`` and wait until the disk is idle."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    os.sync()


def touch_memory(num_bytes: int) -> None:
    """As ``have_memory``, by a process of its own: this one never was so large."""
    code = f"import measure; measure.have_memory({num_bytes})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def have_memory(num_bytes: int = HAVE_BYTES) -> None:
    """Have ``num_bytes`` of free memory really there (see the module), for the next milliseconds.

    Touched as huge pages: their blocks then are there whole, for whoever writes a lot at a time.
    """
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, num_bytes, mmap.PAGESIZE):
        memory[at] = 1
    memory.close()


def read_files(folder: Path) -> None:
    """Have the files of ``folder`` in the page cache."""
    buffer = bytearray(1 << 20)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def in_turns(cases: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """``rounds`` samples of each case; every other round goes through them backwards."""
    found: dict[str, list[Sample]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            found[name].append(cases[name]())
    return found


def summary(samples: Sequence[Sample]) -> dict[str, object]:
    """Medians, and all wall times."""
    return {
        "wall_s": round(median(s.wall_s for s in samples), 4),
        "cpu_s": round(median(s.cpu_s for s in samples), 4),
        "others_cpu_s": round(median(s.others_cpu_s for s in samples), 4),
        "all_wall_s": [round(s.wall_s, 4) for s in samples],
    }


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    """Our median wall time over theirs."""
    return round(median(s.wall_s for s in ours) / median(s.wall_s for s in theirs), 3)


def machine() -> dict[str, object]:
    """What the numbers were taken on."""
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": found[1] if found else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
    }


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holders = [m for m in mounts if path.resolve().is_relative_to(m[1])]
    return max(holders, key=lambda m: len(m[1]))[2] if holders else "unknown"


def machine_name(device: str = "") -> str:
    """A name for result files: what was measured on, not whose it is."""
    about = machine()
    text = f"{device or about['cpu']} {about['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def load() -> float:
    """The machine's load over the last minute, ours included."""
    return round(os.getloadavg()[0], 2)


def save(name: str, results: Mapping[str, object]) -> Path:
    """Write ``results`` where this machine's are kept: of its ``device``, if they name one."""
    folder = ROOT / "benchmarks" / "results" / machine_name(str(results.get("device", "")))
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}.json"
    place.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return place


def as_dict(sample: Sample) -> dict[str, object]:
    """A sample without what it printed."""
    return {k: v for k, v in asdict(sample).items() if k != "output"}
