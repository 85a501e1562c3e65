"""What users rely on: public names, arguments, flags, files and requests, as one value.

    python tests/support/contract.py --write        after a deliberate change

``contract.json`` holds the recorded value; ``test_contract.py`` compares.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import checkpoints

import jaxshard as js
from jaxshard import mindformers
from jaxshard.cli import main
from jaxshard.cli.parsing import parser

PLACE = Path(__file__).with_name("contract.json")

RESULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "huggingface": ("full", {}),
    "huggingface in shards": ("full", {"max_shard_size": 4000}),
    "ranks": ("dp2mp2", {}),
    "ranks without redundancy": ("dp2mp2", {"remove_redundancy": True}),
    "ranks by stages": ("dp1mp2pp2", {}),
    "ranks .ckpt": ("dp1mp2", {"format": "ckpt", "crc": True}),
    "one .ckpt": ("full", {"format": "ckpt"}),
    "unified": ("full", {"format": "unified"}),
    "iteration": ("dp1mp2", {"format": "iteration"}),
    "mapped": ("dp1mp2", {"names": "llama-hf:llama-mindformers"}),
    "with checksums": ("dp1mp2", {"checksums": True}),
}


def contract() -> dict[str, Any]:
    """Everything that is promised, as JSON holds it."""
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "llama")
            checkpoints.write_llama(source, num_files=2)
            found = {
                "names": sorted(js.__all__),
                "signatures": signatures(),
                "flags": flags(),
                "exit statuses": {
                    e: getattr(js, e).exit_status for e in js.__all__ if _is_error(e)
                },
                "files": files(source, Path(folder)),
                "requests": requests(source),
                "json": json_keys(source, Path(folder)),
            }
    finally:
        logging.disable(logging.NOTSET)
    return json.loads(json.dumps(found))


def _is_error(name: str) -> bool:
    return name.endswith("Error")


def signatures() -> dict[str, list[str]]:
    """The arguments of every public function and class, each with its kind and default."""
    doors: dict[str, Any] = {name: getattr(js, name) for name in js.__all__ if not _is_error(name)}
    doors |= {f"mindformers.{n}": getattr(mindformers, n) for n in ("load", "load_rank", "saving")}
    for name in ("save", "maybe_save", "restore", "steps", "latest_step", "wait", "close"):
        doors[f"CheckpointManager.{name}"] = getattr(js.CheckpointManager, name)
    return {name: _arguments(door) for name, door in sorted(doors.items()) if callable(door)}


def _arguments(door: Callable[..., Any]) -> list[str]:
    found = []
    for parameter in inspect.signature(door).parameters.values():
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        if is_dataclass(parameter.default) or " at 0x" in default:
            default = " = …"
        stars = {"VAR_KEYWORD": "**", "VAR_POSITIONAL": "*"}.get(parameter.kind.name, "")
        only = " (keyword)" if parameter.kind is parameter.KEYWORD_ONLY else ""
        found.append(f"{stars}{parameter.name}{default}{only}")
    return found


def flags() -> dict[str, list[str]]:
    """The flags and positional arguments of every command."""
    found: dict[str, list[str]] = {}

    def walk(name: str, at: argparse.ArgumentParser) -> None:
        found[name] = []
        for action in at._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command, below in action.choices.items():
                    walk(f"{name} {command}", below)
            else:
                found[name].append("/".join(action.option_strings) or action.dest)

    walk("jaxshard", parser())
    return found


def files(source: Path, folder: Path) -> dict[str, dict[str, str]]:
    """The files of one result of every kind, each with a digest of its bytes."""
    found = {}
    for number, (name, (to, options)) in enumerate(RESULTS.items()):
        place = folder / f"{number}"
        js.convert(source, place, to, fsync=False, **options)
        paths = sorted(p for p in place.rglob("*") if p.is_file())
        found[name] = {p.relative_to(place).as_posix(): _digest(p) for p in paths}
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def requests(source: Path) -> dict[str, dict[str, int]]:
    """What the plan of every kind of result counts."""
    found = {}
    for name, (to, options) in RESULTS.items():
        found[name] = asdict(js.plan(source, to, **options).totals)
    return found


def json_keys(source: Path, folder: Path) -> dict[str, list[str]]:
    """The keys that each command prints with ``--json``."""
    commands = {
        "inspect": ["inspect", source],
        "plan": ["plan", source, "--to", "mp2"],
        "convert": ["convert", source, folder / "json", "--to", "mp2"],
        "verify": ["verify", folder / "json", "--against", source],
        "strategy show": ["strategy", "show", folder / "json" / "strategy"],
    }
    found = {}
    for name, command in commands.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = main([*map(str, command), "--json"])
        assert status == 0, (name, out.getvalue())
        found[name] = sorted(json.loads(out.getvalue()))
    return found


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    PLACE.write_text(json.dumps(contract(), indent=1, sort_keys=True) + "\n")
