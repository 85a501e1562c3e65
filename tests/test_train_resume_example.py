"""The example trains, is killed, and goes on in other layouts with the same losses."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_resume.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = spec_from_file_location("train_resume_example", EXAMPLE)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_killed_run_goes_on_in_three_layouts_with_the_same_losses(example, tmp_path, capsys):
    differences = example.compare(12, tmp_path)
    assert differences["dp2mp4"] == 0.0
    assert 0 < differences["dp4mp2"] < 1e-5
    assert 0 < differences["pp2mp2dp2"] < 1e-5
    curves = json.loads((tmp_path / "losses.json").read_text())
    assert len(curves) == 4
    picture = ElementTree.parse(tmp_path / "loss.svg").getroot()
    drawn = [element.tag.rpartition("}")[2] for element in picture]
    assert drawn.count("polyline") == 1
    assert drawn.count("circle") == sum(len(c) for c in list(curves.values())[1:])
    assert {e.text for e in picture} >= set(curves)
    assert "goes on after step" in capsys.readouterr().out


def test_a_state_that_is_not_restored_would_be_noticed(example, tmp_path):
    """The twin: from fresh weights the losses are others."""
    whole = example.train("dp2mp4", 3)
    again = example.train("dp2mp4", 3, tmp_path)
    assert again == whole
    trainer = example.trainer_of(example.js.Strategy.parse("dp2mp4"))
    _, first = trainer.step(example.new_state(example.js.Strategy.parse("dp2mp4")))
    assert first == whole[1] != whole[3]
