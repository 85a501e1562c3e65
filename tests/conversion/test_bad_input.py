"""Bad input, through the command line: one line that says what to do, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Good checkpoints to spoil: one file, two files with an index, rank files."""
    base = tmp_path_factory.mktemp("good")
    checkpoints.write_llama(base / "one")
    checkpoints.write_llama(base / "two", num_files=2)
    assert checkpoints.run("slice", base / "one", base / "cut", "--to", "dp2mp2") == 0
    return base


@pytest.fixture
def good(made, tmp_path):
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in"


def refused(capsys, tmp_path: Path, status: int, message: str, *arguments: object) -> str:
    """Run it; it must fail with ``status`` and one line that has ``message``; nothing is left."""
    before = listing(tmp_path)
    capsys.readouterr()
    assert checkpoints.run(*arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("jaxshard: ")
    assert message in err
    assert err.rstrip().endswith((".", ")", "git lfs pull")), "a remedy is a sentence"
    assert len(err) < 1500
    assert listing(tmp_path) == before, "something was written"
    return err


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def write(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def spoil(change: Callable[[dict, list], None]) -> Callable[[Path], None]:
    """Changes the header of the one file; the list has its entries by the order of their bytes."""

    def at(good: Path) -> None:
        path = good / "one" / SINGLE
        header, data = header_of(path)
        entries = [v for k, v in header.items() if k != "__metadata__"]
        change(header, sorted(entries, key=lambda e: e["data_offsets"]))
        write(path, header, data)

    return at


def truncated(good: Path) -> None:
    path = good / "one" / SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def header_beyond_the_end(good: Path) -> None:
    path = good / "one" / SINGLE
    path.write_bytes((10**6).to_bytes(8, "little") + path.read_bytes()[8:])


def header_of_100_megabytes(good: Path) -> None:
    path = good / "one" / SINGLE
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)


def overlap(header: dict, entries: list) -> None:
    a, b = entries[1]["data_offsets"]
    entries[1]["data_offsets"] = [a - 2, b - 2]


def hole(header: dict, entries: list) -> None:
    del header[next(k for k, v in header.items() if v is entries[1])]


def out_of_range(header: dict, entries: list) -> None:
    a, b = entries[-1]["data_offsets"]
    entries[-1]["data_offsets"] = [a + 2**40, b + 2**40]


def negative(header: dict, entries: list) -> None:
    entries[0]["data_offsets"] = [-2, entries[0]["data_offsets"][1]]


def other_size(header: dict, entries: list) -> None:
    entries[0]["shape"] = [7]


def strange_dtype(header: dict, entries: list) -> None:
    entries[0]["dtype"] = "Q7"


def duplicate_keys(good: Path) -> None:
    path = good / "one" / SINGLE
    header, data = header_of(path)
    name = next(k for k in header if k != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}"
    write(path, text.encode(), data)


def deep_json(good: Path) -> None:
    write(good / "one" / SINGLE, b'{"a":' + b"[" * 200_000, b"")


def not_json(good: Path) -> None:
    write(good / "one" / SINGLE, b"these are weights, honestly", b"")


def empty_file(good: Path) -> None:
    (good / "one" / SINGLE).write_bytes(b"")


def lfs_pointer(good: Path) -> None:
    (good / "one" / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


DAMAGED = {
    "truncated": (truncated, "bytes"),
    "header beyond the end": (header_beyond_the_end, "is truncated"),
    "header of 100 MB": (header_of_100_megabytes, "100000000"),
    "overlap": (spoil(overlap), "inside"),
    "hole": (spoil(hole), "after"),
    "out of range": (spoil(out_of_range), "after"),
    "negative": (spoil(negative), "bytes -2 to"),
    "other size": (spoil(other_size), "takes 14"),
    "strange dtype": (spoil(strange_dtype), "'Q7'"),
    "duplicate keys": (duplicate_keys, "duplicate key"),
    "deep json": (deep_json, "header of model.safetensors"),
    "not json": (not_json, "not JSON"),
    "empty": (empty_file, "0 bytes"),
    "lfs pointer": (lfs_pointer, "git lfs pull"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("command", ["inspect", "plan", "slice", "verify"])
def test_a_damaged_file_is_refused(good, capsys, tmp_path, case, command):
    damage, message = DAMAGED[case]
    damage(good)
    err = refused(capsys, tmp_path, 3, message, *command_of(command, good / "one", tmp_path))
    assert "etch" in err
    assert SINGLE in err


def command_of(command: str, source: Path, tmp_path: Path) -> list[object]:
    return {
        "inspect": ["inspect", source],
        "plan": ["plan", source, "--to", "mp2"],
        "slice": ["slice", source, tmp_path / "out", "--to", "mp2"],
        "verify": ["verify", source],
    }[command]


# --- folders that do not fit together --------------------------------------------------------


def index_of(good: Path) -> dict:
    return json.loads((good / "two" / INDEX).read_text())


def repoint(target: str) -> Callable[[Path], None]:
    def at(good: Path) -> None:
        index = index_of(good)
        index["weight_map"]["model.norm.weight"] = target
        (good / "two" / INDEX).write_text(json.dumps(index))

    return at


def index_is_a_list(good: Path) -> None:
    (good / "two" / INDEX).write_text("[]")


def file_gone(good: Path) -> None:
    (good / "two" / "model-00002-of-00002.safetensors").unlink()


def no_index_and_a_file_gone(good: Path) -> None:
    file_gone(good)
    (good / "two" / INDEX).unlink()


def in_two_files(good: Path) -> None:
    (good / "two" / INDEX).unlink()
    first, second = (good / "two" / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (header, data), (others, _) = header_of(second), header_of(first)
    name = next(k for k in header if k != "__metadata__")
    header[next(k for k in others if k != "__metadata__")] = header.pop(name)
    write(second, header, data)


FOLDERS = {
    "names a missing file": (repoint("absent.safetensors"), 3, "Fetch the missing files"),
    "names a file outside": (repoint("../one/model.safetensors"), 3, "a source you trust"),
    "names an absolute path": (repoint("/etc/passwd"), 3, "a source you trust"),
    "names a file that lacks it": (
        repoint("model-00001-of-00002.safetensors"),
        3,
        "model.norm.weight",
    ),
    "is a list": (index_is_a_list, 3, "expected an object"),
    "a file is gone": (file_gone, 3, "model-00002-of-00002.safetensors"),
    "no index, and a file is gone": (no_index_and_a_file_gone, 3, "Fetch the other 1"),
    "a tensor in two files": (in_two_files, 3, "Remove the stale file"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_does_not_fit_together_is_refused(good, capsys, tmp_path, case):
    damage, status, message = FOLDERS[case]
    damage(good)
    command = ("slice", good / "two", tmp_path / "out", "--to", "mp2")
    refused(capsys, tmp_path, status, message, *command)


def test_a_link_to_a_file_elsewhere_is_fine(good, capsys, tmp_path):
    path = good / "two" / "model-00002-of-00002.safetensors"
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    assert checkpoints.run("merge", good / "two", tmp_path / "out") == 0
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(good / "one")


def remove_rank(*ranks: int) -> Callable[[Path], None]:
    def at(good: Path) -> None:
        for rank in ranks:
            shutil.rmtree(good / "cut" / f"rank_{rank}")

    return at


def other_bytes(good: Path) -> None:
    path = good / "cut" / "rank_2" / "checkpoint_rank_2-1_1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_missing_rank_whose_replica_is_there_is_only_noted(good, capsys, tmp_path):
    remove_rank(2)(good)
    assert checkpoints.run("merge", good / "cut", tmp_path / "out") == 0
    assert "no files of rank 2" in capsys.readouterr().out
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(good / "one")


def test_a_missing_rank_without_a_replica_is_refused(good, capsys, tmp_path):
    remove_rank(1, 3)(good)
    command = ("merge", good / "cut", tmp_path / "out")
    for how in (command, ("plan", good / "cut", "--to", "full")):
        err = refused(capsys, tmp_path, 3, "of which the source holds", *how)
        assert "15 more tensors are incomplete: " in err
        assert err.endswith(" Fetch rank_1 or rank_3.\n")
    assert checkpoints.run("verify", good / "cut") == 3
    assert capsys.readouterr().out.count(" Fetch rank_1 or rank_3.\n") == 16


def test_replicas_that_differ_are_found(good, capsys, tmp_path):
    other_bytes(good)
    assert checkpoints.run("verify", good / "cut") == 3
    out = capsys.readouterr().out
    assert "differs between rank_0/checkpoint_rank_0-1_1.safetensors and rank_2" in out
    assert "1 problem" in out


def test_rank_files_without_their_strategy_are_refused(good, capsys, tmp_path):
    shutil.rmtree(good / "cut" / "strategy")
    command = ("merge", good / "cut", tmp_path / "out")
    refused(capsys, tmp_path, 2, "--src-strategy", *command)


def test_rank_files_with_the_strategy_of_another_model_are_refused(good, capsys, tmp_path):
    """Else every shard would be taken for a whole tensor."""
    names = {"other.weight": np.zeros((8, 8), np.float32)}
    rules = tmp_path / "rules.toml"
    rules.write_text('[specs]\n"other.*" = "mp,-"\n')
    checkpoints.write_folder(good / "other", names)
    how = ("--to", "dp2mp2", "--rules", rules)
    assert checkpoints.run("slice", good / "other", good / "othercut", *how) == 0
    strategy = ("--src-strategy", good / "othercut" / "strategy")
    command = ("merge", good / "cut", tmp_path / "out")
    refused(capsys, tmp_path, 3, "strategy", *command, *strategy)


def test_rank_files_with_the_strategy_of_another_job_are_refused(good, capsys, tmp_path):
    for to in ("mp2", "dp2", "mp2pp2", "mp8"):
        assert checkpoints.run("slice", good / "one", good / to, "--to", to) == 0
    command = ("merge", good / "cut", tmp_path / "out", "--src-strategy")
    for to in ("mp2", "dp2"):
        refused(capsys, tmp_path, 3, "strategy", *command, good / to / "strategy")


# --- requests that cannot be -------------------------------------------------------------------


def rule_file(text: str) -> Callable[[Path], list[object]]:
    def make(tmp_path: Path) -> list[object]:
        path = tmp_path / "rules.toml"
        path.write_text(text)
        return ["--rules", path]

    return make


def flags(*given: object) -> Callable[[Path], list[object]]:
    return lambda tmp_path: list(given)


REQUESTS: dict[str, tuple[Callable[[Path], list[object]], int, str]] = {
    "no strategy": (flags("--to", "fast"), 2, "neither full, same, nor an existing"),
    "axis of size 0": (flags("--to", "dp0"), 2, "1 or more"),
    "absurdly many ranks": (flags("--to", "dp99999mp99999"), 2, "ranks"),
    "absurdly many digits": (flags("--to", "dp" + "9" * 5000), 2, "strategy"),
    "a dim that does not divide": (flags("--to", "mp3"), 2, "does not divide"),
    "more stages than layers": (flags("--to", "pp3"), 2, "pp=2 or less"),
    "rank out of range": (flags("--to", "mp2", "--rank", 2), 2, "ranks 0 to 1"),
    "rank below 0": (flags("--to", "mp2", "--rank", -1), 2, "ranks 0 to 1"),
    "rank of a complete one": (flags("--to", "full", "--rank", 0), 2, "no ranks"),
    "include matches nothing": (flags("--to", "mp2", "--include", "nothing"), 2, "matches none"),
    "exclude matches all": (flags("--to", "mp2", "--exclude", "."), 2, "excluded"),
    "broken expression": (flags("--to", "mp2", "--include", "("), 2, "regular expression"),
    "no workers": (flags("--to", "mp2", "--workers", 0), 2, "at least 1"),
    "fewer than no workers": (flags("--to", "mp2", "--workers", -2), 2, "at least 1"),
    "no memory": (flags("--to", "mp2", "--host-bytes", "10KB"), 2, "--host-bytes 524288"),
    "memory that is no size": (flags("--to", "mp2", "--host-bytes", "much"), 2, "not a size"),
    "shards of no size": (flags("--to", "full", "--max-shard-size", 0), 2, "not a size"),
    "format that does not go": (
        flags("--to", "mp2", "--format", "huggingface"),
        2,
        "format 'huggingface'",
    ),
    "shards of a size, of ranks": (
        flags("--to", "mp2", "--max-shard-size", "1GB"),
        2,
        "(--max-shard-size) is for complete checkpoints",
    ),
    "shards of a size, of one file": (
        flags("--format", "ckpt", "--max-shard-size", "1GB"),
        2,
        "the target is one file",
    ),
    "no redundancy of a complete one": (
        flags("--remove-redundancy"),
        2,
        "(--remove-redundancy) is for files by rank",
    ),
    "a checksum where none goes": (flags("--to", "mp2", "--crc"), 2, "--format ckpt"),
    "a prefix where none goes": (
        flags("--prefix", "net_"),
        2,
        "(--prefix) net_ is for files by rank",
    ),
    "rules that are no TOML": (
        lambda p: [*rule_file("specs = [")(p), "--to", "mp2"],
        2,
        "not TOML",
    ),
    "rules that are absent": (flags("--to", "mp2", "--rules", "absent.toml"), 2, "absent.toml"),
    "rules with an unknown key": (
        lambda p: [*rule_file("[spec]")(p), "--to", "mp2"],
        2,
        "unknown key 'spec'",
    ),
    "rules with a wrong spec": (
        lambda p: [*rule_file('[specs]\n"*" = "mp,,"')(p), "--to", "mp2"],
        2,
        "rules.toml",
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_cannot_be_is_refused(good, capsys, tmp_path, case):
    make, status, message = REQUESTS[case]
    arguments = make(tmp_path)
    refused(
        capsys, tmp_path, status, message, "convert", good / "one", tmp_path / "out", *arguments
    )


def test_a_name_without_a_rule_is_refused(good, capsys, tmp_path):
    arrays = checkpoints.llama_arrays()
    arrays["model.layers.0.mystery.weight"] = np.zeros((4, 4), np.float32)
    checkpoints.write_folder(good / "odd", arrays, config={"model_type": "llama"})
    command = ("slice", good / "odd", tmp_path / "out", "--to", "mp2")
    err = refused(capsys, tmp_path, 2, "model.layers.0.mystery.weight", *command)
    assert 'rules, such as "model.layers.*.mystery.weight" = "-,-"' in err


def test_a_model_of_no_known_family_needs_rules(good, capsys, tmp_path):
    checkpoints.write_folder(good / "odd", {"w": np.zeros((4, 4), np.float32)})
    command = ("slice", good / "odd", tmp_path / "out", "--to", "mp2")
    refused(capsys, tmp_path, 2, "ules", *command)


def test_strategy_files_that_lack_tensors_are_refused(good, capsys, tmp_path):
    arrays = checkpoints.llama_arrays(layers=3)
    checkpoints.write_folder(good / "more", arrays, config={"model_type": "llama"})
    command = ("slice", good / "more", tmp_path / "out", "--to", good / "cut" / "strategy")
    refused(capsys, tmp_path, 2, "9 tensors are not in the target's strategy", *command)


def test_strategy_files_of_other_sizes_are_refused_by_name(good, capsys, tmp_path):
    arrays = checkpoints.llama_arrays()
    arrays["model.embed_tokens.weight"] = np.zeros((33, 16), np.float32)
    checkpoints.write_folder(good / "odd", arrays, config={"model_type": "llama"})
    command = ("slice", good / "odd", tmp_path / "out", "--to", good / "cut" / "strategy")
    refused(capsys, tmp_path, 2, "model.embed_tokens.weight", *command)


# --- places that cannot be --------------------------------------------------------------------


def test_nothing_there(capsys, tmp_path):
    refused(capsys, tmp_path, 2, "does not exist", "inspect", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused(capsys, tmp_path, 2, "empty", "inspect", tmp_path / "empty")


def test_only_pickles_there(capsys, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refused(capsys, tmp_path, 2, "safe_serialization", "inspect", tmp_path / "old")


def test_an_index_without_its_files(good, capsys, tmp_path):
    for path in (good / "two").glob("*.safetensors"):
        path.unlink()
    refused(capsys, tmp_path, 3, "Fetch the missing files", "inspect", good / "two")


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_the_source_is_never_the_destination(good, capsys, tmp_path, flag):
    source = good / "one"
    (tmp_path / "link").symlink_to(source)
    for destination in (source, good, f"{source}/", tmp_path / "link", source / ".." / "one"):
        command = ("slice", source, destination, "--to", "mp2", *flag)
        refused(capsys, tmp_path, 2, "nother destination", *command)
    refused(capsys, tmp_path, 2, "nother destination", "slice", source, "/", "--to", "mp2", *flag)


def test_a_folder_that_the_source_links_to_is_not_replaced(good, capsys, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    path = good / "one" / SINGLE
    path.rename(blobs / "weights")
    path.symlink_to(blobs / "weights")
    command = ("merge", good / "one", blobs, "--overwrite")
    refused(capsys, tmp_path, 2, "links to", *command)


def test_a_destination_that_exists_is_kept(good, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("thesis")
    command = ("slice", good / "one", tmp_path / "out", "--to", "mp2")
    for flag in ((), ("--overwrite",)):
        refused(capsys, tmp_path, 2, "--overwrite", *command, *flag)
    (tmp_path / "file").write_text("thesis")
    command = ("slice", good / "one", tmp_path / "file", "--to", "mp2")
    for flag in ((), ("--overwrite",)):
        refused(capsys, tmp_path, 2, "--overwrite", *command, *flag)


def test_a_destination_below_a_file_is_refused(good, capsys, tmp_path):
    (tmp_path / "file").write_text("thesis")
    command = ("slice", good / "one", tmp_path / "file" / "out", "--to", "mp2")
    refused(capsys, tmp_path, 4, "file", *command)


def test_a_name_that_no_disk_takes_is_refused(good, capsys, tmp_path):
    command = ("slice", good / "one", tmp_path / ("x" * 300), "--to", "mp2")
    refused(capsys, tmp_path, 4, "too long", *command)
    refused(capsys, tmp_path, 4, "too long", "inspect", tmp_path / ("x" * 300))


def test_missing_parents_of_the_destination_are_made(good, tmp_path):
    assert checkpoints.run("slice", good / "one", tmp_path / "a" / "b", "--to", "mp2") == 0
    assert (tmp_path / "a" / "b" / "rank_1").is_dir()


def test_a_result_inside_its_source_is_no_part_of_it(good, tmp_path):
    """``jaxshard slice . cut/`` is what one types; the source's own files stay as they are."""
    source = good / "one"
    before = checkpoints.files_of(source)
    assert checkpoints.run("slice", source, source / "cut", "--to", "mp2") == 0
    again = ("slice", source, source / "cut", "--to", "mp2", "--overwrite")
    assert checkpoints.run(*again) == 0
    assert not (source / "cut" / "cut").exists()
    after = checkpoints.files_of(source)
    assert {k: v for k, v in after.items() if not k.startswith("cut/")} == before


#: Python itself may lie where nobody may read, so a conversion imports all of it before.
AS_NOBODY = """
import os, sys
from jaxshard.cli import main
main(["slice", sys.argv[1], "/absent/absent", "--to", "mp2", "--dry-run", "--quiet"])
from jaxshard.storage import engine, readers, writers
from jaxshard.formats import huggingface, safetensors
os.setgid(65534)
os.setuid(65534)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else takes root")
@pytest.mark.parametrize(
    ("mode", "what", "status"),
    [(0o000, "one", 4), (0o000, f"one/{SINGLE}", 4), (0o555, "place", 4), (0o777, "place", 0)],
    ids=["source folder", "source file", "destination", "nothing denied"],
)
def test_permission_denied_is_told(made, mode, what, status):
    with tempfile.TemporaryDirectory() as name:  # pytest's own are for nobody else to enter
        base = Path(name)
        shutil.copytree(made / "one", base / "one")
        (base / "place").mkdir()
        for path in [base, *base.rglob("*")]:
            path.chmod(0o777)
        (base / what).chmod(mode)
        command = ["slice", base / "one", base / "place" / "out", "--to", "mp2", "--quiet"]
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, made / "one", *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        if status:
            assert done.stderr.count("\n") == 1
            assert "ermission denied" in done.stderr
            assert listing(base / "place") == []


def test_links_that_lead_nowhere_are_passed_by(good, tmp_path):
    folder = good / "one"
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone").symlink_to(folder / "absent")
    (folder / "self").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    assert checkpoints.run("slice", folder, tmp_path / "out", "--to", "mp2") == 0
    assert checkpoints.run("verify", tmp_path / "out", "--against", folder) == 0
