"""Pictures: readable for any layout, and short however many ranks."""

from __future__ import annotations

import re
import shutil
from xml.etree import ElementTree

import checkpoints
import pytest
from hypothesis import given
from random_layouts import in_memory, models
from test_laws import outputs_of

from jaxshard.core.catalog import Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import size_text
from jaxshard.planning import pictures
from jaxshard.planning.plan import make_plan

BF16 = BY_NAME["BF16"]


def drawn(shape: tuple[int, ...], placement: Placement) -> list[str]:
    return pictures.holders(Tensor("w", BF16, shape, ()), placement).splitlines()


@given(models())
def test_any_layout_can_be_drawn(model):
    source, target = model.layouts
    catalog, _ = in_memory(model, source)
    plan = make_plan(catalog, outputs_of(catalog, target, lean=True))
    for text in (pictures.catalog_text(catalog), str(plan)):
        assert all(len(line) < 200 for line in text.splitlines())
        for frame in re.findall(r"┌.*?┘", text, re.DOTALL):
            assert len({len(line) for line in frame.splitlines()}) == 1


@given(models(num_layouts=1))
def test_every_rank_is_in_the_picture_of_a_small_layout(model):
    (layout,) = model.layouts
    for tensor in model.tensors:
        for placement in layout.placements[tensor.name]:
            if placement.num_ranks <= 4 and len(placement.shards(tensor.shape)) > 1:
                cells = " ".join(drawn(tensor.shape, placement)[1:])
                shown = {int(n) for n in re.findall(r"\d+", cells)}
                split = [d for d in range(len(tensor.shape)) if placement.ways(d) > 1]
                if len(split) <= 2 and "to" not in cells:
                    assert shown == set(placement.ranks)


def test_rows_and_columns_are_cut_as_the_tensor_is():
    placement = Placement((("dp", 2), ("mp", 2)), (("mp",), ("dp",)), 8)
    assert drawn((4, 8), placement) == [
        "w  BF16 (4, 8)",
        "┌────┬────┐",
        "│ 8  │ 10 │",
        "├────┼────┤",
        "│ 9  │ 11 │",
        "└────┴────┘",
    ]


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,)])
def test_numbers_and_empty_tensors_are_one_cell(shape):
    assert drawn(shape, Placement((("dp", 3),)))[2] == "│ 0 to 2 │"


def test_thousands_of_ranks_are_a_few_lines():
    placement = Placement((("dp", 64), ("mp", 32)), (("mp",), ("dp",)))
    lines = drawn((2048, 2048), placement)
    assert len(lines) < 25
    assert max(map(len, lines)) < 100
    assert "…" in "".join(lines)


def test_long_tables_are_shortened_in_the_middle():
    rows = pictures.elided([[i, f"file {i}"] for i in range(2048)])
    text = pictures.table(["rank", "file"], rows)
    assert len(text.splitlines()) == 18
    assert "2047  file 2047" in text
    assert pictures.elided([[1]] * 16) == [[1]] * 16


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (1_705_119_744, "1.71 GB"), (1e21, "1e+06 PB")],
)
def test_sizes_have_three_digits(num_bytes, text):
    assert size_text(num_bytes) == text


def test_inspect_draws_who_holds_what(tmp_path, capsys):
    checkpoints.write_llama(tmp_path / "llama")
    assert checkpoints.run("slice", tmp_path / "llama", tmp_path / "cut", "--to", "dp2mp2pp2") == 0
    for rank in (1, 4):
        shutil.rmtree(tmp_path / "cut" / f"rank_{rank}")
    capsys.readouterr()
    assert checkpoints.run("inspect", tmp_path / "cut") == 0
    out = capsys.readouterr().out.replace(str(tmp_path), "")
    assert out == INSPECTED


INSPECTED = """\
/cut: rank files of a llama model with 2 layers, 8 ranks
21 tensors of 11.4 KB in 6 files of 24.1 KB

dtype  tensors    bytes
BF16        21  11.4 KB

rank  tensors    bytes  path
   0       10  3.97 KB  rank_0/checkpoint_rank_0-1_1.safetensors
   2       10  3.97 KB  rank_2/checkpoint_rank_2-1_1.safetensors
   3       10  3.97 KB  rank_3/checkpoint_rank_3-1_1.safetensors
   5       11  4.06 KB  rank_5/checkpoint_rank_5-1_1.safetensors
   6       11  4.06 KB  rank_6/checkpoint_rank_6-1_1.safetensors
   7       11  4.06 KB  rank_7/checkpoint_rank_7-1_1.safetensors

model.embed_tokens.weight  BF16 (32, 16)
┌──────┐
│ 0, 2 │
├──────┤
│ 1, 3 │
└──────┘

model.layers.0.mlp.down_proj.weight  BF16 (16, 32)
┌──────┬──────┐
│ 0, 2 │ 1, 3 │
└──────┴──────┘

model.layers.0.input_layernorm.weight  BF16 (16,)
┌────────┐
│ 0 to 3 │
└────────┘

note: no files of rank 1, 4; replicas are read instead where possible.
"""


# --- SVG ---------------------------------------------------------------------------------


def svg_texts(text: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(text).iter(f"{_SVG}text")]


_SVG = "{http://www.w3.org/2000/svg}"


def test_an_svg_has_a_rectangle_for_each_shard_of_each_placement():
    over = (("dp", 2), ("mp", 2))
    split, whole = Placement(over, ((), ("mp",))), Placement(over)
    names = ("layers.0.w", "layers.1.w", "norm")
    tensors = [Tensor(name, BF16, (4, 8), ()) for name in names]
    layout = Layout(4, dict(zip(names, ((split,), (split,), (whole,)), strict=True)))
    text = pictures.layout_svg("title", tensors, layout)
    assert text == pictures.layout_svg("title", tensors, layout)
    assert svg_texts(text) == [
        "title",
        "layers.#.w",
        f"2 tensors of 128 B, {split}",
        "0, 2",
        "1, 3",
        "norm",
        f"1 tensor of 64 B, {whole}",
        "0 to 3",
    ]
    rectangles = ElementTree.fromstring(text).findall(f"{_SVG}rect")[1:]  # after the background
    fills = [r.get("fill") for r in rectangles]
    assert len(set(fills)) == 2
    assert fills[0] == fills[2] != fills[1]  # colored by the first rank: 0, 1 and 0


def test_the_text_of_an_svg_is_escaped():
    name = "<script>&\x1b\u202e\ud800]]>"
    layout = Layout(1, {name: (Placement(()),)})
    text = pictures.layout_svg("<b>", [Tensor(name, BF16, (2,), ())], layout)
    assert "<script>" not in text
    assert "<b>" not in text
    assert "\x1b" not in text
    assert any("<script>&" in line for line in svg_texts(text))


def test_an_svg_of_thousands_of_ranks_is_short():
    axes = (("a", 128), ("b", 128))
    names = [f"w{n}" for n in range(300)]
    layout = Layout(
        1 << 14, {n: (Placement(axes, (("a",), ("b",)), i),) for i, n in enumerate(names)}
    )
    tensors = [Tensor(n, BF16, (128, 128), ()) for n in names]
    text = pictures.layout_svg("many", tensors[:1], layout)
    assert text.count("<rect") == 1 + 8 * 8
    text = pictures.layout_svg("many", tensors, layout, max_pictures=3)
    assert svg_texts(text)[-1] == "… and 297 placements more"


@given(models(num_layouts=1))
def test_an_svg_of_any_layout_is_well_formed(model):
    (layout,) = model.layouts
    catalog, _ = in_memory(model, layout)
    text = pictures.layout_svg("any", catalog.tensors.values(), layout)
    ElementTree.fromstring(text)
