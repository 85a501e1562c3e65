"""The command line: output, errors on standard error, and exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import checkpoints
import numpy as np
import pytest

import jaxshard as js
from jaxshard import cli
from jaxshard.cli import commands, parsing
from jaxshard.formats import registry
from jaxshard.models import reading
from jaxshard.storage.resources import fit_budget

ROOT = Path(__file__).parents[2]


@pytest.fixture
def llama(tmp_path):
    checkpoints.write_llama(tmp_path / "llama", num_files=2)
    return tmp_path / "llama"


def answer(capsys, *arguments: object) -> str:
    assert checkpoints.run(*arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_convert_matches_the_totals_of_plan(llama, capsys, tmp_path):
    how = ("--to", "dp2mp2", "--remove-redundancy", "--rank", 0, "--rank", 3, "--rank", 0)
    planned = json.loads(answer(capsys, "plan", llama, *how, "--json"))
    dry = json.loads(answer(capsys, "convert", llama, tmp_path / "x", *how, "--json", "--dry-run"))
    assert dry == planned
    assert not (tmp_path / "x").exists()
    done = json.loads(answer(capsys, "convert", llama, tmp_path / "x", *how, "--json"))
    assert done["num_files"] == planned["num_files"] == 2
    assert {k: planned[k] for k in done["counts"]} == done["counts"]
    assert sorted(p.name for p in (tmp_path / "x").glob("rank_*")) == ["rank_0", "rank_3"]


def test_json_output_is_complete(llama, capsys, tmp_path):
    facts = json.loads(answer(capsys, "inspect", llama, "--json"))
    assert (facts["format"], facts["model_type"], facts["num_tensors"]) == (
        "huggingface",
        "llama",
        21,
    )
    assert facts["tensors"]["model.norm.weight"] == {
        "dtype": "BF16",
        "shape": [16],
        "num_pieces": 1,
    }
    assert [f["path"] for f in facts["files"]] == [
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]
    verdict = json.loads(answer(capsys, "verify", llama, "--against", llama, "--json"))
    assert (verdict["problems"], verdict["num_tensors"]) == ([], 21)


def test_a_json_error_is_one_object_and_also_a_line_on_stderr(capsys, tmp_path):
    assert checkpoints.run("inspect", tmp_path / "absent", "--json") == 2
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["error"] == "NotFoundError"
    assert err == f"jaxshard: NotFoundError: {told['message']}\n"


def test_quiet_is_silent(llama, capsys, tmp_path):
    for command in (
        ("inspect", llama),
        ("plan", llama, "--to", "mp2"),
        ("slice", llama, tmp_path / "cut", "--to", "mp2"),
        ("verify", tmp_path / "cut", "--against", llama),
    ):
        assert answer(capsys, *command, "--quiet") == ""
    assert answer(capsys, "inspect", llama, "-q") == ""


def test_quiet_has_a_short_form_on_every_command():
    flags = [a.option_strings for a in _actions(cli.parser()) if "--quiet" in a.option_strings]
    assert flags
    assert all("-q" in names for names in flags)


def test_reports_use_singular_and_plural(llama, capsys, tmp_path):
    out = answer(capsys, "merge", llama, tmp_path / "one")
    assert f"{tmp_path / 'one'}: 1 file with 11.4 KB written, 11.4 KB read" in out
    out = answer(capsys, "slice", llama, tmp_path / "cut", "--to", "mp2")
    assert ": 2 files with" in out
    out = answer(capsys, "verify", tmp_path / "cut")
    assert out.splitlines()[-1] == "21 tensors, 160 B compared: all is well"


def test_a_strategy_precedes_a_folder_of_the_same_name(llama, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        answer(capsys, "slice", llama, "mp2", "--to", "mp2", "--overwrite")
    answer(capsys, "slice", llama, "again", "--to", "./mp2/strategy")
    assert checkpoints.stored(Path("again/rank_1")) == checkpoints.stored(Path("mp2/rank_1"))


def test_a_fully_sharded_strategy_and_names_without_a_rule_are_converted(llama, capsys, tmp_path):
    to = ("--to", "fsdp2mp2")
    answer(capsys, "slice", llama, tmp_path / "cut", *to)
    assert [p.name for p in sorted((tmp_path / "cut").glob("rank_*"))] == [
        f"rank_{rank}" for rank in range(4)
    ]
    answer(capsys, "verify", tmp_path / "cut", "--against", llama)
    js.save({"tower.kernel": np.zeros((256, 512), np.float32)}, tmp_path / "new")
    assert checkpoints.run("slice", tmp_path / "new", tmp_path / "out", *to) == 2
    assert "--unmatched largest" in capsys.readouterr().err
    how = (*to, "--unmatched", "largest")
    out = answer(capsys, "slice", tmp_path / "new", tmp_path / "out", *how)
    assert "split by their shapes alone: tower.kernel (256, 512) as fsdp,mp" in out
    share = js.load_rank(tmp_path / "out", "same", 3)
    assert share["tower.kernel"].shape == (128, 256)
    with pytest.raises(SystemExit):
        checkpoints.run("slice", "--help")
    assert "a strategy (dp2mp4pp2, fsdp4mp2)" in " ".join(capsys.readouterr().out.split())


def test_strategy_options_without_effect_are_refused(llama, capsys):
    for flag in (("--src-strategy", llama), ("--suffix", "1_10")):
        assert checkpoints.run("inspect", llama, *flag) == 2
        assert "Leave them out" in capsys.readouterr().err


def test_notes_of_the_rules_are_printed(llama, capsys, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text('[specs]\n"absent.*" = "mp,-"\n')
    how = ("--to", "mp2", "--rules", rules)
    assert 'note: the rules for "absent.*" match no tensor.' in answer(capsys, "plan", llama, *how)
    assert "note: the rules for" in answer(capsys, "slice", llama, tmp_path / "out", *how)


def run_it(*arguments: object, **how: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxshard", *map(str, arguments)]
    return subprocess.run(command, text=True, check=False, cwd=ROOT, stderr=subprocess.PIPE, **how)


def test_a_closed_pipe_is_not_an_error(llama):
    reading, writing = os.pipe()
    os.close(reading)
    done = run_it("inspect", llama, "--tensors", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 2), (["--version"], 0), (["--help"], 0), (["convert"], 2), (["dance"], 2)],
)
def test_an_argument_error_exits_with_status_2(arguments, status):
    assert run_it(*arguments, stdout=subprocess.DEVNULL).returncode == status


def test_a_plan_in_python_equals_that_of_the_command_line(llama, capsys):
    how = {"remove_redundancy": True}
    text = answer(capsys, "plan", llama, "--to", "dp2mp2", "--remove-redundancy")
    assert f"{js.plan(llama, 'dp2mp2', **how)}\n" == text
    assert "reads   11.4 KB in 33 requests to 2 files, at most 17 to one\n" in text
    assert "holds   " in text
    assert "of data in memory at most" in text


def test_a_plan_reports_the_requests_of_each_file_and_the_memory(llama, capsys):
    how = ("--to", "mp2", "--workers", 3, "--host-bytes", "3MiB")
    told = json.loads(answer(capsys, "plan", llama, *how, "--json"))
    assert list(told["reads_of_files"]) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sum(told["reads_of_files"].values()) == told["num_reads"] > 21
    assert told["peak_host_bytes"] == fit_budget(3 << 20, 3).host_bytes <= 3 << 20


@pytest.mark.parametrize("host_bytes", ["512KiB", "4MiB", None])
@pytest.mark.parametrize("form", ["linen", "mcore-fused"])
def test_a_dry_run_of_a_mapping_counts_in_the_tiles_of_the_budget(
    tmp_path, capsys, host_bytes, form
):
    """Transposed weights larger than a tile: the smaller the budget, the more requests."""
    folder, options = tmp_path / "llama", {"fsync": False, "workers": 2}
    if host_bytes:
        options |= {"host_bytes": host_bytes}
    write_heads(folder)
    how = {"to": "mp2", "names": f"hf:{form}"}
    totals = js.plan(folder, **options, **how).totals
    report = js.convert(folder, tmp_path / "out", **options, **how)
    assert {n: getattr(totals, n) for n in asdict(report.counts)} == asdict(report.counts)


def write_heads(folder: Path) -> None:
    """Write a Llama with the head counts in its config, which fusing needs."""
    checkpoints.write_llama(folder, layers=1, hidden=384)
    config = json.loads((folder / "config.json").read_text())
    heads = {"hidden_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, **heads}))


# --- one file ------------------------------------------------------------------------


def test_a_destination_with_a_weight_file_name_is_written_as_one_file(llama, capsys, tmp_path):
    answer(capsys, "slice", llama, tmp_path / "cut", "--to", "mp2")
    for name in ("out.safetensors", "out.ckpt"):
        for flag in ((), ("--overwrite",)):
            out = answer(capsys, "merge", tmp_path / "cut", tmp_path / name, *flag)
        assert "1 file with" in out
        assert "config.json, tokenizer.json not carried along: the result is one file" in out
        assert (tmp_path / name).is_file()
        answer(capsys, "verify", tmp_path / name, "--against", llama)
        assert checkpoints.run("merge", tmp_path / "cut", tmp_path / name) == 2
        assert "exists" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] == ".") == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--to", "mp2"),
            "names one file, but the result is rank_0/checkpoint_rank_0-1_1.safetensors, ",
        ),
        (("--max-shard-size", "2KB"), "names one file, but the result is model-00001-of-"),
        (("--format", "ckpt"), "ends in .safetensors, but the result is model.ckpt"),
        (("--format", "iteration"), "names one file"),
        (("--process-index", 0, "--process-count", 2), "which one process writes"),
    ],
)
def test_several_files_are_refused_for_a_file_name(llama, capsys, tmp_path, flags, message):
    assert checkpoints.run("convert", llama, tmp_path / "out.safetensors", *flags) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


# --- resuming, and progress ------------------------------------------------------------


def test_an_interrupted_run_is_resumed(llama, capsys, tmp_path, monkeypatch):
    out, real, left = tmp_path / "out", os.fsync, [5]  # the journal needs two

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    command = ("slice", llama, out, "--to", "mp4", "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert checkpoints.run(*command) == 4
    assert "goes on with resume=True (--resume)" in capsys.readouterr().err
    assert not out.exists()
    assert checkpoints.run(*command) == 2
    assert "Go on with resume=True (--resume)" in capsys.readouterr().err
    text = answer(capsys, *command, "--resume")
    assert text.startswith(f"{out}: 2 files with ")
    assert "finished before: 2 files\n" in text
    answer(capsys, "verify", out, "--against", llama)
    assert json.loads(answer(capsys, *command, "--overwrite", "--json"))["skipped_files"] == 0


def on_a_terminal(
    *arguments: object, stream: str = "stderr", **environment: str
) -> tuple[bytes, str]:
    """What a command shows on a terminal, and what it writes to the other stream, a pipe."""
    ours, theirs = pty.openpty()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: theirs}
    known = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PAGER", "LESS")}
    with open(ours, "rb", buffering=0) as screen:
        done = subprocess.run(
            [sys.executable, "-m", "jaxshard", *map(str, arguments)],
            **streams,
            stdin=subprocess.DEVNULL,
            check=True,
            cwd=ROOT,
            text=True,
            env={**known, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "24", **environment},
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # raised by a terminal whose other end is closed
            while more := screen.read(4096):
                shown += more
    return shown, done.stdout if stream == "stderr" else done.stderr


def test_progress_is_shown_on_a_terminal(llama, tmp_path):
    shown, out = on_a_terminal("slice", llama, tmp_path / "out", "--to", "mp2")
    assert b"writing" in shown
    assert b"11.6/11.6 kB" in shown
    assert "writing" not in out


_COLOR = re.compile(rb"\x1b\[[0-9;]*(?:3|9)[0-8][0-9;]*m")


@pytest.mark.parametrize(("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_removes_the_colors_of_the_progress_bar(llama, tmp_path, environment, colored):
    how = ("slice", llama, tmp_path / "out", "--to", "mp2")
    shown, _ = on_a_terminal(*how, **environment)
    assert b"writing" in shown
    assert bool(_COLOR.search(shown)) == colored


def test_a_pipe_gets_neither_colors_nor_progress(llama, tmp_path):
    how = ("slice", llama, tmp_path / "out", "--to", "mp2")
    command = [sys.executable, "-m", "jaxshard", *map(str, how)]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=environment)
    assert done.stderr == b""
    assert b"\x1b" not in done.stdout


# --- The list of tensors -----------------------------------------------------------------


def names_of(out: str) -> list[str]:
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("tensor "))
    return [line.split()[0] for line in lines[head + 1 :]]


def test_the_list_of_tensors_is_filtered_by_any_of_the_expressions(llama, capsys):
    flags = ("--include", "q_proj", "--include", r"^lm_head")
    listed = names_of(answer(capsys, "inspect", llama, *flags))
    assert len(listed) > 1
    assert all("q_proj" in name or name.startswith("lm_head") for name in listed)
    facts = json.loads(answer(capsys, "inspect", llama, "--json", *flags))
    assert list(facts["tensors"]) == listed
    assert facts["num_tensors"] == 21  # of the checkpoint
    assert checkpoints.run("inspect", llama, "--include", "absent") == 2
    assert "absent matches none of the 21 tensors" in capsys.readouterr().err


def test_the_list_of_tensors_is_sorted(llama, capsys):
    tensors = js.open(llama).tensors
    listed = {
        key: names_of(answer(capsys, "inspect", llama, "--sort", key))
        for key in ("name", "bytes", "dtype")
    }
    assert listed["name"] == sorted(tensors)
    sizes = [tensors[name].num_bytes for name in listed["bytes"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    dtypes = [tensors[name].dtype.name for name in listed["dtype"]]
    assert dtypes == sorted(dtypes)


_MARK = "sed s/^/paged:/"


def test_a_list_longer_than_the_terminal_is_shown_with_the_pager(llama):
    shown, _ = on_a_terminal("inspect", llama, "--tensors", stream="stdout", PAGER=_MARK)
    lines = shown.splitlines()
    assert len(lines) > 24
    assert all(line.startswith(b"paged:") for line in lines)


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["--tensors", "--no-pager"], {}),
        (["--tensors"], {"LINES": "200"}),  # it fits
        (["--tensors"], {"PAGER": "no-such-pager"}),
        (["--tensors"], {"PAGER": ""}),
        (["--tensors"], {"PAGER": "'open"}),
    ],
)
def test_the_list_is_printed_where_a_pager_does_not_help(llama, flags, environment):
    environment = {"PAGER": _MARK, **environment}
    shown, _ = on_a_terminal("inspect", llama, *flags, stream="stdout", **environment)
    assert b"lm_head.weight" in shown
    assert b"paged:" not in shown


def test_a_pipe_never_gets_a_pager(llama):
    environment = {**os.environ, "PAGER": _MARK, "LINES": "5"}
    command = [sys.executable, "-m", "jaxshard", "inspect", str(llama), "--tensors"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=environment)
    assert b"lm_head.weight" in done.stdout
    assert b"paged:" not in done.stdout


# --- Pictures --------------------------------------------------------------------------


def test_plan_and_inspect_draw_the_same_layout(llama, capsys, tmp_path):
    planned, stored = tmp_path / "plan.svg", tmp_path / "inspect.svg"
    answer(capsys, "plan", llama, "--to", "dp2mp2", "--svg", planned)
    answer(capsys, "slice", llama, tmp_path / "cut", "--to", "dp2mp2")
    answer(capsys, "inspect", tmp_path / "cut", "--svg", stored, "-q")
    planned_text, stored_text = (p.read_text().splitlines() for p in (planned, stored))
    cells = [line for line in planned_text if line.startswith("<rect")]
    assert len(cells) > 4
    assert [line for line in stored_text if line.startswith("<rect")] == cells
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["inspect.svg", "plan.svg"]


def test_a_picture_replaces_a_file_only_with_overwrite(llama, capsys, tmp_path):
    place = tmp_path / "plan.svg"
    place.write_text("mine")
    command = ("plan", llama, "--to", "mp2", "--svg")
    assert checkpoints.run(*command, place) == 2
    assert "plan.svg exists" in capsys.readouterr().err
    assert place.read_text() == "mine"
    answer(capsys, *command, place, "--overwrite")
    assert place.read_text().startswith("<svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "plan.svg"]
    weights = next(llama.glob("*.safetensors"))
    before = weights.read_bytes()
    assert checkpoints.run(*command, weights, "--overwrite") == 2
    assert "Let it end in .svg" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_a_checkpoint_without_ranks_is_not_drawn(llama, capsys, tmp_path):
    assert checkpoints.run("inspect", llama, "--svg", tmp_path / "x.svg") == 2
    assert "is not partitioned over ranks" in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()


# --- Completion --------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_the_completion_script_knows_commands_and_flags(capsys, shell):
    pytest.importorskip("shtab")
    script = answer(capsys, "completion", shell)
    assert "jaxshard" in script
    for word in ("strategy", "inspect", "remove-redundancy"):
        assert word in script


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["jaxshard", "insp"], ["inspect"]),
        (["jaxshard", "inspect", "--ten"], ["--tensors"]),
        (["jaxshard", "inspect", "chec"], ["checkpoint.ckpt"]),
        (["jaxshard", "plan", "x", "--rules", "chec"], ["checkpoint.ckpt"]),
    ],
)
def test_bash_completes_commands_flags_and_files(capsys, tmp_path, typed, completed):
    pytest.importorskip("shtab")
    (tmp_path / "script").write_text(answer(capsys, "completion", "bash"))
    (tmp_path / "checkpoint.ckpt").touch()
    words = " ".join(map(shlex.quote, typed))
    program = (
        f"compopt() {{ :; }}; source ./script; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; "
        '_shtab_jaxshard jaxshard "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert [word.strip() for word in done.stdout.split()] == completed, done.stderr


def test_completion_without_its_package_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert checkpoints.run("completion", "bash") == 2
    assert "pip install 'jaxshard[completion]'" in capsys.readouterr().err


# --- Help --------------------------------------------------------------------------------


def _help_examples() -> dict[str, list[str]]:
    found = {}

    def walk(name: str, at: argparse.ArgumentParser) -> None:
        _, _, examples = (at.epilog or "").partition("examples:\n")
        found[name] = [line.strip() for line in examples.splitlines()]
        for action in at._actions:
            if isinstance(action.choices, dict):
                for command, below in action.choices.items():
                    walk(f"{name} {command}", below)

    walk("jaxshard", cli.parser())
    return found


def test_each_command_has_two_examples_of_itself():
    examples = _help_examples()
    del examples["jaxshard"]  # one line per command, with comments
    for name, lines in examples.items():
        assert len(lines) == 2, name
        for line in lines:
            assert line.startswith(name)
            cli.parser().parse_args(shlex.split(line.partition(" > ")[0])[1:])


def test_the_examples_of_help_are_shown_line_by_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["strategy", "merge", "--help"])
    out = capsys.readouterr().out
    assert "\n  jaxshard strategy merge cut/strategy/ merged.ckpt\n" in out


#: Need an adapter, an encrypted file or JAX; the tests of these commands run them.
_NOT_RUN = ("lora", "decrypt", "demo", "completion")


def test_the_examples_of_help_work(llama, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = _help_examples()
    order = ["slice", "merge", *sorted(n.partition(" ")[2] for n in examples if " " in n)]
    for command in dict.fromkeys(order):
        if command not in _NOT_RUN:
            for line in examples[f"jaxshard {command}"]:
                answer(capsys, *shlex.split(line)[1:])


# --- replicas --------------------------------------------------------------------------


def test_differing_replicas_are_refused_on_request(llama, capsys, tmp_path):
    cut = tmp_path / "cut"
    answer(capsys, "slice", llama, cut, "--to", "dp2")
    merge = ("merge", cut, tmp_path / "out")
    answer(capsys, *merge, "--check-replicas")
    path = cut / "rank_1" / "checkpoint_rank_1-1_1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoints.run(*merge, "--check-replicas", "--overwrite") == 3
    err = capsys.readouterr().err
    assert (
        "differs between rank_0/checkpoint_rank_0-1_1.safetensors and rank_1/checkpoint_rank_1-1_1"
        in err
    )
    assert "one replica is enough" in err
    answer(capsys, *merge, "--overwrite")
    answer(capsys, "verify", tmp_path / "out", "--against", llama)  # the first replica is used


def test_deep_is_refused_without_steps(llama, capsys):
    for more in ((), ("--against", llama)):
        assert checkpoints.run("verify", llama, "--deep", *more) == 2
        assert "--deep is for the steps of a training run" in capsys.readouterr().err


def test_a_bug_shows_its_traceback(llama, monkeypatch):
    """A bug is not reported as a mistake of the user."""

    def broken(a):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(commands, "inspect", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", str(llama)])


def test_an_os_error_is_not_a_bug(llama, capsys, monkeypatch):
    def broken(a):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(commands, "inspect", broken)
    assert cli.main(["inspect", str(llama)]) == 4
    assert capsys.readouterr().err == "jaxshard: StorageError: /somewhere: Permission denied.\n"


def test_every_option_has_a_help_text():
    for action in _actions(cli.parser()):
        assert action.help, action.option_strings


def test_the_choices_of_format_are_the_registered_formats():
    assert parsing.FORMATS is registry.FORMATS


def _actions(parser):
    for action in parser._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for sub in action.choices.values():
                yield from _actions(sub)
        else:
            yield action


def test_models_lists_families_and_shows_the_table_of_one(capsys, tmp_path):
    assert cli.main(["models"]) == 0
    assert "llama" in capsys.readouterr().out
    assert cli.main(["models", "llama", "--form", "maxtext"]) == 0
    out = capsys.readouterr().out
    assert "params.decoder.layers.self_attention.query.kernel" in out
    assert "embed layer heads head_dim" in out
    assert cli.main(["models", "llama", "--form", "none"]) == 2
    assert "no form 'none'" in capsys.readouterr().err


def test_a_family_of_a_file_is_known_to_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_registered", {})
    table = tmp_path / "mine.toml"
    table.write_text('name = "mine"\ntypes = ["mine"]\nlike = "llama"\nlisted = ["hf"]')
    assert cli.main(["models", "--models", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mine"] == ["hf"]
    table.write_text("name = ")
    assert cli.main(["models", "--models", str(table)]) == 2
    assert f"{table}: not TOML" in capsys.readouterr().err
