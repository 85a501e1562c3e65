"""The example loads what transformers saved, and computes what transformers computes."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import checkpoints
import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    if not checkpoints.HAVE_TRANSFORMERS:
        pytest.skip("transformers or torch is not installed: they make the model and the answer")
    spec = spec_from_file_location("llama_example", EXAMPLE)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_text_are_those_of_transformers_in_both_layouts(example, tmp_path, tied):
    example.make_checkpoint(tmp_path, tied=tied)
    differences = example.run(tmp_path, compare=True, count=4)
    assert list(differences) == ["dp2mp4", "pp2mp2dp2"]
    assert max(differences.values()) <= 1e-4


def test_the_comparison_can_fail(example, tmp_path):
    example.make_checkpoint(tmp_path)
    config = (tmp_path / "config.json").read_text()
    wrong, right = tmp_path / "wrong", example.theirs
    example.make_checkpoint(wrong)
    (wrong / "config.json").write_text(config.replace("1e-06", "1e-01"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "theirs", lambda folder, *rest: right(wrong, *rest))
        with pytest.raises(AssertionError, match="not those of transformers"):
            example.run(tmp_path, compare=True, count=1)
