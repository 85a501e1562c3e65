"""Targets: which files a request makes, decided without a disk."""

from __future__ import annotations

import json

import pytest

from jaxshard.conversion.targets import lay_out_for, make_result
from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, Model, StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.core.layout import Layout, Placement, Strategy
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.formats.output_files import Request
from jaxshard.rules import read_rules

INDEX = "model.safetensors.index.json"


def catalog(*names: str, scalars: tuple[str, ...] = (), **how: object) -> Catalog:
    tensors = {
        name: Tensor(name, BY_NAME["BF16"], shape, (StoredShard(0, 0, Box.whole(shape)),))
        for name, shape in {**dict.fromkeys(names, (8, 8)), **dict.fromkeys(scalars, ())}.items()
    }
    files = (File("f", 10**6),)
    return Catalog("m", "x", files, tensors, scalars=frozenset(scalars), **how)


def made(source: Catalog, **how: object):
    return make_result(source, list(source.tensors.values()), Request(**how))


def test_a_complete_checkpoint_is_one_file_or_several_with_an_index():
    source = catalog("a", "b", "c")
    one = made(source)
    assert (one.outputs.paths, dict(one.side_files)) == (("model.safetensors",), {})
    several = made(source, max_shard_bytes=300)
    assert several.outputs.paths == tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = json.loads(several.side_files[INDEX])
    assert index["metadata"]["total_size"] == 3 * 128
    assert index["weight_map"] == {n: several.outputs.paths[n == "c"] for n in "abc"}


def test_numbers_of_a_job_go_beside_the_weights():
    result = made(catalog("a", scalars=("global_step",)))
    assert result.outputs.paths == ("model.safetensors", "hyper_param.safetensors")
    assert INDEX not in result.side_files


def test_metadata_says_a_format_that_transformers_loads():
    for given in ({}, {"format": "ms"}, {"format": "pt", "more": "kept"}):
        result = made(catalog("a", metadata=given))
        header = result.container.layout(result.outputs.contents[0]).segments[0][1]
        told = json.loads(header[8:])["__metadata__"]
        assert told == {**given, "format": "pt"}


def test_every_rank_has_a_file_and_the_strategy_goes_with_them():
    layout = Layout(2, {"a": (Placement((("mp", 2),), (("mp",),)),)})
    result = made(catalog("a", scalars=("global_step",)), to=layout, prefix="net_")
    assert result.outputs.paths == tuple(f"rank_{r}/net_rank_{r}-1_1.safetensors" for r in (0, 1))
    assert set(result.side_files) == {f"strategy/ckpt_strategy_rank_{r}.ckpt" for r in (0, 1)}
    assert all(len(c) == 2 for c in result.outputs.contents)  # the number is on every rank


def test_what_strategy_files_cannot_say_our_own_does_and_a_note_tells():
    layout = Layout(4, {"a": (Placement((("all", 4),)),), "b": (Placement((("mp", 2),), (), 2),)})
    result = made(catalog("a", "b"), to=layout)
    assert set(result.side_files) == {"strategy/layout.json"}
    (note,) = result.outputs.layout.notes
    assert note.startswith("the layout is in strategy/layout.json, because")


def test_a_dim_that_does_not_divide_is_refused_by_its_name():
    layout = Layout(3, {"a": (Placement((("mp", 3),), (("mp",),)),)})
    with pytest.raises(LayoutError, match=r"^a: dim 0 of shape \(8, 8\)"):
        made(catalog("a"), to=layout)


def test_rules_of_ones_own_stand_alone_where_the_family_is_not_known():
    rules = read_rules('[specs]\n"*" = "mp,-"')
    layout = lay_out_for(catalog("odd"), Strategy(mp=2), rules)
    assert str(layout.placements["odd"][0]).startswith("[mp]")
    with pytest.raises(NotFoundError, match="Pass rules"):
        lay_out_for(catalog("odd"), Strategy(mp=2))


def test_rules_of_ones_own_go_before_the_familys():
    source = catalog("model.norm.weight", "lm_head.weight", model=Model("llama", 1))
    rules = read_rules('[specs]\n"lm_head.*" = "-,mp"')
    for given, spec in ((None, "[mp]"), (rules, "[-,mp]")):
        layout = lay_out_for(catalog("lm_head.weight", model=source.model), Strategy(mp=2), given)
        assert str(layout.placements["lm_head.weight"][0]).startswith(spec)
