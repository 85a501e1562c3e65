"""Keys of MindFormers' configurations: used, ignored with a note, or unknown.

    parallel_config: {data_parallel: 2}     used           no note
    seed: 0                                 not of weights no note
    transform_process_num: 8                no effect      a note with the reason
    load_chekpoint: ./output                unknown        a note with the nearest key

A section is named by its path, the top level by the empty one. This module reads values of no
key that ``mindformers`` uses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from ..errors import FormatError, quote_name

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
