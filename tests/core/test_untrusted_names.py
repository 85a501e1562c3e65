"""Names from untrusted files reach a terminal or a log escaped and shortened."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import jaxshard as js
from jaxshard import errors
from jaxshard.core.catalog import Tensor
from jaxshard.core.dtypes import dtype
from jaxshard.core.layout import Placement
from jaxshard.planning import pictures

_HOSTILE = "\x1b]0;owned\x07\x1b[31mred\u202e\u2066" + "x" * 5000


def _is_safe(text: str) -> bool:
    return (
        all(c == "\n" or c.isprintable() for c in text) and max(map(len, text.split("\n"))) < 4100
    )


@given(st.text())
def test_every_text_is_printable_after_escaping(text):
    for kind in (errors.FormatError, errors.NotFoundError):
        assert _is_safe(str(kind(text)))
    assert _is_safe(errors.quote_name(text))
    assert _is_safe(errors.format_list([text, text]))


@given(st.text(st.characters(whitelist_categories=("L", "N", "P", "S")), max_size=200))
def test_printable_text_stays_as_it_is(text):
    assert errors.printable(text) == text


def test_tables_and_pictures_escape_the_names_of_tensors():
    tensor = Tensor(_HOSTILE, dtype("F32"), (2,), ())
    assert _is_safe(pictures.tensor_table([tensor]))
    assert _is_safe(pictures.held_by(errors.quote_name(_HOSTILE), Placement((("dp", 1),)), (2,)))


@pytest.fixture
def hostile(tmp_path):
    save_file({_HOSTILE: np.zeros(3, np.uint8)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "--tensors"],
        ["slice", "--to", "mp2", "out"],
        ["verify"],
        ["plan", "--to", "mp2"],
        ["convert", "--include", "nothing", "out"],
        ["convert", "--names", "llama-hf:llama-nnx", "out"],
        ["convert", "--format", "ckpt", "--to", "full", "out.ckpt"],
    ],
)
def test_the_command_line_prints_no_control_characters(hostile, tmp_path, arguments):
    verb, *rest = arguments
    rest = [str(tmp_path / a) if a.startswith("out") else a for a in rest]
    done = subprocess.run(
        [sys.executable, "-m", "jaxshard", verb, str(hostile), *_reordered(rest)],
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )
    text = (done.stdout + done.stderr).decode()
    assert _is_safe(text), text[:300]
    assert done.returncode in (0, 2, 3), text
    assert text


def _reordered(rest: list[str]) -> list[str]:
    return sorted(rest, key=lambda a: "/out" not in a)  # the destination comes first


def test_json_keeps_names_whole_in_ascii(hostile):
    done = subprocess.run(
        [sys.executable, "-m", "jaxshard", "inspect", "--json", str(hostile)],
        capture_output=True,
        check=True,
    )
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout
    assert list(json.loads(done.stdout)["tensors"]) == [_HOSTILE]


def test_errors_of_python_escape_names_too(hostile):
    with pytest.raises(js.JaxshardError) as caught:
        js.plan(hostile, "mp2")
    assert _is_safe(str(caught.value))
    assert "\\x1b]0;owned" in str(caught.value)
