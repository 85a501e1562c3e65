"""Where the golden files are: the small set beside the tests, or the full one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[1] / "golden"
LAYOUTS = (
    "dp1mp2pp2",
    "dp1mp4",
    "dp2cp2mp2_2axis",
    "dp2mp1",
    "dp2mp2_optall",
    "dp2mp2pp2",
    "dp2mp2pp2_optall",
    "dp4mp2",
    "dp4mp2_opt2",
    "dp4mp2ep2_moe",
)


def golden(*parts: str) -> Path:
    """The golden file or folder at ``parts``; the test is skipped if only the full set has it."""
    small = HERE.joinpath(*parts)
    if small.exists():
        return small
    full = os.environ.get("JAXSHARD_GOLDEN")
    if not full:
        pytest.skip(f"{'/'.join(parts)} is in the full golden set: set JAXSHARD_GOLDEN to it")
    return Path(full).joinpath(*parts)


def manifest(name: str) -> dict[str, Any]:
    """The truth about the golden folder ``name``."""
    return json.loads((HERE / name / "manifest.json").read_text())


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The full shape of every tensor of the golden layout ``name``."""
    return {n: tuple(t["shape"]) for n, t in manifest(name)["tensors"].items()}
