"""Keys of MindFormers' configurations, and the values of those for saving and resuming.

    parallel_config: {data_parallel: 2}     used                  no note
    seed: 0                                 not about weights     no note
    transform_process_num: 8                ignored               a note with the reason
    load_chekpoint: ./output                unknown               a note with the nearest key

A section is identified by its path, the top level by "". This module reads no file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from ..errors import FormatError, format_list, quote_name

Config = Mapping[str, Any]
Verb = Literal["load", "save", "resume"]

_CUTOFF = 0.8  # load_chekpoint is similar to load_checkpoint; load_ckpt_async to no other key


@dataclass(frozen=True, slots=True)
class Idle:
    """A key that is ignored.

    Attributes:
        why: what happens instead.
        verb: the verb that the key concerns.
        usual: values that would have no effect in MindFormers either, and so need no note.
    """

    why: str
    verb: Verb = "load"
    usual: tuple[object, ...] = (None, False, "")


@dataclass(frozen=True, slots=True)
class Section:
    """The keys of one section.

    Attributes:
        used: keys that ``mindformers`` reads.
        idle: keys that are ignored with a note.
        other: keys that do not concern weights.
        verbs: the verbs that read the section.
        is_open: unknown keys are expected; only misspellings get a note.
    """

    used: frozenset[str]
    idle: Mapping[str, Idle]
    other: frozenset[str]
    verbs: frozenset[Verb]
    is_open: bool = False

    @property
    def known(self) -> frozenset[str]:
        """All keys of the section."""
        return self.used | self.idle.keys() | self.other


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ALL: frozenset[Verb] = frozenset(("load", "save", "resume"))
_THREADS = "nothing is transformed on disk first; workers= sets the threads that read"

TOP = Section(
    used=_words(
        """load_checkpoint pretrained_model_dir load_ckpt_format auto_trans_ckpt src_strategy
        src_strategy_path_or_dir remove_redundancy use_parallel resume_training balanced_load
        reshard_worker_num reshard_worker_number only_save_strategy output_dir use_legacy_format
        ckpt_use_legacy_format ignore_data_skip data_skip_steps sink_mode sink_size parallel_config
        parallel checkpoint callbacks trainer runner_config model"""
    ),
    idle={
        "transform_process_num": Idle(_THREADS, usual=(None, 1, "")),
        "transform_by_rank": Idle("each rank reads only its own share anyway"),
        "npu_num_per_node": Idle("JAX knows the devices of each host"),
        "load_ckpt_async": Idle("load returns when the arrays are complete"),
        "remote_save_url": Idle("steps are saved to the directory only", "save"),
        "use_checkpoint_health_monitor": Idle("the health of a step is not recorded", "save"),
        "enable_mindio_ttp_save_ckpt": Idle("steps are saved by the manager only", "save"),
        "parallelism": Idle("the strategy is that of parallel_config", usual=(None, {})),
    },
    other=_words(
        """seed run_mode print_separate_loss use_legacy do_eval eval_step_interval
        eval_epoch_interval profile profile_communication profile_memory init_start_profile
        profile_start_step profile_stop_step profile_rank_ids profile_pipeline profile_level mstx
        layer_scale layer_decay lr_scale lr_scale_factor micro_batch_interleave_num save_file
        input_data predict_batch_size adapter_id exclude_cann_cpu train_precision_sync
        infer_precision_sync postprocess_use_numpy use_skip_data_by_global_norm context processor
        optimizer lr_schedule runner_wrapper train_dataset train_dataset_task eval_dataset
        eval_dataset_task metric eval_callbacks moe_config recompute_config swap_config
        monitor_config auto_tune filepath_prefix autotune_per_step use_graceful_exit training
        lr_scheduler"""
    ),
    verbs=_ALL,
    is_open=True,
)

SECTIONS: Mapping[str, Section] = {
    "": TOP,
    "parallel_config": Section(
        used=_words(
            """data_parallel model_parallel pipeline_stage context_parallel expert_parallel
            vocab_emb_dp expert_model_parallel optimizer_shard"""
        ),
        idle={},
        other=_words(
            """micro_batch_num seq_split_num use_seq_parallel gradient_aggregation_group
            context_parallel_algo ulysses_degree_in_cp mem_coeff recompute npu_nums_per_device
            moe_config pp_interleave_num"""
        ),
        verbs=frozenset(("load",)),
    ),
    "parallel": Section(
        used=_words(
            """enable_parallel_optimizer parallel_optimizer_config parallel_mode
            optimizer_weight_shard_size"""
        ),
        idle={
            "strategy_ckpt_load_file": Idle(
                "parallel_config decides how tensors are sharded; pass such a file to "
                "jaxshard.load "
                "or load_rank as the target"
            )
        },
        other=_words(
            """gradients_mean enable_alltoall full_batch dataset_strategy search_mode
            strategy_ckpt_save_file strategy_ckpt_config device_num global_rank gradient_fp32_sync
            loss_repeated_mean parameter_broadcast auto_parallel_search_mode grad_accumulation_step
            all_reduce_fusion_config pipeline_stages pipeline_result_broadcast pipeline_config
            communi_parallel_mode comm_fusion group_ckpt_save_file auto_pipeline
            force_fp32_communication dump_local_norm dump_local_norm_path dump_device_local_norm"""
        ),
        verbs=frozenset(("load",)),
        is_open=True,
    ),
    "parallel.parallel_optimizer_config": Section(
        used=_words("optimizer_weight_shard_size"),
        idle={
            "parallel_optimizer_threshold": Idle(
                "small tensors are sharded over the optimizer shard like all others; to keep them "
                "whole pass the job's strategy files as the target"
            )
        },
        other=_words("gradient_accumulation_shard optimizer_level"),
        verbs=frozenset(("load",)),
    ),
    "checkpoint": Section(
        used=_words(
            """load_path load_balanced no_load_optim reshard_worker_num reshard_worker_number
            save_path save_max save_interleaved_steps no_save_optim async_save prefix
            save_remove_redundancy"""
        ),
        idle={},
        other=frozenset(),
        verbs=_ALL,
    ),
    "trainer": Section(
        used=_words("ignore_data_skip data_skip_steps"),
        idle={},
        other=_words("type model_name"),
        verbs=_ALL,
        is_open=True,
    ),
    "runner_config": Section(
        used=_words("sink_mode sink_size"),
        idle={},
        other=_words(
            """epochs batch_size gradient_accumulation_steps num_classes stop_step epoch
            initial_epoch initial_step has_trained_epoches has_trained_steps image_size
            sink_per_epoch"""
        ),
        verbs=_ALL,
        is_open=True,
    ),
    "callbacks.CheckpointMonitor": Section(
        used=_words(
            """prefix directory save_checkpoint_steps save_checkpoint_seconds
            keep_checkpoint_max global_batch_size remove_redundancy async_save save_optimizer
            save_network_params save_trainable_params use_legacy_format checkpoint_format
            integrated_save"""
        ),
        idle={
            "keep_checkpoint_per_n_minutes": Idle(
                "keep_checkpoint_max decides which steps stay", "save", (None, 0)
            ),
            "config": Idle("the other keys of the callback decide", "save"),
            "saved_network": Idle("the manager saves the state that it is passed", "save"),
            "append_info": Idle("extras= of save stores additional values", "save", (None, [])),
            "enc_key": Idle("files are not encrypted", "save"),
            "exception_save": Idle("a failing step is not saved", "save"),
            "use_checkpoint_health_monitor": Idle("the health of a step is not recorded", "save"),
        },
        other=_words(
            """type enc_mode embedding_size embedding_local_norm_threshold
            health_ckpts_record_dir"""
        ),
        verbs=frozenset(("save",)),
    ),
}


def notes_of(path: str, keys: Mapping[Any, Any], verb: Verb) -> list[str]:
    """Return notes on those of ``keys`` in the section at ``path`` that ``verb`` ignores."""
    section = SECTIONS[path]
    if verb not in section.verbs:
        return []
    return [note for key, value in keys.items() if (note := _note(path, str(key), value, verb))]


def nearest_key(key: str, known: Collection[str]) -> str | None:
    """Return the one of ``known`` that ``key`` is a misspelling of, or None.

    >>> nearest_key("load_chekpoint", TOP.known), nearest_key("my_key", TOP.known)
    ('load_checkpoint', None)
    """
    close = get_close_matches(key, sorted(known), n=1, cutoff=_CUTOFF)
    return close[0] if close else None


def _note(path: str, key: str, value: Any, verb: Verb) -> str | None:
    section, name = SECTIONS[path], f"{path}.{key}".lstrip(".")
    idle = section.idle.get(key)
    if idle is not None:
        unused = idle.verb == verb and not any(_is(value, usual) for usual in idle.usual)
        return (
            f"{name} is {quote_name(repr(value))}, which has no effect: {idle.why}."
            if unused
            else None
        )
    if key in section.known:
        return None
    if near := nearest_key(key, section.known):
        return f"{name} is unknown and has no effect. Did you mean {near}?"
    home = next(_homes(path, key), None)
    if home is not None:
        where = f"below {home}" if home else "to the top level"
        return f"{name} has no effect there. Move it {where}."
    return None if section.is_open else f"{name} is unknown and has no effect."


def _is(value: Any, usual: object) -> bool:
    """Return whether a value is the usual one; 1 is not True."""
    return type(value) is type(usual) and bool(value == usual)


def _homes(path: str, key: str) -> Iterator[str]:
    """Yield the sections in which ``key`` concerns weights."""
    for home, section in SECTIONS.items():
        if home != path and "_" in key and (key in section.used or key in section.idle):
            yield home


def section(config: Config, path: str) -> Config:
    """Return the section of a configuration at ``path``, or an empty one.

    Raises:
        FormatError: it is not a mapping.
    """
    for key in path.split(".") if path else ():
        value = config.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise FormatError(
                f"{path}: {quote_name(repr(value))} is not a mapping of keys to values."
            )
        config = value
    return config


def either(config: Config, path: str, key: str) -> Any:
    """Return the value of ``key`` in the section at ``path``, or else at the top level."""
    value = section(config, path).get(key)
    return config.get(key) if value is None else value


# --- Arguments for saving and resuming

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


def saving_of(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a ``CheckpointManager``, empty if nothing is saved, and notes.

    Raises:
        FormatError: a key has an invalid value.
    """
    new = section(config, "checkpoint")
    monitor, notes = _monitor(config)
    notes += _idle(config, "save")
    keys, stated = (_SECTION, new) if new else (_MONITOR, monitor)
    if not stated:
        return {}, notes + _unsaved(config)
    found = {
        ours: stated[theirs] for theirs, ours in keys.items() if stated.get(theirs) is not None
    }
    if any(key in stated and stated[key] is None for key in _KEEP):
        found["keep_max"] = 0  # keep all steps
    if "no_save_optim" in new:
        found["save_optimizer"] = not new["no_save_optim"]
    if "async_save" in found:
        found["async_save"] = bool(found["async_save"])  # "thread" or "process" in MindFormers
    directory = found.pop("directory", None)
    place, of_place = _in_iterations(directory) if new and directory else (directory, [])
    place = _folder(place or config.get("output_dir") or _OUTPUT)
    steps, of_steps = _steps_per_epoch(config)
    is_legacy = not new and _is_legacy(config, monitor)
    notes += [*of_place, *of_steps, *(_beside(monitor) if new else _of_files(monitor))]
    notes += unshared(place, "all processes of the manager use one directory")
    form = "ranks" if is_legacy else "iteration"
    return {"directory": str(place), **found, **steps, "format": form}, notes


def prefix_of(config: Config) -> str:
    """Return the prefix of the files that a job saves, or "" if none is stated.

    Raises:
        FormatError: a section has an invalid value.
    """
    prefix = section(config, "checkpoint").get("prefix") or _monitor(config)[0].get("prefix")
    return str(prefix or "")


def resuming_of(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of ``resume_point`` that continue the run, and notes.

    Raises:
        FormatError: a key has an invalid value.
    """
    monitor, _ = _monitor(config)
    found = {
        **data_keys(config),
        "sink_mode": either(config, "runner_config", "sink_mode"),
        "global_batch_size": monitor.get("global_batch_size"),
    }
    given = {key: value for key, value in found.items() if value is not None}
    return given, _idle(config, "resume")


def data_keys(config: Config) -> dict[str, Any]:
    """Return ``ignore_data_skip`` and ``data_skip_steps``; None for a key that is absent.

    Raises:
        FormatError: not a bool, or not a number of steps.
    """
    ignore = either(config, "trainer", "ignore_data_skip")
    steps = either(config, "trainer", "data_skip_steps")
    if not isinstance(ignore, bool | None):
        raise FormatError(f"ignore_data_skip: {ignore!r} is not True or False.")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise FormatError(f"data_skip_steps: {steps!r} is not a number of steps.")
    return {"ignore_data_skip": ignore, "data_skip_steps": steps}


def unshared(place: str | os.PathLike[str], instead: str) -> list[str]:
    """Return a note if no path of ``SHARED_PATHS`` contains ``place``.

    All hosts see the files below the paths of this environment variable. ``instead`` is the
    behaviour here.
    """
    shared = [path for path in os.environ.get("SHARED_PATHS", "").split(",") if path]
    real = os.path.realpath(place)
    if not shared or any(_is_below(real, os.path.realpath(path)) for path in shared):
        return []
    return [f"SHARED_PATHS is {','.join(shared)} without {place}, which has no effect: {instead}."]


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _monitor(config: Config) -> tuple[Config, list[str]]:
    """Return the arguments of the callback that saves, empty without one, and notes."""
    callbacks = config.get("callbacks") or []
    if not isinstance(callbacks, list):
        raise FormatError(f"callbacks: {callbacks!r} is not a list. Check the file.")
    notes = []
    for one in callbacks:
        kind = one.get("type") if isinstance(one, Mapping) else None
        if kind == _CALLBACK:
            notes = notes_of(f"callbacks.{_CALLBACK}", one, "save")
            return {**_DEFAULTS, **one}, notes
        if isinstance(kind, str) and nearest_key(kind, (_CALLBACK,)):
            notes.append(f"callbacks: {kind} is unknown. Did you mean {_CALLBACK}?")
    return {}, notes


def _unsaved(config: Config) -> list[str]:
    """Return a note if an output folder is set but nothing is saved there."""
    place = config.get("output_dir")
    why = f"there is neither a callback {_CALLBACK} nor a section checkpoint"
    return [f"output_dir is {place}, but nothing is saved: {why}."] if place else []


def _idle(config: Config, verb: Verb) -> list[str]:
    """Return notes on keys that ``verb`` ignores."""
    paths = ("", "checkpoint", "trainer", "runner_config")
    return [note for path in paths for note in notes_of(path, section(config, path), verb)]


def _is_legacy(config: Config, monitor: Config) -> bool:
    """Return whether rank files are saved, as in Checkpoint 1.0, by the callback or the top "
    "level.
    """
    stated = [monitor.get("use_legacy_format"), *(config.get(key) for key in _LEGACY)]
    return bool(next((value for value in stated if value is not None), True))


def _in_iterations(save_path: Any) -> tuple[Path, list[str]]:
    """Return the run directory whose steps are in ``save_path``, or the closest one, and notes."""
    path = Path(str(save_path))
    if path.name == "checkpoint":
        return path.parent, []
    return path, [f"save_path is {save_path}; steps are saved in its folder checkpoint."]


def _folder(value: Any) -> Path | str:
    """Return ``value``, checked to be a path.

    Raises:
        FormatError: it is not a path.
    """
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise FormatError(
            f"{quote_name(repr(value))} is not the path of a folder to save in. Name one."
        )
    return value


def _steps_per_epoch(config: Config) -> tuple[dict[str, int], list[str]]:
    """Return the steps of an epoch in file names: with data sinking a sink is an epoch."""
    is_sinking = either(config, "runner_config", "sink_mode")
    size = either(config, "runner_config", "sink_size")
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
        why = f"{key} is {value}, so names count the steps of a data epoch"
    return {}, [
        f"{why}, whose number is unknown. Pass steps_per_epoch= to CheckpointManager; otherwise "
        "all "
        "steps belong to epoch 1."
    ]


def _beside(monitor: Config) -> list[str]:
    """Return a note on keys of the callback that the section ``checkpoint`` overrides."""
    keys = [k for k, v in monitor.items() if k in _MONITOR and _DEFAULTS.get(k) != v]
    if not keys:
        return []
    return [
        f"callbacks.{_CALLBACK} has no effect, because the section checkpoint overrides it: "
        f"{format_list(keys)}."
    ]


def _of_files(monitor: Config) -> list[str]:
    """Return notes on file formats of the callback that are not supported."""
    notes = []
    if monitor.get("checkpoint_format") == "ckpt":
        notes.append(
            "checkpoint_format is ckpt, but steps are saved as safetensors, which MindFormers "
            'reads with load_ckpt_format: safetensors. convert(…, format="ckpt") writes ckpt files.'
        )
    if monitor.get("integrated_save"):
        notes.append(
            "integrated_save is True, but each rank's file holds its own part, as in parallel jobs "
            'of MindFormers. CheckpointManager(format="huggingface") saves whole tensors.'
        )
    return notes
