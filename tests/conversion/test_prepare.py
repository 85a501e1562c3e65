"""Preparation: one plan from headers alone, and a fingerprint of everything that decides it."""

from __future__ import annotations

import re

import checkpoints
import pytest

import jaxshard as js
from jaxshard.conversion import execute as executing
from jaxshard.conversion import prepare as preparing
from jaxshard.conversion.prepare import prepare
from jaxshard.core.layout import Layout, Placement

QUICK = {"fsync": False}


@pytest.fixture
def llama(tmp_path):
    checkpoints.write_llama(tmp_path / "llama", num_files=2)
    return tmp_path / "llama"


def test_a_request_is_known_by_all_that_changes_the_result(llama):
    """Else --resume would go on with another one's files."""
    requests = {
        "plain": prepare(llama, "dp2mp2").request,
        "lean": prepare(llama, "dp2mp2", remove_redundancy=True).request,
        "other": prepare(llama, "mp2dp2").request,
        "swapped": prepare(llama, "dp4").request,
        "some": prepare(llama, "dp2mp2", exclude=["norm"]).request,
        "rank": prepare(llama, "dp2mp2", rank=[1]).request,
        "prefix": prepare(llama, "dp2mp2", prefix="net_").request,
        "full": prepare(llama).request,
        "small": prepare(llama, max_shard_size=1000).request,
    }
    assert requests.pop("other") == requests["plain"]  # the same, spelled otherwise
    assert len(set(requests.values())) == len(requests)
    (llama / "model-00001-of-00002.safetensors").touch()
    assert prepare(llama, "dp2mp2").request != requests["plain"]


def test_layouts_that_differ_only_in_who_holds_which_box_are_other_requests(llama):
    w = "model.embed_tokens.weight"
    two = (("a", 2), ("b", 2))
    made = [
        prepare(llama, Layout(4, {w: (Placement(two, (axes,)),)}, ()), include=[re.escape(w)])
        for axes in (("a", "b"), ("b", "a"))
    ]
    assert made[0].request != made[1].request


def test_files_read_by_another_strategy_are_another_request(llama, tmp_path):
    """Else --resume would mix results: names, shapes and the files' states are the same."""
    w, two = "model.embed_tokens.weight", (("a", 2), ("b", 2))
    for name, axes in (("cut", ("a", "b")), ("other", ("b", "a"))):
        layout = Layout(4, {w: (Placement(two, (axes,)),)})
        js.slice(llama, tmp_path / name, layout, include=[re.escape(w)], **QUICK)
    requests = [
        prepare(tmp_path / "cut", src_strategy=tmp_path / name / "strategy").request
        for name in ("cut", "other", "cut")
    ]
    assert requests[0] == requests[2] != requests[1]


def test_another_mapping_is_another_request(llama):
    orders = [prepare(llama, names=names).request for names in (None, "hf:linen", "hf:nnx")]
    assert len(set(orders)) == 3


def test_the_name_of_a_file_says_its_format_before_that_is_asked_for(llama, tmp_path):
    js.convert(llama, tmp_path / "out.ckpt", crc=True)
    js.convert(llama, tmp_path / "told.ckpt", crc=True, format="ckpt")
    assert (tmp_path / "out.ckpt").read_bytes() == (tmp_path / "told.ckpt").read_bytes()


OPTIONS = {
    "none": {},
    "a budget": {"workers": 1, "host_bytes": 1 << 19},
    "a file": {"destination": "one.safetensors"},
    "replicas": {"check_replicas": True},
    "in parts": {"process_index": 0, "process_count": 2},
    "names": {"names": "llama-hf:llama-mindformers", "host_bytes": "2MiB"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_conversion_is_planned_once_and_opened_once(case, tmp_path, monkeypatch):
    """Whatever the options: half a second at 90,000 tensors, and a request for every file."""
    checkpoints.write_llama(tmp_path / "llama")
    js.convert(tmp_path / "llama", tmp_path / "cut", "dp2", **QUICK)
    options = dict(OPTIONS[case])
    place = tmp_path / str(options.pop("destination", "out"))
    calls = []
    for module, name in [
        (preparing, "make_plan"),
        (preparing, "budget_for"),
        (preparing, "opened"),
        (executing, "open_source"),
    ]:
        plain = getattr(module, name)

        def counted(*args, _name=name, _plain=plain, **kwargs):
            calls.append(_name)
            return _plain(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    js.convert(tmp_path / "cut", place, "full", **QUICK, **options)
    assert sorted(calls) == ["budget_for", "make_plan", "open_source", "opened"]
