"""Checkpoint 2.0 folders: those that MindFormers wrote, ours, and damaged ones."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore_files as ms
import numpy as np
import pytest
from golden_files import golden, manifest
from mindspore_ranks import ARRAYS, LAYOUT, NUMBERS, QUICK, check_equal, merged
from safetensors.numpy import save_file

import jaxshard as js
from jaxshard.core.box import Box
from jaxshard.core.catalog import StoredShard, Tensor
from jaxshard.core.dtypes import dtype
from jaxshard.core.layout import Placement
from jaxshard.errors import FormatError, JaxshardError, LayoutError, NotFoundError
from jaxshard.formats import iteration, rank_folder
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.huggingface import TRAINING_SCALARS

STEP = "iteration_00000010"
KINDS = ("full_copies", "balanced")
Metadata = dict[str, Any]


def folder(kind: str) -> Path:
    return golden("mf_iteration_dir", kind, "checkpoint")


def read_metadata(where: Path) -> Metadata:
    return json.loads((where / "metadata.json").read_text())


def without_axis_names(metadata: Metadata) -> Metadata:
    made = copy.deepcopy(metadata)
    for one in made["state_dict_metadata"].values():
        del one["layout"]["alias_name"]  # people's own words
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [False, True])
def test_what_mindformers_saved_is_the_truth(kind: str, inside: bool, tmp_path: Path) -> None:
    where = folder(kind) / STEP if inside else folder(kind)
    catalog = js.open(where)
    assert (catalog.format, catalog.layout.num_ranks) == ("iteration", 4)
    assert js.verify(catalog).problems == ()
    js.merge(catalog, tmp_path / "o", **QUICK)
    wanted = {
        n: (t["dtype"], tuple(t["shape"]), t["sha256"])
        for n, t in manifest("mf_iteration_dir")["tensors"].items()
    }
    assert ms.hashed(ms.folder_weights(tmp_path / "o")) == wanted
    assert (tmp_path / "o" / "common.json").exists()


def test_what_we_write_says_what_mindformers_said(tmp_path: Path) -> None:
    how = {"format": "iteration", "prefix": "llama", **QUICK}
    js.convert(folder("full_copies"), tmp_path / "o", "same", **how)
    theirs = folder("full_copies")
    assert (tmp_path / "o" / "latest_checkpointed_iteration.txt").read_text() == "10"
    ours = read_metadata(tmp_path / "o" / STEP)
    assert without_axis_names(ours) == without_axis_names(read_metadata(theirs / STEP))
    for path in (theirs / STEP).glob("*.safetensors"):
        assert ms.weights(tmp_path / "o" / STEP / path.name) == ms.weights(path)
    for name in ("common.json", "metadata.json"):
        kinds = [json.loads((w / STEP / name).read_text()) for w in (theirs, tmp_path / "o")]
        assert kinds[0].keys() == kinds[1].keys()
    assert json.loads((tmp_path / "o" / STEP / "common.json").read_text())["step_num"] == 10


def test_stored_once_it_is_balanced_and_whole(tmp_path: Path) -> None:
    source = folder("full_copies")
    how = {"format": "iteration", "remove_redundancy": True, **QUICK}
    js.convert(source, tmp_path / "o", "same", **how)
    data = read_metadata(tmp_path / "o" / STEP)["storage_data"]
    assert data.keys() == read_metadata(folder("balanced") / STEP)["storage_data"].keys()
    assert {len(entries) for entries in data.values()} == {1}
    assert js.verify(tmp_path / "o", source).problems == ()


@pytest.mark.parametrize("once", [False, True])
def test_ranks_become_a_checkpoint_2_folder_and_come_back(
    training: Path, once: bool, tmp_path: Path
) -> None:
    js.convert(
        training, tmp_path / "o", "same", format="iteration", remove_redundancy=once, **QUICK
    )
    names = sorted(p.name for p in (tmp_path / "o" / STEP).iterdir())
    assert names == sorted(
        [f"checkpoint-{k}-{r:07d}-0000004.safetensors" for k in ("model", "opt") for r in range(4)]
        + ["common.json", "metadata.json"]
    )
    common = json.loads((tmp_path / "o" / STEP / "common.json").read_text())
    assert (common["global_step"], common["loss_scale"]) == (10, 1024.0)
    wanted = {**ARRAYS, **{f"adam_m.{n}": a * 2 for n, a in ARRAYS.items()}, **NUMBERS}
    check_equal(merged(tmp_path / "o", tmp_path / "back"), wanted)
    again = js.open(tmp_path / "o")
    assert again.scalars == NUMBERS.keys()
    assert js.verify(again).problems == ()
    for name, (placement,) in LAYOUT.placements.items():
        assert again.layout.placements[name][0].boxes(ARRAYS[name].shape) == placement.boxes(
            ARRAYS[name].shape
        )


def test_a_complete_checkpoint_has_one_file_of_weights(tmp_path: Path) -> None:
    js.merge(folder("balanced"), tmp_path / "o", format="iteration", **QUICK)
    described = read_metadata(tmp_path / "o" / STEP)["state_dict_metadata"]
    assert {one["layout"] for one in described.values()} == {None}
    assert js.verify(tmp_path / "o", folder("balanced")).problems == ()


def test_the_files_of_one_rank_may_be_written_alone(training: Path, tmp_path: Path) -> None:
    js.convert(training, tmp_path / "o", "same", format="iteration", rank=[2], **QUICK)
    names = {p.name for p in (tmp_path / "o" / STEP).glob("*.safetensors")}
    assert names == {f"checkpoint-{k}-0000002-0000004.safetensors" for k in ("model", "opt")}


def test_a_tied_embedding_of_two_stages_is_listed_once_and_stored_twice() -> None:
    tied = Tensor("e", dtype("F32"), (4, 2), (StoredShard(0, 0, Box((0, 0), (4, 2))),))
    placement = Placement((("mp", 2),), (("mp",),), 2)
    stores: Callable = lambda name, placement, shard: [(2 + shard.holders[0], "f")]  # noqa: E731
    made = json.loads(iteration.metadata_json([(tied, placement)], stores))
    assert made["state_dict_metadata"]["e"]["layout"]["rank_list"] == [2, 3]
    assert made["storage_data"]["('e', (1,))"][0]["storage_rank"] == 3


# --- which iteration ---------------------------------------------------------------------


def two_iterations(where: Path) -> Path:
    shutil.copytree(folder("balanced"), where)
    shutil.copytree(where / STEP, where / "iteration_00000020")
    return where


@pytest.mark.parametrize(
    ("tracker", "wanted"),
    [("10", 10), ("20\n", 20), (None, 20), ("30", 20), ("nonsense", 20), ("9" * 100, 20)],
)
def test_the_tracker_names_the_iteration_or_the_newest_counts(
    tracker: str | None, wanted: int, tmp_path: Path
) -> None:
    where = two_iterations(tmp_path / "c")
    place = where / "latest_checkpointed_iteration.txt"
    place.unlink()
    if tracker is not None:
        place.write_text(tracker)
    assert js.open(where).root == str(where / f"iteration_{wanted:08d}")
    assert js.open(tmp_path / "c" / STEP).root == str(where / STEP)


def test_the_output_folder_above_may_be_named(tmp_path: Path) -> None:
    two_iterations(tmp_path / "checkpoint")
    assert js.open(tmp_path).format == "iteration"


def test_an_unhealthy_checkpoint_is_said_to_be(tmp_path: Path) -> None:
    where = tmp_path / "c"
    shutil.copytree(folder("balanced") / STEP, where)
    (where / "common.json").write_text('{"ckpt_status": 1}')
    assert any("unhealthy" in note for note in js.open(where).notes)
    assert not any("unhealthy" in note for note in js.open(folder("balanced")).notes)


# --- files that are missing or wrong --------------------------------------------------------


def test_missing_states_are_left_out_and_replicas_replace_missing_shards(tmp_path: Path) -> None:
    where = tmp_path / "c"
    shutil.copytree(folder("full_copies") / STEP, where)
    for path in where.glob("*-opt-*"):
        path.unlink()
    (where / "llama-model-0000002-0000004.safetensors").unlink()
    (where / "llama-model-0000003-0000004.safetensors").rename(where / "elsewhere")
    catalog = js.open(where)
    assert any("5 optimizer states are only in missing files" in note for note in catalog.notes)
    assert len(catalog.tensors) == 5
    assert js.verify(catalog).problems[0].startswith("decoder.layers.0.mlp.linear_fc1.weight")
    (where / "elsewhere").rename(where / "llama-model-0000003-0000004.safetensors")
    (where / "llama-model-0000001-0000004.safetensors").unlink()
    left = js.open(where, suffix=None)
    assert js.verify(left).problems  # rank 1's part of linear_fc1 has no copy


def test_weights_that_are_only_in_missing_files_are_refused(tmp_path: Path) -> None:
    where = tmp_path / "c"
    shutil.copytree(folder("balanced") / STEP, where)
    (where / "llama-model-0000002-0000004.safetensors").unlink()
    with pytest.raises(
        NotFoundError, match=r"input_layernorm.weight: .* lacks llama-model-0000002"
    ):
        js.open(where)


def test_without_metadata_the_files_are_taken_as_they_are(tmp_path: Path) -> None:
    js.merge(folder("balanced"), tmp_path / "o", format="iteration", **QUICK)
    (tmp_path / "o" / STEP / "metadata.json").unlink()
    assert js.verify(tmp_path / "o", folder("balanced")).problems == ()
    where = tmp_path / "c"
    shutil.copytree(folder("full_copies") / STEP, where)
    (where / "metadata.json").unlink()
    with pytest.raises(FormatError, match="is in both"):  # shards pass for whole tensors otherwise
        js.open(where)


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
DESCRIBED, STORED = "state_dict_metadata", "storage_data"


def change(**values: object) -> Callable[[Metadata], None]:
    def apply(metadata: Metadata) -> None:
        metadata[DESCRIBED][QKV].update(values)

    return apply


def layout(**values: object) -> Callable[[Metadata], None]:
    return lambda metadata: metadata[DESCRIBED][QKV]["layout"].update(values)


def stored(entry: object, number: int = 0) -> Callable[[Metadata], None]:
    return lambda metadata: metadata[STORED].update({f"('{QKV}', ({number},))": entry})


def said(**values: object) -> list[dict[str, object]]:
    model = "llama-model-0000002-0000004.safetensors"
    return [{"file_name": model, "storage_rank": 2, "rank_group": [0, 2], **values}]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda m: m.pop(STORED), "storage_data is None .expected an object"),
        (lambda m: m.update({DESCRIBED: []}), r"state_dict_metadata is \[\] .expected an object"),
        (change(global_shape=[25, 16]), r"shape \(25, 16\) is not divisible into \(2, 1\)"),
        (
            change(global_shape=[48, 16]),
            r"BF16 \(12, 16\) \(expected BF16 \(24, 16\) per metadata.json",
        ),
        (change(global_shape="24"), "global_shape is '24' .expected a list"),
        (change(global_shape=[24, -16]), "expected integers from 0"),
        (change(axis_fragmentations=[1, 2]), r"fragmentations \(1, 2\) contradict its layout"),
        (change(axis_fragmentations=[0, 1]), "expected integers from 1"),
        (change(axis_fragmentations=[2]), "is not divisible into"),
        (change(properties={"dtype": "Float32"}), "is BF16"),
        (change(properties={"dtype": "Float7"}), "unknown dtype Float7"),
        (change(properties=3), "properties is 3 .expected an object"),
        (layout(interleaved_parallel=True), "interleaved_parallel is not supported"),
        (layout(rank_list=[0, 1, 2]), "does not fit the device_matrix"),
        (layout(rank_list=[1, 0, 3, 2]), "shard 0 is stored in .* by rank 2, which does not"),
        (layout(tensor_map=[0]), "does not fit"),
        (layout(tensor_map=[5, -1]), "expected integers from -1 to 1"),
        (layout(tensor_map=[[0, 0], -1]), "uses an axis twice"),
        (layout(tensor_map=[-1, 0]), "contradict its layout"),
        (layout(device_matrix=[2, 0]), "expected integers from 1"),
        (stored(said(file_name="a"), 2), "no shard 2 .expected 0 to 1"),
        (stored(said(), 1), "one file stores several shards"),
        (stored(said(storage_rank=3)), "shard 0 is stored in .* by rank 3, which does not"),
        (stored(said(storage_rank=None)), "has no valid storage_rank"),
        (stored(said(file_name="../../etc/passwd")), "has no file_name in this folder"),
        (stored(said(file_name="llama-opt-0000002-0000004.safetensors")), "does not contain"),
        (stored(7), "has no file_name in this folder"),
        (
            lambda m: m[STORED].update({"('unknown', (0,))": said()}),
            "which state_dict_metadata lacks",
        ),
        (lambda m: m[STORED].update({"QKV 0": said()}), "is not of the form"),
        (lambda m: m[STORED].update({"('\\x', (0,))": said()}), "has an invalid name"),
    ],
)
def test_metadata_that_contradicts_itself_or_the_files_is_refused(
    damage: Callable[[Metadata], object], why: str, tmp_path: Path
) -> None:
    where = tmp_path / "c"
    shutil.copytree(folder("balanced") / STEP, where)
    metadata = read_metadata(where)
    damage(metadata)
    (where / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(FormatError, match=why):
        js.open(where)


def test_names_are_quoted_as_python_does() -> None:
    kind, shape = dtype("F32"), (2,)
    names = ["w", "it's", 'a "b"', "both ' and \"", "back\\slash", "é", "new\nline"]
    tensors = [(Tensor(n, kind, shape, ()), None) for n in names]
    made = iteration.metadata_json(tensors, lambda *_: [(0, "f.safetensors")])
    found = iteration.parse(json.loads(made), "here")
    assert [(one.name, one.stored[0].path) for one in found] == [
        (n, "f.safetensors") for n in names
    ]


def mutated(text: str, seed: int) -> str:
    chance = random.Random(seed)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(text))
        what = chance.choice("0123456789-\"[]{}:,.eE\\nulltrue'()") * chance.choice((0, 1, 1, 9))
        text = text[:at] + what + text[at + chance.choice((0, 1, 1, 4)) :]
    return text


def pieces(folder: MemoryFolder) -> dict[str, set[tuple[str, int, Box]]]:
    """Which box of each tensor lies where."""
    catalog = iteration.read(folder)
    return {
        t.name: {(catalog.files[p.file].path, p.offset, p.box) for p in t.shards}
        for t in catalog.tensors.values()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_metadata_is_refused_or_right(kind: str) -> None:
    """What is left may be less, where an entry is lost; it is never anything else."""
    files = {p.name: p.read_bytes() for p in (folder(kind) / STEP).iterdir()}
    whole = files["metadata.json"].decode()
    right = pieces(MemoryFolder(files))
    refused = accepted = 0
    for seed in range(2000):
        files["metadata.json"] = mutated(whole, seed).encode()
        try:
            found = pieces(MemoryFolder(files))
        except JaxshardError:
            refused += 1
            continue
        accepted += 1
        for name, places in found.items():
            assert places <= right[name], seed
    assert refused > 1000
    assert accepted > 50


# --- the job's numbers ----------------------------------------------------------------------


def numbered(where: Path, **numbers: Any) -> Path:
    """A Checkpoint 2.0 folder whose ``common.json`` has ``numbers``; those as text as they are."""
    save_file({"w": np.arange(8, dtype=np.float32).reshape(4, 2)}, where / "in.safetensors")
    js.convert(where / "in.safetensors", where / "it", format="iteration", **QUICK)
    (common,) = (where / "it").rglob("common.json")
    said = {**json.loads(common.read_text()), **numbers}
    common.write_text(json.dumps(said).replace('"1e999"', "1e999").replace('"NaN"', "NaN"))
    return common


def again(where: Path) -> dict[str, Any]:
    """What ``common.json`` says after one more conversion to Checkpoint 2.0."""
    js.convert(where / "it", where / "again", format="iteration", **QUICK)
    (common,) = (where / "again").rglob("common.json")
    return json.loads(common.read_text())


def test_a_checkpoint_2_folder_without_numbers_becomes_another(tmp_path: Path) -> None:
    common = numbered(tmp_path)
    assert set(json.loads(common.read_text()).values()) == {None}
    assert again(tmp_path) == json.loads(common.read_text())
    assert (tmp_path / "again" / "iteration_00000000").is_dir()


@pytest.mark.parametrize("name", sorted(TRAINING_SCALARS))
@pytest.mark.parametrize(
    "value", ["x", [1], {}, True, "1e999", "NaN", 0.5, 2**63, -(2**70)], ids=str
)
def test_a_number_of_another_type_is_refused_with_the_file(
    name: str, value: object, tmp_path: Path
) -> None:
    common = numbered(tmp_path, **{name: value})
    if name in ("learning_rate", "loss_scale", "scale_sense") and value in (0.5, 2**63, -(2**70)):
        assert again(tmp_path)[name] == value
        return
    with pytest.raises(FormatError, match=r"common\.json") as error:
        again(tmp_path)
    assert str(common) in str(error.value) or value in ("1e999", "NaN")  # refused at opening


def test_numbers_in_their_own_types_are_carried_and_foreign_ones_left_alone(tmp_path: Path) -> None:
    own = {"global_step": 12.0, "step_num": None, "loss_scale": 2.5, "ckpt_status": 2}
    numbered(tmp_path, **own, someone=["else's"])
    said = again(tmp_path)
    assert {n: said[n] for n in own} == own
    assert said["someone"] == ["else's"]
    assert type(said["global_step"]) is int
    assert (tmp_path / "again" / "iteration_00000012").is_dir()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("global_step", np.float32([np.nan]), FormatError),
        ("step_num", np.float32([np.inf]), FormatError),
        ("loss_scale", np.float32([np.nan]), LayoutError),  # JSON has no such number
        ("global_step", np.int32([-1]), LayoutError),
    ],
)
def test_a_tensor_that_is_no_number_of_a_job_is_refused(
    name: str, value: Any, error: type, tmp_path: Path
) -> None:
    tensors = {"w": np.zeros(4, np.float32), name: value}
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(error, match=name):
        js.convert(tmp_path / "in.safetensors", tmp_path / "it", format="iteration", **QUICK)


@pytest.mark.parametrize("value", ["7c01", "", None, 3, ["a"], True])
def test_the_save_of_a_hosts_folder_is_a_text(value: object) -> None:
    said = {"jaxshard_elsewhere": 1, "save": value, "tensors": {}}
    where = MemoryFolder({rank_folder.REMOTE_TENSORS: json.dumps(said).encode()})
    if isinstance(value, str):
        assert rank_folder.save_of(where) == value
        return
    with pytest.raises(FormatError, match=rank_folder.REMOTE_TENSORS):
        rank_folder.save_of(where)
