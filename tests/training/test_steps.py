"""The command line tells the steps of a run, and whether they are well."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import golden_files
import numpy as np
import pytest

from jaxshard.cli import main
from jaxshard.errors import size_text
from jaxshard.training import CheckpointManager, steps
from jaxshard.training.run_directory import RunDirectory
from jaxshard.training.steps import find_steps


@pytest.fixture
def run(tmp_path: Path) -> Path:
    manager = CheckpointManager(tmp_path, prefix="net", fsync=False)
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


def test_sizes_and_ages_are_told(run, capsys, monkeypatch):
    (record,) = (s.record for s in find_steps(RunDirectory.of(run)) if s.name.step == 30)
    monkeypatch.setattr(time, "time", lambda: record.saved_at + 125)
    assert main(["inspect", str(run)]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    on_disk = (run / "checkpoint/rank_0/net_rank_0-1_30.safetensors").stat().st_size
    assert 40_000 < on_disk < 45_000
    assert row[4:] == [*size_text(on_disk).split(), "2", "min"]
    main(["inspect", str(run), "--json"])
    told = json.loads(capsys.readouterr().out)["steps"][-1]
    assert (told["num_bytes"], told["saved_at"]) == (on_disk, record.saved_at)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (-5, "0 s"), (172_800, "2 days")],
)
def test_ages_are_in_the_largest_unit_that_makes_sense(seconds, said):
    assert steps.age(seconds) == said


def test_what_was_left_behind_is_listed_as_such(run, capsys):
    manager = CheckpointManager(run, prefix="net", fsync=False)
    target = {"params": {"w": np.zeros(5000, int)}}
    manager.restore(target, step=20)
    manager.save(25, target)
    assert main(["verify", str(run)]) == 0
    _, *rows, verdict, note = capsys.readouterr().out.splitlines()
    assert note.startswith("note: replicas are not compared")
    assert [row.split()[0] for row in rows] == ["1_25", "1_20", "1_10", "1_30"]
    assert "left behind: 1_25 was saved later" in rows[-1]
    assert verdict.startswith("a run resumes from 1_25")


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
    assert "a run resumes from 1_20 (all bytes match)" in out
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
    assert "a run resumes from 1_10 (without checksums)" in capsys.readouterr().out


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
