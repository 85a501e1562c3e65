"""The command line tells the steps of a run, and whether they are well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import golden_files
import numpy as np
import pytest

from jaxshard.cli import main
from jaxshard.training import CheckpointManager


@pytest.fixture
def run(tmp_path: Path) -> Path:
    manager = CheckpointManager(tmp_path, prefix="net", durable=False)
    for step in (10, 20, 30):
        manager.save(step, {"params": {"w": np.full(5000, step)}})
    return tmp_path


def test_a_table_of_steps_newest_first(run, capsys):
    assert main(["inspect", str(run)]) == 0
    head, *rows, verdict = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "number", "state", "format", "size", "age"]
    assert [row.split()[:4] for row in rows] == [
        [f"1_{n}", str(n), "complete", "ranks"] for n in (30, 20, 10)
    ]
    assert verdict.startswith("a run resumes from 1_30")


def test_verify_tells_what_is_wrong_and_deep_looks_at_every_byte(run, capsys):
    assert main(["verify", str(run), "--deep"]) == 0
    path = run / "checkpoint/rank_0/net_rank_0-1_30.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(run)]) == 0  # its size is right
    capsys.readouterr()
    assert main(["verify", str(run), "--deep"]) == 3
    out = capsys.readouterr().out
    assert "net_rank_0-1_30.safetensors is damaged at or after byte" in out
    assert "a run resumes from 1_20 (every byte is as it was saved)" in out
    assert main(["inspect", str(run)]) == 0


def test_a_program_is_told_the_same(run, capsys):
    (run / "checkpoint/rank_0/net_rank_0-1_20.safetensors").unlink()
    assert main(["verify", str(run), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["resumes_from"] == "1_30"
    assert [(s["step"], s["state"]) for s in told["steps"]] == [
        ("1_10", "complete"),
        ("1_20", "incomplete"),
        ("1_30", "complete"),
    ]


def test_what_is_on_its_way_is_not_broken(run, capsys):
    (run / ".jaxshard/1_40.saving").mkdir()
    assert main(["verify", str(run)]) == 0
    assert "partial" in capsys.readouterr().out


def test_mindformers_runs_are_listed_too(capsys):
    assert main(["verify", str(golden_files.golden("mf_iteration_dir", "balanced"))]) == 0
    assert "a run resumes from 1_10 (whoever saved it kept no checksums)" in capsys.readouterr().out


def test_looking_at_a_run_wakes_no_device(run):
    program = (
        "import sys; from jaxshard.cli import main; "
        f"code = main(['verify', {str(run)!r}, '--deep']); "
        "sys.exit(code or 10 * ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done


def test_another_folder_with_a_checkpoint_inside_is_no_run(tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err
