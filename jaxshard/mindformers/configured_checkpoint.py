"""The checkpoint of a MindFormers configuration: path, strategy, slicing, completeness.

auto_trans_ckpt: False      rank 3 gets the contents of rank_3's file, if there is a file a rank
otherwise                   the slicing of parallel_config, for any files
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..conversion.open import open_checkpoint, strategy_place
from ..conversion.select import TRAINABLE, weights_of
from ..conversion.targets import lay_out_for
from ..core.box import Box
from ..core.catalog import Catalog, File, Model
from ..core.layout import Layout, Strategy
from ..errors import (
    CoverageError,
    FormatError,
    JaxshardError,
    LayoutError,
    NotFoundError,
    did_you_mean,
    format_list,
    quote_name,
)
from ..formats import model_shapes, rank_names
from ..formats.huggingface import model_of
from ..formats.registry import format_of
from ..mapping import find_mapping
from ..rules import missing_layers, rules_for
from ..rules.match import weight_name
from ..storage.local import LocalFolder
from .config_keys import SECTIONS, TOP, Config, data_keys, nearest_key, notes_of, section


def keeps_slicing(switch: bool | None, strategy: Strategy, catalog: Catalog) -> bool:
    """Return whether each rank keeps the slicing of its own file.

    MindFormers calls that the original slicing. Checkpoint 2.0 has no such switch.
    """
    return switch is False and _own(strategy, catalog) is not None


def _own(strategy: Strategy, catalog: Catalog) -> Layout | None:
    """Return the layout of the rank files, if each rank of the job has one."""
    layout = catalog.layout if format_of(catalog.format).reads_strategy else None
    return layout if layout is not None and layout.num_ranks == strategy.num_ranks else None


def other_slicing(switch: bool | None, strategy: Strategy, catalog: Catalog) -> list[str]:
    """Return a note on weights whose slicing in the files differs from ``strategy``."""
    own = _own(strategy, catalog)
    if switch or own is None:
        return []
    try:
        wanted = lay_out_for(catalog, strategy)
    except JaxshardError as error:
        note = f"parallel_config is not compared with the ranks' own parts: {error}"
        return [note] if switch is False else []
    names = [n for n in catalog.tensors if n not in catalog.scalars and weight_name(n) == n]
    differ = _cut_otherwise(catalog, names, own, wanted)
    if not differ:
        return []
    instead = (
        "each rank keeps the part in its own file, because auto_trans_ckpt is False"
        if switch is False
        else "parallel_config is used; auto_trans_ckpt: False keeps the part of each rank"
    )
    return [
        f"{len(differ)} of {len(names)} weights are sliced differently by the strategy files of "
        f"the checkpoint and by parallel_config ({strategy}): {format_list(differ, 3)}; {instead}."
    ]


def _cut_otherwise(
    catalog: Catalog, names: Iterable[str], first: Layout, second: Layout
) -> list[str]:
    """Return the ``names`` of which some rank holds different boxes in the two layouts."""
    same: dict[tuple[object, ...], bool] = {}  # by kind: a model has a few hundred
    differ = []
    for name in names:
        shape = catalog.tensors[name].shape
        key = (shape, *(layout.placements.get(name, ()) for layout in (first, second)))
        if key not in same:
            same[key] = _held(first, name, shape) == _held(second, name, shape)
        if not same[key]:
            differ.append(name)
    return differ


def _held(layout: Layout, name: str, shape: tuple[int, ...]) -> dict[int, Box]:
    """Return the box of a tensor that each rank holds."""
    placements = layout.placements.get(name, ())
    return {r: box for p in placements for r, box in zip(p.ranks, p.boxes(shape), strict=True)}


def own_file(path: Path, rank: int, num_ranks: int, suffix: str | None) -> Path | None:
    """Return the file of ``rank``, if strategy files do not exist.

    A rank that loads its own part needs no strategy, in MindFormers neither.
    """
    for place in (path, path / "checkpoint"):
        if not place.is_dir() or strategy_place(place) is not None:
            continue
        folder = LocalFolder(place)
        try:
            files = folder.files()
        finally:
            folder.close()
        if any(map(rank_names.is_rank_file, files)):
            found = rank_names.choose(files, suffix).paths
            return place / found[rank] if found.keys() == set(range(num_ranks)) else None
    return None


def maybe_part(strategy: Strategy, catalog: Catalog) -> str:
    """Describe the evidence that rank files cover only some pipeline stages, or return "".

    Strategy files of the first stage alone look like those of a job without stages. The names
    of a known family decide that when they are loaded; for other models only the configuration's
    number of ranks is known.
    """
    layout = catalog.layout if format_of(catalog.format).reads_strategy else None
    ranks, stage = strategy.num_ranks, strategy.stage_ranks
    if layout is None or layout.num_ranks >= ranks or layout.num_ranks % stage:
        return ""
    if _is_of_known_family(catalog):
        return ""
    have = layout.num_ranks // stage
    return (
        f"the strategy files have {layout.num_ranks} ranks, as many as {have} of the "
        f"{strategy.pp} pipeline stages that parallel_config ({strategy}, {ranks} ranks) has"
    )


def refuse_part(switch: bool | None, strategy: Strategy, catalog: Catalog) -> None:
    """Refuse files that may cover only some pipeline stages, unless auto_trans_ckpt is True.

    Raises:
        CoverageError: with the numbers.
    """
    text = "" if switch else maybe_part(strategy, catalog)
    if text:
        raise CoverageError(
            f"{catalog.root}: {text}. Fetch the ranks and the strategy files of all stages. If "
            "the checkpoint comes from a job with fewer, set auto_trans_ckpt: True."
        )


def _is_of_known_family(catalog: Catalog) -> bool:
    try:
        rules_for(catalog.model, [n for n in catalog.tensors if n not in catalog.scalars])
    except (LayoutError, NotFoundError):
        return False
    return True


def with_layers(catalog: Catalog, num_layers: int | None) -> tuple[Catalog, list[str]]:
    """Set the configuration's number of layers if ``catalog`` has none; also return notes."""
    own = catalog.model.num_layers
    if num_layers is None or own == num_layers:
        return catalog, []
    if own is not None:
        return catalog, [
            f"the configuration's model has {num_layers} layers, but config.json of the checkpoint "
            f"has {own}, which is used."
        ]
    return replace(catalog, model=replace(catalog.model, num_layers=num_layers)), []


def refuse_missing_layers(catalog: Catalog) -> None:
    """Refuse a checkpoint of any format that lacks layers of its model.

    Raises:
        CoverageError: with their numbers.
    """
    if any(TRAINABLE in file.path for file in catalog.files):
        return  # nothing records which layers were trained
    if catalog.layout is not None and catalog.layout.unknown:
        return  # missing stages are refused by the load that needs them
    gone = missing_layers(catalog.model, weights_of(catalog))
    if gone:
        raise CoverageError(
            f"{catalog.root} is a part of a model: {gone}. Pass the complete checkpoint, or select "
            "the existing tensors with include=."
        )


# --- Model configurations as ``config.json``, of older Llama-like models only

_WORDS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    **{x: x for x in ("hidden_size", "vocab_size", "intermediate_size", "head_dim")},
    **{x: x for x in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")},
}
_NEEDED = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
_TYPES = ("LlamaConfig",)
_MULTIPLE_OF = 256  # MindFormers' own default
_MOST = 1 << 40
_WHERE = "model.model_config"


def hf_model_of(model: Config) -> tuple[Model, str]:
    """Return the model of a configuration, and the mapping from Hugging Face's names to its own.

    Raises:
        NotFoundError: unknown model type, or a number is missing.
        FormatError: a number is invalid.

    >>> small = {"hidden_size": 32, "vocab_size": 64, "num_layers": 2, "num_heads": 4}
    >>> hf_model_of({"model_config": {"type": "LlamaConfig", **small}})[1]
    'llama-hf:llama-mindformers'
    """
    stated = section(model, "model_config")
    kind = stated.get("type")
    if kind not in _TYPES:
        what = f"the type {quote_name(repr(kind))}" if stated else "no model"
        raise NotFoundError(
            f"{_WHERE}: has {what}, which does not determine the names of tensors (supported: "
            f"{', '.join(_TYPES)}), and no checkpoint is named. Set load_checkpoint or "
            "pretrained_model_dir to a checkpoint, or to the folder of a config.json."
        )
    config: dict[str, Any] = {
        theirs: stated[ours] for ours, theirs in _WORDS.items() if ours in stated
    }
    config = {key: value for key, value in config.items() if value is not None}
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise NotFoundError(f"{_WHERE} has no {missing[0]}. Add it.")
    config["tie_word_embeddings"] = bool(stated.get("tie_word_embeddings"))
    config["model_type"] = "qwen2" if stated.get("qkv_has_bias") else "llama"
    config.setdefault("intermediate_size", _width(stated, config["hidden_size"]))
    form = "mindformers-concat" if stated.get("qkv_concat") else "mindformers"
    return model_of(config), f"llama-hf:llama-{form}"


def _width(stated: Mapping[str, Any], hidden: Any) -> int:
    """Return the inner width of a layer, which MindFormers derives from the outer one."""
    factor, step = stated.get("ffn_dim_multiplier"), stated.get("multiple_of") or _MULTIPLE_OF
    numbers = (hidden, step, 1 if factor is None else factor)
    if any(
        isinstance(n, bool) or not isinstance(n, int | float) or not 0 < n < _MOST for n in numbers
    ):
        raise FormatError(
            f"{_WHERE}: hidden_size, multiple_of and ffn_dim_multiplier are {numbers}, not numbers "
            "above 0."
        )
    # MindFormers rounds the same way
    width = 4 * hidden if factor is None else int((factor + 0.01) * 4 * hidden)
    return int(-(-int(2 * width / 3) // step) * step)


# --- Values of the keys

_SIZES = {
    "data_parallel": "dp",
    "model_parallel": "mp",
    "pipeline_stage": "pp",
    "context_parallel": "cp",
    "expert_parallel": "ep",
}
_CHECKPOINT = ("load_checkpoint", "pretrained_model_dir")
_SOURCE_STRATEGY = ("src_strategy_path_or_dir", "src_strategy")
_NUM_LAYERS = ("num_layers", "num_hidden_layers", "n_layer", "n_layers")
_ALL_REPLICAS = -1
# values of parallel_mode: data parallel, hybrid (by hand) and a job of one device
_UNCUT = ("0", "data_parallel", "3", "hybrid_parallel", "stand_alone")


def checkpoint_of(config: Config) -> tuple[Path, list[str]]:
    """Return the path of the checkpoint: ``load_checkpoint`` before ``pretrained_model_dir``."""
    new = section(config, "checkpoint")
    places = [
        ("checkpoint.load_path", new.get("load_path")),
        ("load_checkpoint", config.get("load_checkpoint")),
        ("pretrained_model_dir", config.get("pretrained_model_dir")),
    ]
    named = [(key, value) for key, value in places if value]
    if not named:
        alone = " For strategy files only: jaxshard strategy make."
        raise NotFoundError(
            "the configuration names no checkpoint: load_checkpoint, pretrained_model_dir and "
            "checkpoint.load_path have no path. Set one of them."
            + _misspelt(config)
            + (alone if config.get("only_save_strategy") else "")
        )
    key, value = named[0]
    if not isinstance(value, str):
        raise FormatError(
            f"{key}: {value!r} is not a path. Set it to the checkpoint's folder or file."
        )
    if not os.path.exists(value):
        raise NotFoundError(f"{key}: {value} does not exist.")
    others = [f"{k} ({v})" for k, v in named[1:] if v != value]
    return Path(value), [f"{key} is loaded, not {other}." for other in others]


def _names_checkpoint(config: Config) -> bool:
    new = section(config, "checkpoint")
    return bool(new.get("load_path") or any(config.get(key) for key in _CHECKPOINT))


def _misspelt(config: Config) -> str:
    """Return a hint if a key is a misspelling of one that names a checkpoint."""
    near = (k for k in map(str, config) if nearest_key(k, _CHECKPOINT) and k not in TOP.known)
    return "".join(did_you_mean(key, _CHECKPOINT) for key in list(near)[:1])


def source_strategy_of(config: Config) -> tuple[Path | None, list[str]]:
    """Return the path of the source's strategy files, if it is stated, and notes."""
    given = {key: config[key] for key in _SOURCE_STRATEGY if config.get(key)}
    for key, value in given.items():
        if not isinstance(value, str) or not os.path.exists(value):
            raise NotFoundError(f"{key}: {value} does not exist.")
    if not given:
        return None, []
    first, *others = given
    notes = [
        f"{first} is used, not {key} ({given[key]})."
        for key in others
        if given[key] != given[first]
    ]
    return Path(given[first]), notes


def resume_of(config: Config) -> tuple[str | None, bool]:
    """Return the suffix of the file of each rank, if named, and whether training continues."""
    new, resume = section(config, "checkpoint"), config.get("resume_training", False)
    if not isinstance(resume, bool | str):
        raise FormatError(f"resume_training: {resume!r} is not True, False or a file's name.")
    without = new.get("no_load_optim")
    with_states = bool(resume) if without is None else not without
    if not isinstance(resume, str) or not resume:
        return None, with_states
    stem = re.sub(r"\.(ckpt|safetensors)$", "", os.path.basename(resume))
    return rank_names.without_rank(stem), with_states


def read_options(config: Config) -> dict[str, Any]:
    """Return options for reading, from ``checkpoint:`` or the older keys."""
    new = section(config, "checkpoint")
    balanced = new.get("load_balanced", config.get("balanced_load"))
    names = ("reshard_worker_num", "reshard_worker_number")
    workers = next((s[n] for s in (new, config) for n in names if s.get(n) is not None), None)
    how: dict[str, Any] = {"balanced": True} if balanced else {}
    if isinstance(workers, int) and workers > 1:
        how["workers"] = workers
    return how


def num_layers_of(config: Config) -> dict[str, int]:
    """Return the model's number of layers as ``num_layers``, if it is stated."""
    model = section(config, "model.model_config")
    values = [model.get(key) for key in _NUM_LAYERS]
    found = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    return {"num_layers": found[0]} if found else {}


def strategy_of(config: Config) -> tuple[Strategy, list[str]]:
    """Return the strategy of the job, and notes on contradictions."""
    sizes_of, parallel = section(config, "parallel_config"), section(config, "parallel")
    sizes = {name: _size(sizes_of, key) for key, name in _SIZES.items()}
    strategy = Strategy(
        **sizes,
        optimizer_shard=_optimizer_shard(parallel),
        vocab_emb_dp=sizes["mp"] > 1 and bool(sizes_of.get("vocab_emb_dp", True)),
    )
    use = config.get("use_parallel")
    if strategy.num_ranks == 1 or use:
        return strategy, []
    if use is None:
        return strategy, [
            f"use_parallel is absent, but parallel_config has {strategy.num_ranks} ranks; "
            f"{strategy} is used."
        ]
    return Strategy(), [
        f"use_parallel is {use}, so one rank loads all; parallel_config ({strategy}) is not used."
    ]


def _size(config: Config, key: str) -> int:
    value = config.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(f"parallel_config.{key}: {value!r} is not a number of ranks.")
    return value


def _optimizer_shard(parallel: Config) -> int:
    if not parallel.get("enable_parallel_optimizer"):
        return 1
    config = section(parallel, "parallel_optimizer_config")
    key = "optimizer_weight_shard_size"
    size = config.get(key, parallel.get(key, _ALL_REPLICAS))
    if isinstance(size, bool) or not isinstance(size, int):
        raise FormatError(f"optimizer_weight_shard_size: {size!r} is not a number of ranks.")
    return size


def layout_notes(config: Config, strategy: Strategy) -> list[str]:
    """Return notes on keys about the layout that a ``Strategy`` cannot express."""
    stated, parallel = section(config, "parallel_config"), section(config, "parallel")
    model = section(config, "model.model_config")
    notes = []
    for key, usual in (("offset", 0), ("pp_interleave_num", 1)):
        value = model.get(key)
        numbers = re.findall(r"\d+", str(value))  # of lists of lists too
        if strategy.pp > 1 and any(int(n) != usual for n in numbers):
            notes.append(
                f"{key} is {value}, but layers are assigned to the {strategy.pp} stages in order "
                "and "
                "evenly. For the job's own stages pass its strategy files as the target, or rules "
                "with layers_per_stage."
            )
    if stated.get("optimizer_shard") and strategy.optimizer_shard == 1:
        notes.append("optimizer_shard has no effect: parallel.enable_parallel_optimizer decides.")
    mode = parallel.get("parallel_mode")
    if str(mode).lower() in _UNCUT and strategy.mp * strategy.pp > 1:
        notes.append(
            f"parallel_mode is {mode}, in which MindSpore shards no weight, but weights are "
            "sharded "
            f"by parallel_config: {strategy}."
        )
    experts = stated.get("expert_model_parallel")
    if experts not in (None, 1):
        notes.append(
            f"expert_model_parallel is {experts}, but experts are sharded over mp. For the job's "
            "own sharding pass its strategy files as the target."
        )
    return notes


def data_notes(config: Config) -> list[str]:
    """Return notes on keys about training data, which only ``resuming`` uses."""
    stated = {key: value for key, value in data_keys(config).items() if value not in (None, False)}
    return [
        f"{key} is {value}, which concerns training data: pass it with resume_point(progress, "
        "**mindformers.resuming(config))."
        for key, value in stated.items()
    ]


def ignored_notes(config: Config) -> list[str]:
    """Return notes on keys that loading ignores."""
    paths = (path for path, keys in SECTIONS.items() if "load" in keys.verbs)
    return [note for path in paths for note in notes_of(path, section(config, path), "load")]


# --- The tensors of the job, and what the configuration states about the files


def tensors_of(config: Config, path: str) -> Catalog:
    """Return the tensors of a job: those of its checkpoint, or of its model."""
    if _names_checkpoint(config):
        place, _ = checkpoint_of(config)
        try:
            return open_checkpoint(place, src_strategy=source_strategy_of(config)[0])
        except NotFoundError:
            folder = LocalFolder(place)
            try:
                found = model_shapes.read(folder)
            finally:
                folder.close()
            if found is None:
                raise
            return found
    model, names = hf_model_of(section(config, "model"))
    root, name = os.path.split(os.path.abspath(path))
    plain = model_shapes.catalog_of(model, root, File(name, 0))
    return find_mapping(names, plain).apply(plain)


def contradictions(stated: Config, strategy: Strategy, catalog: Catalog) -> list[str]:
    """Return notes on keys that describe the files wrongly."""
    notes = []
    kind = {"safetensors"} if not _is_ckpt(catalog) else {"ckpt"}
    named = stated.get("load_ckpt_format")
    if named is not None and named not in kind:
        notes.append(f"load_ckpt_format is {named}, but the files are {kind.pop()}; they are read.")
    once = _is_stored_once(catalog)
    redundancy = stated.get("remove_redundancy")
    if redundancy is not None and once is not None and bool(redundancy) != once:
        are = "stored once each" if once else "stored by every replica"
        notes.append(f"remove_redundancy is {redundancy}, but shards are {are}; they are read so.")
    ranks = catalog.layout.num_ranks if catalog.layout else 1
    if stated.get("auto_trans_ckpt") is False and ranks != strategy.num_ranks:
        notes.append(
            f"auto_trans_ckpt is False, but the checkpoint has {ranks} ranks and the job has "
            f"{strategy.num_ranks}; it is laid out for the job."
        )
    return notes


def _is_ckpt(catalog: Catalog) -> bool:
    return any(file.path.endswith(".ckpt") for file in catalog.files)


def _is_stored_once(catalog: Catalog) -> bool | None:
    """Return whether replicas are left out, or None without replicas."""
    if catalog.layout is None:
        return None
    for name, placements in catalog.layout.placements.items():
        tensor = catalog.tensors.get(name)
        if tensor is None or name in catalog.scalars:
            continue
        boxes = len({piece.box for piece in tensor.shards})
        holders = sum(p.num_ranks for p in placements)
        if holders > boxes:
            return len(tensor.shards) == boxes
    return None
