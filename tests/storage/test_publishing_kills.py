"""A sample of the kills of ``publishing_kills``, which run as a program takes every call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "publishing_kills.py"


def killed(directory: Path, *arguments: object) -> tuple[dict[str, int], int, str]:
    """What came of the kills, how much of it is wrong, and all that was said."""
    command = [sys.executable, str(PROGRAM), str(directory), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    return last["total"], last["wrong"], done.stdout


@pytest.mark.parametrize(
    ("scenarios", "every"),
    [
        (["ranks", "ranks, overwrite"], 17),
        (["one safetensors, overwrite and resume", "ranks, old kernel"], 19),
        (["parts, again in order", "parts, again the last, overwrite"], 13),
        (["save ranks", "save huggingface, overwrite", "strategy file, overwrite"], 11),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_killed_at_publishing_calls_nothing_is_lost_mixed_or_left(tmp_path, scenarios, every):
    total, wrong, text = killed(tmp_path, "--every", every, "--twice", 2, "--only", *scenarios)
    assert not wrong, text
    assert total["kills"] >= 2 * total["calls"] // every
    assert total["then old"]
    assert total["then new"]


def test_publishing_in_steps_is_found_out(tmp_path):
    total, wrong, text = killed(
        tmp_path, "--every", 2, "--broken", "--only", "strategy folder, overwrite"
    )
    assert wrong, text
    assert total["then None"]
