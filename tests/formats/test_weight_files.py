"""MindSpore's ``.ckpt`` as ranks and as whole models, to safetensors and back."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import mindspore_files as ms
import numpy as np
import pytest
from golden_files import golden
from mindspore_ranks import (
    ARRAYS,
    LAYOUT,
    QUICK,
    STEP,
    as_ckpt,
    check_equal,
    held_by,
    merged,
    write_ranks,
    write_strategy,
)

import jaxshard as js
from jaxshard.cli import main
from jaxshard.errors import FormatError

# --- ranks of .ckpt files ------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [512 << 20, 40, 12])
def test_ckpt_ranks_are_merged_wherever_their_tensors_are_cut(
    tmp_path: Path, chunk_bytes: int
) -> None:
    """A large tensor is in parts that have nothing to do with rows, here every 10 or 3 numbers."""
    write_strategy(tmp_path / "strategy")
    for rank in range(4):
        place = tmp_path / "c" / f"rank_{rank}" / f"net_rank_{rank}-1_1.ckpt"
        place.parent.mkdir(parents=True)
        place.write_bytes(as_ckpt(held_by(rank), chunk_bytes))
    catalog = js.open(tmp_path / "c")
    assert len(catalog["wo"].shards) == {512 << 20: 4, 40: 20, 12: 48}[chunk_bytes]
    check_equal(merged(tmp_path / "c", tmp_path / "o"), ARRAYS)
    assert js.verify(catalog).problems == ()


@pytest.mark.parametrize("crc", [False, True])
def test_ranks_become_ckpt_files_and_come_back(ranks: Path, tmp_path: Path, crc: bool) -> None:
    flags = ["--crc"] if crc else []
    out = tmp_path / "as_ckpt"
    assert main(["convert", str(ranks), str(out), "--to", "same", "--format", "ckpt", *flags]) == 0
    for rank in range(4):
        path = out / f"rank_{rank}" / f"checkpoint_rank_{rank}-1_10.ckpt"
        held = ms.weights(path)
        assert {n: t[2] for n, t in held.items()} == {
            n: a.tobytes() for n, a in held_by(rank).items()
        }
        assert (path.read_bytes()[-17:-10] == b"crc_num") == crc
    check_equal(merged(out, tmp_path / "o"), ARRAYS)
    back = tmp_path / "back"
    assert main(["convert", str(out), str(back), "--to", "same", "--format", "ranks"]) == 0
    assert js.verify(back, ranks).problems == ()


def test_a_damaged_checksum_stops_a_conversion_before_anything_is_made(
    ranks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "as_ckpt"
    js.convert(ranks, out, "same", format="ckpt", crc=True, **QUICK)
    path = out / "rank_2" / "checkpoint_rank_2-1_10.ckpt"
    data = bytearray(path.read_bytes())
    data[data.index(held_by(2)["wo"].tobytes())] ^= 1
    path.write_bytes(data)
    for work in (lambda: js.verify(out), lambda: js.merge(out, tmp_path / "o", **QUICK)):
        with pytest.raises(
            FormatError, match=r"rank_2/checkpoint_rank_2-1_10\.ckpt: the bytes have crc32"
        ):
            work()
    assert not (tmp_path / "o").exists()


def damaged(path: Path, data: bytes) -> None:
    """One bit of ``data`` in the file flipped."""
    content = bytearray(path.read_bytes())
    content[content.index(data)] ^= 1
    path.write_bytes(content)


def test_the_checksum_in_a_safetensors_file_is_compared_too(tmp_path: Path) -> None:
    """MindSpore's ``crc_num``: over the names and bytes of all tensors in order."""
    path = tmp_path / "model.safetensors"
    shutil.copy(golden("ckpt_formats", "crc_nobf16.safetensors"), path)
    js.convert(path, tmp_path / "o", **QUICK)
    damaged(path, ms.weights(path)["a"][2])
    for work in (lambda: js.verify(path), lambda: js.merge(path, tmp_path / "p", **QUICK)):
        with pytest.raises(
            FormatError, match=r"model\.safetensors: the tensors have crc32 [0-9]+ .expected"
        ):
            work()
    other = path.read_bytes().replace(b'"format":"ms"', b'"format":"pt"')
    assert other != path.read_bytes()
    path.write_bytes(other)  # then it is another program's number, whatever that means
    js.convert(path, tmp_path / "p", **QUICK)


def test_checksums_of_rank_files_are_compared_before_anything_is_made(
    ranks: Path, tmp_path: Path
) -> None:
    for rank in range(4):
        held, crc = held_by(rank), 0
        for name in sorted(held):
            crc = zlib.crc32(held[name].tobytes(), zlib.crc32(name.encode(), crc))
        write_ranks(ranks, lambda _, h=held: h, ranks=[rank], metadata={"crc_num": str(crc)})
    check_equal(merged(ranks, tmp_path / "o"), ARRAYS)
    damaged(ranks / "rank_2" / STEP.format(r=2), held_by(2)["wo"].tobytes())
    with pytest.raises(
        FormatError, match=r"rank_2/net_rank_2-1_10\.safetensors: the tensors have crc32"
    ):
        js.load_rank(ranks, LAYOUT, 0)


def test_what_is_said_of_a_renamed_tensor_goes_with_it(tmp_path: Path) -> None:
    data = as_ckpt({"q": np.arange(6, dtype=np.uint8)}, int4=["q"])
    (tmp_path / "model.ckpt").write_bytes(data)
    table = tmp_path / "names.toml"
    table.write_text('[[op]]\nop = "rename"\nrules = [["q", "layer.q"]]\n')
    how = {"names": str(table), **QUICK}
    js.convert(tmp_path / "model.ckpt", tmp_path / "s", format="huggingface", **how)
    (written,) = (tmp_path / "s").glob("*.safetensors")
    assert ms.check_mindspore_reads(written) == {"format": "pt", "layer.q": "Int4"}
    js.convert(tmp_path / "model.ckpt", tmp_path / "c", format="ckpt", **how)
    assert (tmp_path / "c" / "model.ckpt").read_bytes() == as_ckpt(
        {"layer.q": np.arange(6, dtype=np.uint8)}, int4=["layer.q"]
    )


def test_text_whose_name_is_the_formats_own_is_left_out_aloud(tmp_path: Path) -> None:
    strings = {"format": "mine", "crc_num": "7", "note": "kept"}
    (tmp_path / "model.ckpt").write_bytes(as_ckpt(ARRAYS, strings=strings))
    notes = js.open(tmp_path / "model.ckpt").notes
    assert [n for n in notes if "is dropped: the format reserves that name" in n] == [*notes]
    assert len(notes) == 2
    js.convert(tmp_path / "model.ckpt", tmp_path / "s", **QUICK)
    (written,) = (tmp_path / "s").glob("*.safetensors")
    assert ms.check_mindspore_reads(written) == {"format": "pt", "note": "kept"}


def test_text_and_int4_go_from_ckpt_to_safetensors_and_back(tmp_path: Path) -> None:
    data = as_ckpt({"q": np.arange(6, dtype=np.uint8)}, strings={"note": "hello"}, int4=["q"])
    (tmp_path / "model.ckpt").write_bytes(data)
    js.convert(tmp_path / "model.ckpt", tmp_path / "s", format="huggingface", **QUICK)
    (written,) = (tmp_path / "s").glob("*.safetensors")
    metadata = ms.check_mindspore_reads(written)
    assert (metadata["note"], metadata["q"]) == ("hello", "Int4")
    js.convert(tmp_path / "s", tmp_path / "c", format="ckpt", **QUICK)
    assert (tmp_path / "c" / "model.ckpt").read_bytes() == data


@pytest.mark.parametrize(("name", "theirs"), [("all_dtypes", "c2s"), ("crc", "c2s_crc")])
def test_a_file_becomes_the_safetensors_that_mindspore_makes_of_it(
    name: str, theirs: str, tmp_path: Path
) -> None:
    js.convert(golden("ckpt_formats", f"{name}.ckpt"), tmp_path / "o", **QUICK)
    wanted = ms.weights(golden("ckpt_formats", theirs, f"{name}.safetensors"))
    assert ms.folder_weights(tmp_path / "o") == wanted


def test_a_folder_of_ranks_becomes_the_safetensors_that_mindspore_makes_of_it(
    tmp_path: Path,
) -> None:
    source, strategy = golden("dp1mp2pp2", "src_ckpt"), golden("dp1mp2pp2", "strategy")
    how = {"src_strategy": strategy, "format": "ranks", **QUICK}
    js.convert(source, tmp_path / "o", "same", **how)
    wanted = ms.rank_weights_of(golden("ckpt_formats", "c2s_dir"))
    assert len(wanted) == 4
    assert ms.rank_weights_of(tmp_path / "o") == wanted


def test_ranks_without_a_strategy_are_converted_file_by_file(tmp_path: Path) -> None:
    """What kind of file it is in needs no strategy; and the files may be wherever they are."""
    wanted = ms.rank_weights_of(golden("ckpt_formats", "c2s_dir"))
    for path in sorted(golden("dp1mp2pp2", "src_ckpt").glob("rank_*/*.ckpt")):
        out = tmp_path / path.parent.name / f"{path.stem}.safetensors"
        assert main(["convert", str(path), str(out), "--quiet"]) == 0
    assert ms.rank_weights_of(tmp_path) == wanted


@pytest.mark.parametrize("name", ["all_dtypes", "crc", "chunked", "chunked_async"])
def test_a_ckpt_becomes_the_safetensors_of_the_same_tensors(name: str, tmp_path: Path) -> None:
    source = golden("ckpt_formats", f"{name}.ckpt")
    js.convert(source, tmp_path / "o", **QUICK)
    assert ms.folder_weights(tmp_path / "o") == ms.weights(source)
    js.convert(tmp_path / "o", tmp_path / "back", format="ckpt", **QUICK)
    assert ms.folder_weights(tmp_path / "back") == ms.weights(source)


def test_names_that_two_complete_ckpt_files_share_are_refused(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(as_ckpt(ARRAYS))
    with pytest.raises(FormatError, match=r"wq is in both a.ckpt and b.ckpt"):
        js.open(tmp_path)
    check_equal(merged(tmp_path / "a.ckpt", tmp_path / "o"), ARRAYS)


def test_an_encrypted_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    shutil.copy(golden("ckpt_formats", "enc_AES-GCM.ckpt"), folder)
    with pytest.raises(
        FormatError, match=r"is encrypted \(AES-GCM\)\. Decrypt it first: jaxshard decrypt"
    ):
        js.open(folder)


def test_names_may_change_on_the_way(ranks: Path, tmp_path: Path) -> None:
    """MindSpore's ``name_map``; for rank folders too, which keep their layout."""
    table = tmp_path / "names.toml"
    table.write_text('[[op]]\nop = "rename"\nrules = [["f32", "renamed.f32"]]\n')
    source = golden("ckpt_formats", "all_dtypes.ckpt")
    js.convert(source, tmp_path / "o", names=str(table), **QUICK)
    theirs = ms.weights(golden("ckpt_formats", "c2s_map", "all_dtypes.safetensors"))
    assert ms.folder_weights(tmp_path / "o") == theirs
    table.write_text('[[op]]\nop = "rename"\nrules = [["w{x}", "layer.{x}.weight"]]\n')
    js.convert(ranks, tmp_path / "r", "same", names=str(table), format="ckpt", **QUICK)
    wanted = {"layer.q.weight": "wq", "layer.o.weight": "wo", "norm": "norm"}
    for rank, held in ms.rank_weights_of(tmp_path / "r").items():
        assert {n: t[2] for n, t in held.items()} == {
            new: held_by(rank)[old].tobytes() for new, old in wanted.items()
        }
    whole = merged(tmp_path / "r", tmp_path / "whole")
    check_equal(whole, {new: ARRAYS[old] for new, old in wanted.items()})
