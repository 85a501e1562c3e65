"""The example of a Flax NNX model runs, and checks its own result."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("flax")

EXAMPLE = Path(__file__).parent.parent / "examples" / "nnx_llama.py"


def test_a_model_of_flax_is_filled_from_hugging_faces_names(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "fsdp=4, tp=2" in capsys.readouterr().out
