"""Decoders of TOML and YAML end in a value or in one of jaxshard's errors, whatever the text."""

from __future__ import annotations

import os
import threading
import tomllib

import checkpoints
import pytest
import text_fuzz
from hypothesis import given
from hypothesis import strategies as st

import jaxshard as js
from jaxshard import mindformers
from jaxshard.core.decoders import (
    MAX_YAML_BYTES,
    as_int,
    as_ints,
    as_list,
    as_object,
    parse_toml,
    parse_yaml,
)
from jaxshard.storage.fs import (
    read_bytes,
    read_text,
)

yaml = pytest.importorskip("yaml")


@pytest.mark.parametrize("line", text_fuzz._TOML_LINES)
def test_toml_that_python_cannot_hold_is_refused(line):
    text = line.encode("utf-8", "replace").decode()
    try:
        value = parse_toml(text, "r.toml")
    except js.LayoutError as error:
        message = str(error)
    else:
        message = f"r.toml: {value}"
        assert str(value) == str(tomllib.loads(text))
    assert message.startswith("r.toml: ")


@pytest.mark.parametrize("line", text_fuzz._YAML_LINES)
def test_yaml_that_python_cannot_hold_is_refused(line):
    try:
        value = parse_yaml(line, "j.yaml")
    except js.FormatError as error:
        message = str(error)
    else:
        message = f"j.yaml: {value}"
        assert value == yaml.safe_load(line)
    assert message.startswith("j.yaml: ")


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9) | st.none()))
def test_plain_yaml_is_read_as_pyyaml_reads_it(values):
    text = yaml.safe_dump(values)
    assert parse_yaml(text, "j.yaml") == yaml.safe_load(text)


def test_aliases_and_merge_keys_of_a_job_are_kept():
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, z: 3}\nc: *a"
    assert parse_yaml(text, "j.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize("levels", [6, 12, 40])
def test_aliases_that_multiply_are_refused_before_they_are_expanded(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, levels)]
    merges = ["m0: &m0 {k: v}"]
    merges += [f"m{i}: &m{i} {{<<: [{', '.join(9 * [f'*m{i - 1}'])}]}}" for i in range(1, levels)]
    for text in (lines, merges):
        with pytest.raises(js.FormatError, match="more than 100000 values"):
            parse_yaml("\n".join(text), "j.yaml")


def test_a_configuration_larger_than_any_is_refused_unread(tmp_path):
    (tmp_path / "j.yaml").write_text("a: 1\n" * MAX_YAML_BYTES)
    with pytest.raises(js.FormatError, match=f"more than {MAX_YAML_BYTES} bytes"):
        mindformers.from_config(tmp_path / "j.yaml")


def test_a_pipe_is_read_and_one_without_a_writer_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(tmp_path / "pipe", 10) == b""  # no writer
    reader, writer = os.pipe()  # as a shell's <(command) gives it
    os.write(writer, b"[specs]\n")
    os.close(writer)
    assert read_text(f"/dev/fd/{reader}", 100) == "[specs]\n"
    os.close(reader)


def test_a_slow_pipe_is_waited_for():
    reader, writer = os.pipe()
    timer = threading.Timer(0.05, lambda: (os.write(writer, b"x"), os.close(writer)))
    timer.start()
    assert read_bytes(f"/dev/fd/{reader}", 100) == b"x"
    timer.join()
    os.close(reader)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda p: None, js.NotFoundError, "does not exist"),
        (lambda p: p.mkdir(), js.StorageError, "directory"),
        (lambda p: p.write_bytes(b"\xff"), js.FormatError, "not UTF-8"),
        (lambda p: p.write_bytes(b"x" * 99), js.FormatError, "more than 50 bytes"),
    ],
)
def test_what_is_not_a_small_text_is_refused_by_name(tmp_path, make, error, text):
    make(tmp_path / "t")
    with pytest.raises(error, match=text) as caught:
        read_text(tmp_path / "t", 50, "--rules t")
    assert str(caught.value).startswith("--rules t")


@pytest.mark.parametrize("kind", ["huggingface", "orbax"])
def test_a_config_that_cannot_be_read_leaves_the_checkpoint_readable(tmp_path, kind):
    checkpoints.write_llama(tmp_path / "hf")
    place = tmp_path / "hf"
    if kind == "orbax":
        place = tmp_path / "o"
        js.convert(tmp_path / "hf", place, format="orbax")
    config = place / "config.json"
    for data in (b"[" * 100_000, b"{", b"[]", b'{"model_type": 3}', b"\xed\xa0\x80"):
        config.write_bytes(data)
        assert js.open(place).model.num_layers is None
    config.unlink()
    os.mkfifo(config)  # listed as no file: opening it would wait for a writer
    assert js.open(place).model.num_layers is None


def test_mutated_texts_end_in_values_or_in_errors_of_jaxshard():
    ended, failures = text_fuzz.run(count=900, seed=1)
    assert not failures, failures[:3]
    assert ended["decoded"] > 100
    assert ended["FormatError"] > 100


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (as_object, [{}, {"a": 1}], [None, [], "a"]),
        (as_list, [[], [1]], [None, {}, "a", 1]),
        (lambda v, s: as_list(v, s, 1), [[], [{}]], [[1, 2]]),
        (lambda v, s: as_int(v, s, 0, 9), [0, 9], [-1, 10, True, 1.0, "1", None]),
        (lambda v, s: as_ints(v, s, 0, 9), [[], [0, 9]], [[-1], [10], [True], [1.0], None, 1]),
    ],
)
def test_json_fields_of_another_type_or_range_are_refused_by_name(check, good, bad):
    for value in good:
        found = check(value, "f.json: n")
        assert (list(found) if isinstance(found, tuple) else found) == value
    for value in bad:
        with pytest.raises(
            js.FormatError, match=r"^f.json: n is .* \(expected .*\)\. Fetch the file"
        ):
            check(value, "f.json: n")
