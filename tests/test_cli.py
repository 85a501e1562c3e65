"""The command line: answers on standard output, errors beside it, a status that says who acts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest

from jaxshard import cli, commands

ROOT = Path(__file__).parent.parent


@pytest.fixture
def llama(tmp_path):
    checkpoints.write_llama(tmp_path / "llama", num_files=2)
    return tmp_path / "llama"


def answer(capsys, *arguments: object) -> str:
    assert checkpoints.run(*arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_what_convert_does_is_what_plan_said(llama, capsys, tmp_path):
    how = ("--to", "dp2mp2", "--remove-redundancy", "--rank", 0, "--rank", 3, "--rank", 0)
    planned = json.loads(answer(capsys, "plan", llama, *how, "--json"))
    dry = json.loads(answer(capsys, "convert", llama, tmp_path / "x", *how, "--json", "--dry-run"))
    assert dry == planned
    assert not (tmp_path / "x").exists()
    done = json.loads(answer(capsys, "convert", llama, tmp_path / "x", *how, "--json"))
    assert done["num_files"] == planned["num_files"] == 2
    assert {k: planned[k] for k in done["counts"]} == done["counts"]
    assert sorted(p.name for p in (tmp_path / "x").glob("rank_*")) == ["rank_0", "rank_3"]


def test_answers_in_json_are_complete(llama, capsys, tmp_path):
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


def test_an_error_in_json_is_one_object_and_still_a_line_beside(capsys, tmp_path):
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


def test_reports_count_in_words(llama, capsys, tmp_path):
    out = answer(capsys, "merge", llama, tmp_path / "one")
    assert f"{tmp_path / 'one'}: 1 file with 11.4 KB written, 11.4 KB read" in out
    out = answer(capsys, "slice", llama, tmp_path / "cut", "--to", "mp2")
    assert ": 2 files with" in out
    assert answer(capsys, "verify", tmp_path / "cut") == "21 tensors, 160 B compared: all is well\n"


def test_a_strategy_is_meant_even_if_a_folder_is_called_so(llama, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        answer(capsys, "slice", llama, "mp2", "--to", "mp2", "--overwrite")
    answer(capsys, "slice", llama, "again", "--to", "./mp2/strategy")
    assert checkpoints.stored(Path("again/rank_1")) == checkpoints.stored(Path("mp2/rank_1"))


def test_strategy_options_that_mean_nothing_are_refused(llama, capsys):
    for flag in (("--src-strategy", llama), ("--suffix", "1_10")):
        assert checkpoints.run("inspect", llama, *flag) == 2
        assert "Leave them out" in capsys.readouterr().err


def test_notes_of_the_rules_are_told(llama, capsys, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text('[specs]\n"absent.*" = "mp,-"\n')
    how = ("--to", "mp2", "--rules", rules)
    assert 'note: no tensor follows the rules for "absent.*".' in answer(
        capsys, "plan", llama, *how
    )
    assert "note: no tensor follows" in answer(capsys, "slice", llama, tmp_path / "out", *how)


def run_it(*arguments: object, **how: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxshard", *map(str, arguments)]
    return subprocess.run(command, text=True, check=False, cwd=ROOT, stderr=subprocess.PIPE, **how)


def test_a_reader_that_goes_away_is_no_error(llama):
    reading, writing = os.pipe()
    os.close(reading)
    done = run_it("inspect", llama, "--tensors", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 2), (["--version"], 0), (["--help"], 0), (["convert"], 2), (["dance"], 2)],
)
def test_the_grammar_has_its_own_status(arguments, status):
    assert run_it(*arguments, stdout=subprocess.DEVNULL).returncode == status


def test_a_bug_shows_its_traceback(llama, monkeypatch):
    """It is not dressed up as the user's mistake."""

    def broken(a):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(commands, "inspect", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", str(llama)])


def test_the_machine_refusing_is_not_a_bug(llama, capsys, monkeypatch):
    def broken(a):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(commands, "inspect", broken)
    assert cli.main(["inspect", str(llama)]) == 4
    assert capsys.readouterr().err == "jaxshard: StorageError: /somewhere: Permission denied.\n"


def test_every_option_is_explained():
    for action in _actions(cli.parser()):
        assert action.help, action.option_strings


def _actions(parser):
    for action in parser._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for sub in action.choices.values():
                yield from _actions(sub)
        else:
            yield action
