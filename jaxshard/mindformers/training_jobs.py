"""MindFormers configurations for saving and resuming.

    callbacks: [{type: CheckpointMonitor, …}]     Checkpoint 1.0, unless use_legacy_format is False
    checkpoint: {save_path: ./output, …}          Checkpoint 2.0
    runner_config: {sink_mode: True, sink_size: 2}
    trainer: {data_skip_steps: 2}

Functions take a configuration as a mapping, and return arguments and notes. This module knows
no checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError, format_list, quote_name
from .keys import Config, Verb, either, nearest_key, notes_of, section

_CALLBACK = "CheckpointMonitor"
_MONITOR = {
    "directory": "directory",
    "prefix": "prefix",
    "save_checkpoint_steps": "save_every_steps",
    "save_checkpoint_seconds": "save_every_seconds",
    "keep_checkpoint_max": "keep_max",
    "global_batch_size": "global_batch_size",
    "remove_redundancy": "remove_redundancy",
    "async_save": "async_save",
    "save_optimizer": "save_optimizer",
    "save_network_params": "save_network_only",
    "save_trainable_params": "save_trainable_only",
}
_SECTION = {
    "save_path": "directory",
    "prefix": "prefix",
    "save_interleaved_steps": "save_every_steps",
    "save_max": "keep_max",
    "save_remove_redundancy": "remove_redundancy",
    "async_save": "async_save",
}
_DEFAULTS = {"save_checkpoint_steps": 1}
_KEEP = ("keep_checkpoint_max", "save_max")
_LEGACY = ("use_legacy_format", "ckpt_use_legacy_format")
_OUTPUT = "./output"


def saving_of(told: Config) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a ``CheckpointManager`` that saves so, and notes; none if nothing is saved.

    Raises:
        FormatError: a key has a value that means nothing.
    """
    new = section(told, "checkpoint")
    monitor, notes = _monitor(told)
    notes += _idle(told, "save")
    keys, said = (_SECTION, new) if new else (_MONITOR, monitor)
    if not said:
        return {}, notes + _unsaved(told)
    found = {ours: said[theirs] for theirs, ours in keys.items() if said.get(theirs) is not None}
    if any(key in said and said[key] is None for key in _KEEP):
        found["keep_max"] = 0  # all of them stay
    if "no_save_optim" in new:
        found["save_optimizer"] = not new["no_save_optim"]
    if "async_save" in found:
        found["async_save"] = bool(found["async_save"])  # it may name the kind of worker
    directory = found.pop("directory", None)
    place, of_place = _in_iterations(directory) if new and directory else (directory, [])
    place = _folder(place or told.get("output_dir") or _OUTPUT)
    steps, of_steps = _steps_per_epoch(told)
    is_legacy = not new and _is_legacy(told, monitor)
    notes += [*of_place, *of_steps, *(_beside(monitor) if new else _of_files(monitor))]
    notes += unshared(place, "all processes of the manager share its directory")
    form = "ranks" if is_legacy else "iteration"
    return {"directory": str(place), **found, **steps, "format": form}, notes


def prefix_of(told: Config) -> str:
    """The prefix of the files that a job saves; empty where it is not said.

    Raises:
        FormatError: a section has a value that means nothing.
    """
    said = section(told, "checkpoint").get("prefix") or _monitor(told)[0].get("prefix")
    return str(said or "")


def resuming_of(told: Config) -> tuple[dict[str, Any], list[str]]:
    """The arguments of ``resume_point`` by which a run goes on so, and notes.

    Raises:
        FormatError: a key has a value that means nothing.
    """
    monitor, _ = _monitor(told)
    found = {
        **data_keys(told),
        "sink_mode": either(told, "runner_config", "sink_mode"),
        "global_batch_size": monitor.get("global_batch_size"),
    }
    given = {key: value for key, value in found.items() if value is not None}
    return given, _idle(told, "resume")


def data_keys(told: Config) -> dict[str, Any]:
    """What is said of data that were seen: ``ignore_data_skip`` and ``data_skip_steps``, or None.

    Raises:
        FormatError: not a truth value, or not a number of steps.
    """
    ignore = either(told, "trainer", "ignore_data_skip")
    steps = either(told, "trainer", "data_skip_steps")
    if not isinstance(ignore, bool | None):
        raise FormatError(f"ignore_data_skip: {ignore!r} is neither True nor False.")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise FormatError(f"data_skip_steps: {steps!r} is not a number of steps.")
    return {"ignore_data_skip": ignore, "data_skip_steps": steps}


def unshared(place: str | os.PathLike[str], instead: str) -> list[str]:
    """A note, with what is done instead, where ``SHARED_PATHS`` does not have ``place``.

    What lies below one of these paths of the environment is seen by all hosts.
    """
    shared = [path for path in os.environ.get("SHARED_PATHS", "").split(",") if path]
    real = os.path.realpath(place)
    if not shared or any(_is_below(real, os.path.realpath(path)) for path in shared):
        return []
    return [
        f"SHARED_PATHS is {','.join(shared)}, which does not have {place}, but has no effect: "
        f"{instead}."
    ]


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _monitor(told: Config) -> tuple[Config, list[str]]:
    """The arguments of the callback that saves, none where there is none; and notes."""
    callbacks = told.get("callbacks") or []
    if not isinstance(callbacks, list):
        raise FormatError(f"callbacks: {callbacks!r} is not a list. Check the file.")
    notes = []
    for one in callbacks:
        kind = one.get("type") if isinstance(one, Mapping) else None
        if kind == _CALLBACK:
            notes = notes_of(f"callbacks.{_CALLBACK}", one, "save")
            return {**_DEFAULTS, **one}, notes
        if isinstance(kind, str) and nearest_key(kind, (_CALLBACK,)):
            notes.append(f"callbacks: {kind} is not known. Did you mean {_CALLBACK}?")
    return {}, notes


def _unsaved(told: Config) -> list[str]:
    """A note, where an output folder is named and nothing is saved there."""
    place = told.get("output_dir")
    why = f"there is neither a callback {_CALLBACK} nor a section checkpoint"
    return [f"output_dir is {place}, but nothing is saved: {why}."] if place else []


def _idle(told: Config, verb: Verb) -> list[str]:
    """Notes on keys of the sections that ``verb`` has no use for."""
    paths = ("", "checkpoint", "trainer", "runner_config")
    return [note for path in paths for note in notes_of(path, section(told, path), verb)]


def _is_legacy(told: Config, monitor: Config) -> bool:
    """Whether rank files are saved, as in Checkpoint 1.0: the callback says it, or the top does."""
    said = [monitor.get("use_legacy_format"), *(told.get(key) for key in _LEGACY)]
    return bool(next((value for value in said if value is not None), True))


def _in_iterations(save_path: Any) -> tuple[Path, list[str]]:
    """The run's directory whose steps lie in ``save_path``, as near as there is one."""
    path = Path(str(save_path))
    if path.name == "checkpoint":
        return path.parent, []
    return path, [f"save_path is {save_path}; steps are saved in its folder checkpoint."]


def _folder(value: Any) -> Path | str:
    """``value`` as a path.

    Raises:
        FormatError: it is none.
    """
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise FormatError(
            f"{quote_name(repr(value))} is not the path of a folder to save in. Name one."
        )
    return value


def _steps_per_epoch(told: Config) -> tuple[dict[str, int], list[str]]:
    """How steps count in names: a sink is an epoch, if data are fed in sinks."""
    is_sinking = either(told, "runner_config", "sink_mode")
    size = either(told, "runner_config", "sink_size")
    if size is None and is_sinking is None:
        return {}, []
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise FormatError(f"sink_size: {size!r} is not a number of steps.")
    if is_sinking is not False and size is not None and size > 0:
        return {"steps_per_epoch": size}, []
    if is_sinking is not False and size is None:
        why = "sink_mode is True without a sink_size"
    else:
        key, value = ("sink_mode", False) if is_sinking is False else ("sink_size", size)
        why = f"{key} is {value}, so names count the steps of an epoch of the data"
    return {}, [
        f"{why}: how many those are is not known here. Give CheckpointManager steps_per_epoch=, or "
        "all steps are of epoch 1."
    ]


def _beside(monitor: Config) -> list[str]:
    """A note on what the callback says beside the section that decides."""
    keys = [k for k, v in monitor.items() if k in _MONITOR and _DEFAULTS.get(k) != v]
    if not keys:
        return []
    return [
        f"callbacks.{_CALLBACK} has no effect beside the section checkpoint, which decides: "
        f"{format_list(keys)}."
    ]


def _of_files(monitor: Config) -> list[str]:
    """Notes on what the callback says of the kind of files, and is not so here."""
    notes = []
    if monitor.get("checkpoint_format") == "ckpt":
        notes.append(
            "checkpoint_format is ckpt, but steps are saved as safetensors, which MindFormers "
            'reads with load_ckpt_format: safetensors. convert(…, format="ckpt") makes the others.'
        )
    if monitor.get("integrated_save"):
        notes.append(
            "integrated_save is True, but each rank's file is its own part, as MindFormers saves "
            'those of parallel jobs; CheckpointManager(format="huggingface") saves whole ones.'
        )
    return notes
