"""The public functions: typed keywords that are the command line's flags, spelled one way."""

from __future__ import annotations

import argparse
import inspect

import checkpoints
import jax
import numpy as np
import pytest

import jaxshard as js
from jaxshard import api
from jaxshard.cli.parsing import parser
from jaxshard.conversion.execute import execute
from jaxshard.conversion.prepare import ConvertOptions, ResultOptions, RunOptions, prepare

VERBS = {
    "convert": (js.convert, 2),
    "merge": (js.merge, 2),
    "slice": (js.slice, 3),
    "plan": (js.plan, 1),
    "merge_lora": (js.merge_lora, 2),
    "load_rank": (js.load_rank, 2),
    "verify": (js.verify, 1),
    "load": (js.load, 1),
    "save": (js.save, 2),
    "reshard": (js.reshard, 2),
    "open": (js.open, 1),
}
#: Of the command line alone: what it shows; js.register_models.
ON_SCREEN = {"help", "json", "quiet", "svg", "models"}


def keywords(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def flags(command: str) -> set[str]:
    """The flags and positional arguments of ``command``, as Python spells them.

    ``--dry-run`` is ``js.plan``, and ``--no-fsync`` is ``fsync=False``.
    """
    (commands,) = (
        a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction)
    )
    found = {a.dest for a in commands[command]._actions} - ON_SCREEN - {"dry_run"}
    return {"fsync" if flag == "no_fsync" else flag for flag in found}


@pytest.mark.parametrize("name", VERBS)
def test_an_unknown_keyword_is_an_error_that_names_the_function_called(name):
    function, num_positional = VERBS[name]
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'no'$"):
        function(*["x"] * num_positional, no=1)


def test_every_flag_of_convert_is_a_keyword_and_every_keyword_a_flag():
    assert flags("convert") == keywords(js.convert) - {"progress"}


def test_the_other_conversions_have_the_flags_of_convert_too():
    both = keywords(js.convert)
    assert keywords(js.merge) == both - {"to"}
    assert keywords(js.slice) == both
    assert keywords(js.plan) == both - {"progress"}
    assert flags("plan") <= keywords(js.plan)
    assert flags("lora") == keywords(js.merge_lora) - {"progress"}


def test_every_flag_of_verify_is_a_keyword():
    of_runs = {"deep"}  # the steps of a training run, which js.verify does not check
    assert flags("verify") - of_runs == keywords(js.verify) - {"progress"}


def test_type_checkers_know_the_options_that_the_functions_take():
    assert ResultOptions.__optional_keys__ == keywords(prepare) - {"source", "to", "destination"}
    assert RunOptions.__optional_keys__ == keywords(execute) - {
        "prepared",
        "destination",
        "progress",
    }
    assert ConvertOptions.__optional_keys__ <= keywords(js.convert)


def test_no_public_function_takes_any_keyword():
    for name in api.__all__:
        kinds = {p.kind for p in inspect.signature(getattr(js, name)).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_api_has_every_function_that_the_package_has():
    functions = {n for n in js.__all__ if inspect.isfunction(getattr(js, n))}
    assert set(api.__all__) == functions
    assert all(getattr(api, name) is getattr(js, name) for name in functions)
    with pytest.raises(AttributeError):
        _ = api.lode


@pytest.mark.parametrize("size", [1 << 20, "1MiB", "1 MiB"])
def test_a_size_may_be_text_everywhere(tmp_path, size):
    source = tmp_path / "llama"
    checkpoints.write_llama(source, layers=1)
    js.convert(source, tmp_path / "o", "mp2", host_bytes=size)
    js.merge(tmp_path / "o", tmp_path / "m", host_bytes=size, max_shard_size=size)
    assert js.plan(source, host_bytes=size).host_bytes <= 1 << 20
    assert js.verify(tmp_path / "m", source, host_bytes=size, workers=1).problems == ()
    params = js.load(source, jax.devices()[0], host_bytes=size)
    js.save(params, tmp_path / "s", host_bytes=size, max_shard_size=size)
    moved = js.reshard(
        params, jax.sharding.SingleDeviceSharding(jax.devices()[1]), device_bytes=size
    )
    kept = js.load_rank(source, "full", host_bytes=size)
    assert all(np.array_equal(moved[name], kept[name]) for name in kept)
    manager = js.CheckpointManager(tmp_path / "run", host_bytes=size)
    manager.save(1, params)
    manager.close()


def test_one_rank_may_be_a_number(tmp_path):
    checkpoints.write_llama(tmp_path / "llama", layers=1)
    js.convert(tmp_path / "llama", tmp_path / "o", "mp2", rank=1)
    assert [p.name for p in (tmp_path / "o").glob("rank_*")] == ["rank_1"]
    with pytest.raises(js.LayoutError, match=r"rank= \(--rank\) 2: the target has ranks 0 to 1"):
        js.plan(tmp_path / "llama", "mp2", rank=2)


# --- How values look when they are printed


@pytest.fixture
def stored(tmp_path):
    """A checkpoint of three small tensors, in a folder whose name is markup."""
    path = tmp_path / "<b>llama"
    weights = {f"layers.{n}.weight": np.zeros((4, 8), np.float32) for n in range(3)}
    js.save(weights, path, fsync=False)
    return path


def test_a_value_prints_itself_on_one_short_line(stored, tmp_path):
    catalog = js.open(stored)
    layout = js.Layout(2, {"w": (js.Placement((("mp", 2),), (("mp",),)),)})
    moved = js.prepare_reshard(
        {"w": jax.numpy.zeros(4)}, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    report = js.convert(catalog, tmp_path / "out", fsync=False)
    plan = js.plan(catalog)
    assert repr(catalog) == f"Catalog({str(stored)!r}, huggingface, 3 tensors, 384 B, 1 files)"
    assert repr(layout) == "Layout(2 ranks, 1 tensors)"
    assert repr(plan) == "Plan(3 tensors to 1 files, 384 B read, 384 B written)"
    assert repr(report) == f"Report({str(tmp_path / 'out')!r}, 1 files, 384 B, 1 notes)"
    assert repr(moved).startswith("Resharder(1 arrays, ")
    assert repr(js.Strategy("dp2mp4")) == "Strategy(dp=2, mp=4)"


def test_the_tables_for_notebooks_contain_only_escaped_text(stored):
    catalog = js.open(stored)
    layout = js.Layout(2, {"<i>": (js.Placement((("<i>", 2),), (("<i>",),)),)})
    for value in (catalog, layout, js.plan(catalog)):
        html = value._repr_html_()
        assert html.startswith("<table>")
        assert html.count("<table>") == html.count("</table>") == 1
        assert "<b>" not in html
        assert "<i>" not in html
    assert "<td>F32</td><td>3</td><td>384 B</td>" in catalog._repr_html_()
    assert "<td>bytes_read</td><td>384</td>" in js.plan(catalog)._repr_html_()


def test_each_verb_logs_one_line_with_its_bytes_at_its_end(stored, tmp_path, caplog):
    quick = {"fsync": False}
    params = {"w": jax.numpy.zeros(8)}
    manager = js.CheckpointManager(tmp_path / "run", **quick)
    verbs = {
        "load": lambda: js.load(stored, jax.devices()[0]),
        "save": lambda: js.save(params, tmp_path / "saved", **quick),
        "convert": lambda: js.convert(stored, tmp_path / "converted", **quick),
        "merge": lambda: js.merge(stored, tmp_path / "merged", **quick),
        "slice": lambda: js.slice(stored, tmp_path / "sliced", "same", **quick),
        "verify": lambda: js.verify(stored),
        "save step": lambda: (manager.save(1, params), manager.wait()),
        "restore step": lambda: manager.restore(params),
    }
    caplog.set_level("INFO", logger="jaxshard")
    for verb, call in verbs.items():
        caplog.clear()
        call()
        lines = [r.getMessage() for r in caplog.records if r.name == "jaxshard"]
        done = [line for line in lines if line.endswith(" GB/s")]
        assert len(done) == 1, (verb, lines)
        assert done[0].startswith(f"{verb} "), done
        assert ": 0 B" not in done[0] or verb == "verify", done


@pytest.mark.parametrize("verb", ["convert", "merge", "slice", "verify"])
def test_progress_true_is_a_bar_on_a_terminal_only(verb, stored, tmp_path, capsys, monkeypatch):
    def call(out: str) -> str:
        if verb == "verify":
            js.verify(stored, stored, progress=True)
        else:
            to = ("same",) if verb == "slice" else ()
            getattr(js, verb)(stored, tmp_path / out, *to, fsync=False, progress=True)
        return capsys.readouterr().err

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert verb not in call("plain")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert verb in call("terminal")
