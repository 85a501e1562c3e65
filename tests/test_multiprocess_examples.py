"""The walk-throughs of several hosts run as they stand, and say what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest

import jaxshard as js

ROOT = Path(__file__).parent.parent


def run(*command, **environ):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    done = subprocess.run(
        list(map(str, command)),
        env=env | {"PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_hosts_that_share_a_disk_read_once_and_save_together():
    said = run(sys.executable, ROOT / "examples" / "two_hosts_shared_disk.py")
    plain, balanced = (
        [int(n.replace(",", "")) for n in re.findall(rf"needed ([\d,]+) bytes and {rest}", said)]
        for rest in (r"read [\d,]+, all that", r"read [\d,]+, none of which")
    )
    assert len(plain) == len(balanced) == 2
    assert balanced[0] + balanced[1] == plain[0] == plain[1]
    assert "saved by both: model.safetensors" in said


def test_two_hosts_without_a_common_disk_keep_their_own():
    said = run(sys.executable, ROOT / "examples" / "two_hosts_no_shared_disk.py")
    assert "host 0: elsewhere.json rank_0 rank_1 rank_2 rank_3 strategy" in said
    assert "host 1: elsewhere.json rank_4 rank_5 rank_6 rank_7 strategy" in said


SRUN = """#!/bin/bash
# what SLURM does: every task gets the command, its number, and how many there are
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
echo "srun was here" >&2
exit $status
"""


@pytest.mark.parametrize("starter", ["srun", "by itself"])
def test_the_slurm_script_converts_in_parts(tmp_path, starter):
    arrays = checkpoints.write_llama(tmp_path / "llama", layers=4)
    tools = {"jaxshard": f'#!/bin/sh\nexec {sys.executable} -m jaxshard "$@"\n', "srun": SRUN}
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        tool = tmp_path / "bin" / name
        tool.write_text(text)
        tool.chmod(0o755)
    script = ROOT / "examples" / "slurm_convert.sh"
    environ = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TASKS": "3"}
    if starter == "srun":
        environ |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3"}
    said = run("bash", script, tmp_path / "llama", tmp_path / "cut", "mp2pp2", **environ)
    assert said.count("the result appears when all others are") <= 2
    assert js.open(tmp_path / "cut").layout.num_ranks == 4
    assert not js.verify(tmp_path / "cut", tmp_path / "llama").problems
    assert len(arrays) == len(js.open(tmp_path / "cut").tensors)


@pytest.mark.parametrize("smoke", ["--smoke"])
def test_the_planner_runs_at_small_scale(smoke):
    said = run(sys.executable, ROOT / "benchmarks" / "paper_scale.py", smoke)
    assert "balanced" in said
    assert "convert" in said
