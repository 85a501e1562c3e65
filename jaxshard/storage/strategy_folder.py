"""The strategy folder beside a result, where MindFormers looks for it.

    output/checkpoint/rank_0/…        the result, with its own strategy/ inside
    output/strategy/ckpt_strategy_rank_0.ckpt …

MindFormers takes the strategy of ``load_checkpoint: output/checkpoint`` from the folder beside
it. Only a result that is called ``checkpoint`` is one of such a job, and another job's
strategy files are never replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..formats.rank_names import rank_of_strategy_file
from .linux import exchange
from .transaction import told

_JOB, _STRATEGY = "checkpoint", "strategy"
_OURS = b"jaxshard_stage_"  # the operator in strategy files that no network made


def put_beside(
    destination: Path, side_files: Mapping[str, bytes], *, overwrite: bool, durable: bool
) -> tuple[str, ...]:
    """Put the strategy files among ``side_files`` beside ``destination``; notes on what was not.

    Raises:
        StorageError: the disk refuses.
    """
    files = {
        name: data
        for path, data in side_files.items()
        if path.startswith(f"{_STRATEGY}/")
        and rank_of_strategy_file(name := path.removeprefix(f"{_STRATEGY}/")) is not None
    }
    if not files or destination.name != _JOB:
        return ()
    place = destination.parent / _STRATEGY
    held = _held(place)
    if held == files:
        return ()
    is_ours = held is not None and bool(held) and all(_OURS in data for data in held.values())
    if os.path.lexists(place) and not (overwrite and is_ours):
        return (
            f"{place} holds other strategy files, and MindFormers looks there: set "
            f"src_strategy_path_or_dir: {destination / _STRATEGY}.",
        )
    with told(f"{place} cannot be written"):
        scratch = Path(tempfile.mkdtemp(prefix=f".{_STRATEGY}.", dir=destination.parent))
        try:
            scratch.chmod(0o755)
            for name, data in files.items():
                with open(scratch / name, "wb") as file:
                    file.write(data)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
            if held is None:
                os.rename(scratch, place)
            elif not exchange(scratch, place):
                shutil.rmtree(place)
                os.rename(scratch, place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return ()


def _held(place: Path) -> dict[str, bytes] | None:
    """The files in ``place``; None where it does not exist, no files where it has others."""
    if not os.path.lexists(place):
        return None
    if place.is_symlink() or not place.is_dir():
        return {}
    with told(f"{place} cannot be read"):
        found = list(place.iterdir())
        if not all(p.is_file() and rank_of_strategy_file(p.name) is not None for p in found):
            return {}
        return {p.name: p.read_bytes() for p in found}
