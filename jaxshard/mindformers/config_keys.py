"""Keys of MindFormers' configurations: used, ignored with a note, or unknown.

    parallel_config: {data_parallel: 2}     used           no note
    seed: 0                                 not of weights no note
    transform_process_num: 8                no effect      a note with the reason
    load_chekpoint: ./output                unknown        a note with the nearest key

A section is named by its path, the top level by the empty one. This module reads values of no
key that ``mindformers`` uses.
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

_CUTOFF = 0.8  # of similarity: load_chekpoint is load_checkpoint, load_ckpt_async is no other key


@dataclass(frozen=True, slots=True)
class Idle:
    """A key without effect here.

    Attributes:
        why: what happens instead.
        verb: the verb that it would be about.
        usual: values that change nothing, and so need no note.
    """

    why: str
    verb: Verb = "load"
    usual: tuple[object, ...] = (None, False, "")


@dataclass(frozen=True, slots=True)
class Section:
    """The keys of one section.

    Attributes:
        used: keys that ``mindformers`` reads.
        idle: keys without effect here, which need a note.
        other: keys that concern no weights.
        verbs: the verbs that read the section.
        is_open: further keys are expected, and only near misses are worth a note.
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
        "transform_by_rank": Idle("the share of each rank is read by itself anyway"),
        "npu_num_per_node": Idle("JAX knows which devices each host has"),
        "load_ckpt_async": Idle("load returns when the arrays are complete"),
        "remote_save_url": Idle("steps are saved to the directory only", "save"),
        "use_checkpoint_health_monitor": Idle("no health of a step is recorded", "save"),
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
                "parallel_config says how tensors are cut; jaxshard.load and load_rank take such a "
                "file as their target"
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
                "small tensors are cut among the ranks of an optimizer shard like all others; the "
                "job's strategy files, as the target, have what it left whole"
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
            "saved_network": Idle("what is saved is what the manager is given", "save"),
            "append_info": Idle("extras= of save keeps what goes along", "save", (None, [])),
            "enc_key": Idle("files are not encrypted", "save"),
            "exception_save": Idle("nothing is saved when a step fails", "save"),
            "use_checkpoint_health_monitor": Idle("no health of a step is recorded", "save"),
        },
        other=_words(
            """type enc_mode embedding_size embedding_local_norm_threshold
            health_ckpts_record_dir"""
        ),
        verbs=frozenset(("save",)),
    ),
}


def notes_of(path: str, keys: Mapping[Any, Any], verb: Verb) -> list[str]:
    """Notes on those of ``keys`` in the section at ``path`` that ``verb`` has no use for."""
    section = SECTIONS[path]
    if verb not in section.verbs:
        return []
    return [note for key, value in keys.items() if (note := _note(path, str(key), value, verb))]


def nearest_key(key: str, known: Collection[str]) -> str | None:
    """The one of ``known`` that ``key`` is a slip of, if there is one.

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
        return f"{name} is not known, and has no effect. Did you mean {near}?"
    home = next(_homes(path, key), None)
    if home is not None:
        where = f"below {home}" if home else "at the top"
        return f"{name} has no effect there. It belongs {where}."
    return None if section.is_open else f"{name} is not known, and has no effect."


def _is(value: Any, usual: object) -> bool:
    """Whether a value is the usual one: 1 is not True."""
    return type(value) is type(usual) and bool(value == usual)


def _homes(path: str, key: str) -> Iterator[str]:
    """The sections in which ``key`` has a meaning for weights."""
    for home, section in SECTIONS.items():
        if home != path and "_" in key and (key in section.used or key in section.idle):
            yield home


def section(told: Config, path: str) -> Config:
    """The section of a configuration at ``path``, empty where there is none.

    Raises:
        FormatError: it is not a mapping.
    """
    for key in path.split(".") if path else ():
        value = told.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise FormatError(
                f"{path}: {quote_name(repr(value))} is not a mapping of keys to values."
            )
        told = value
    return told


def either(told: Config, path: str, key: str) -> Any:
    """The value of ``key`` in the section at ``path``, or else at the top of a configuration."""
    value = section(told, path).get(key)
    return told.get(key) if value is None else value


# --- MindFormers configurations for saving and resuming

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
