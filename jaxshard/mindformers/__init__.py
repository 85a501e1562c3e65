"""MindFormers configurations: what a YAML file asks to be loaded, and loading it.

    load_checkpoint: ./output/checkpoint      which checkpoint; before pretrained_model_dir
    auto_trans_ckpt: True                     any layout is loaded onto any other anyway
    parallel_config: {data_parallel: 2 …}     the strategy to load it for
    resume_training: False                    weights only

What the files are decides. Keys that tell of them (``remove_redundancy``,
``load_ckpt_format``, ``auto_trans_ckpt``, ``use_parallel``) may be absent or wrong; where
they contradict the files, a note says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion.open import PathLike, open_checkpoint
from ..conversion.select import refuse_half, takes_whole
from ..conversion.targets import SAME
from ..core.catalog import Catalog, File
from ..core.decoders import MAX_YAML_BYTES, parse_yaml
from ..core.notes import log_notes, with_notes_logged
from ..core.strategy import Strategy
from ..errors import (
    CoverageError,
    FormatError,
    LayoutError,
    NotFoundError,
    StorageError,
    did_you_mean,
    format_list,
)
from ..formats import model_shapes, rank_names
from ..mapping import find_mapping
from ..storage.local import LocalFolder
from ..storage.text_files import read_text
from .config_keys import (
    SECTIONS,
    TOP,
    Config,
    data_keys,
    nearest_key,
    notes_of,
    prefix_of,
    resuming_of,
    saving_of,
    section,
    unshared,
)
from .configured_checkpoint import (
    hf_model_of,
    keeps_slicing,
    maybe_part,
    other_slicing,
    own_file,
    refuse_missing_layers,
    refuse_part,
    with_layers,
)

if TYPE_CHECKING:
    import jax
    from numpy.typing import NDArray

_SIZES = {
    "data_parallel": "dp",
    "model_parallel": "mp",
    "pipeline_stage": "pp",
    "context_parallel": "cp",
    "expert_parallel": "ep",
}
_STATES = (r"^adam_m\.", r"^adam_v\.", r"^moment[12]\.")
_GRADIENTS = r"^accu_grads\."
_CHECKPOINT = ("load_checkpoint", "pretrained_model_dir")
_SOURCE_STRATEGY = ("src_strategy_path_or_dir", "src_strategy")
_NUM_LAYERS = ("num_layers", "num_hidden_layers", "n_layer", "n_layers")
_TRAINING = ("train", "finetune", "train_with_eval")
_ALL_REPLICAS = -1
# values of parallel_mode: data parallel, hybrid (by hand) and a job of one device
_UNCUT = ("0", "data_parallel", "3", "hybrid_parallel", "stand_alone")
_KINDS = ("ckpt", "safetensors")


@dataclass(frozen=True)
class Loading:
    """What a configuration asks for.

    Attributes:
        path: the checkpoint.
        strategy: how the job that loads it is parallel.
        src_strategy: the strategy files it was written with, if they are named.
        suffix: which of several files a rank, if one is named.
        with_states: optimizer states and the job's numbers too: training goes on.
        how: further arguments of ``jaxshard.load``: ``balanced``, ``workers``.
        said: what the configuration says of the files, for comparing.
        notes: what a person should know: what was ignored, what contradicts what.
        resumes: the newest step that is good counts, and not just the newest.
        prefix: whose steps count then, where several jobs share a folder.
    """

    path: Path
    strategy: Strategy
    src_strategy: Path | None = None
    suffix: str | None = None
    with_states: bool = False
    how: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    resumes: bool = False
    prefix: str = ""

    def exclude(self, catalog: Catalog) -> tuple[str, ...]:
        """Expressions for the tensors of ``catalog`` that are not to be loaded."""
        if self.with_states:
            return (_GRADIENTS,)
        return (_GRADIENTS, *_STATES, *(f"^{re.escape(n)}$" for n in sorted(catalog.scalars)))

    def target(self, catalog: Catalog) -> Strategy | str:
        """How the job's ranks hold ``catalog``: as its own do, where nothing is transformed."""
        return SAME if keeps_slicing(self.switch, self.strategy, catalog) else self.strategy

    def own_file(self, rank: int) -> Path | None:
        """The file of ``rank``, where it has its own part and no strategy says of what."""
        ranks = range(self.strategy.num_ranks)
        if self.switch is not False or self.src_strategy is not None or rank not in ranks:
            return None
        try:
            return own_file(self.path, rank, len(ranks), self.suffix)
        except CoverageError:
            kind = self.said.get("load_ckpt_format")
            if kind not in _KINDS:
                raise
            return own_file(self.path, rank, len(ranks), f"{self.suffix or ''}.{kind}")

    @property
    def switch(self) -> bool | None:
        """``auto_trans_ckpt``; None where it is absent."""
        switch = self.said.get("auto_trans_ckpt")
        return None if switch is None else bool(switch)

    def open(self) -> Catalog:
        """The checkpoint, with a note for every key that contradicts its files.

        Raises:
            JaxshardError: as ``open_checkpoint``.
        """
        catalog = self._catalog()
        catalog, found = with_layers(catalog, self.said.get("num_layers"))
        found += [
            *_contradictions(self, catalog),
            *other_slicing(self.switch, self.strategy, catalog),
        ]
        if gradients := [name for name in catalog.tensors if re.match(_GRADIENTS, name)]:
            found.append(
                f"{len(gradients)} accumulated gradients are not loaded: {format_list(gradients)}."
            )
        if part := maybe_part(self.strategy, catalog):
            found.append(f"{part}: it may be a part of the model.")
        notes = (*self.notes, *found, *catalog.notes)
        return with_notes_logged(replace(catalog, notes=notes, logged=frozenset(self.notes)))

    def _catalog(self) -> Catalog:
        """The checkpoint; ``load_ckpt_format`` counts only where both kinds lie together."""
        if self.resumes and (found := self._resumed()):
            return found
        try:
            return open_checkpoint(self.path, src_strategy=self.src_strategy, suffix=self.suffix)
        except CoverageError:
            kind = self.said.get("load_ckpt_format")
            if kind not in _KINDS:
                raise
            suffix = f"{self.suffix or ''}.{kind}"
            try:
                return open_checkpoint(self.path, src_strategy=self.src_strategy, suffix=suffix)
            except CoverageError:
                pass  # then it is not what told them apart
            raise

    def _resumed(self) -> Catalog | None:
        """The newest good step that training goes on from, where there are steps."""
        from ..training.open_step import open_newest  # noqa: PLC0415 - only to resume

        kind = self.said.get("load_ckpt_format")
        return open_newest(
            self.path,
            strategy=self.src_strategy,
            prefix=self.prefix,
            kind=kind if kind in _KINDS else None,
        )


def from_config(config: Config | PathLike) -> Loading:
    """What a MindFormers YAML file, or the same as a mapping, asks to be loaded.

    Paths in it are taken as MindFormers takes them: from the current folder.

    Raises:
        NotFoundError: it names no checkpoint, or one that is not there.
        FormatError: the file is not YAML, or a key has a value that means nothing.
        LayoutError: ``parallel_config`` is impossible.
        StorageError: the file cannot be read, or PyYAML is missing.
    """
    told = _read(config)
    path, notes = _path(told)
    strategy, more = _strategy(told)
    suffix, with_states = _resume(told)
    if suffix is not None and path.is_file():
        suffix = None
        more.append(
            f"resume_training is {told['resume_training']}, which has no effect: {path} is one "
            "file, from which training goes on."
        )
    resumes = told.get("resume_training") is True
    src, other = _source_strategy(told)
    if told.get("only_save_strategy"):
        more.append(
            "only_save_strategy: nothing is to be loaded; jaxshard strategy make CONFIGURATION OUT "
            "writes the files."
        )
    keys = ("remove_redundancy", "load_ckpt_format", "auto_trans_ckpt")
    said = {k: told[k] for k in keys if told.get(k) is not None} | _num_layers(told)
    notes += [*more, *other, *_unsaid(told, strategy), *_of_data(told), *_idle(told)]
    notes += unshared(path, "each process reads what it finds there")
    log_notes(_called(config), notes)
    return Loading(
        path,
        strategy,
        src,
        suffix,
        with_states,
        _how(told),
        said,
        tuple(notes),
        resumes=resumes,
        prefix=prefix_of(told) if resumes else "",
    )


def load(
    config: Config | PathLike | Loading,
    *,
    devices: Sequence[jax.Device] | None = None,
    **how: Any,
) -> dict[str, jax.Array]:
    """The tensors that a configuration asks for, on the devices as it says.

    Nothing is merged to disk first, whatever strategy the checkpoint was written with.
    ``how`` is as for ``jaxshard.load``.

    Raises:
        JaxshardError: as ``from_config`` and ``jaxshard.load``.
    """
    from ..loader import load as load_arrays  # noqa: PLC0415 - wakes JAX

    asked = config if isinstance(config, Loading) else from_config(config)
    catalog = asked.open()
    how = {"exclude": asked.exclude(catalog), **asked.how, **how}
    target = _target(asked, catalog, how)
    arrays: dict[str, jax.Array] = load_arrays(catalog, target, devices=devices, **how)
    return arrays


def load_rank(
    config: Config | PathLike | Loading, rank: int = 0, **how: Any
) -> dict[str, NDArray[Any]]:
    """What one rank of the job that a configuration describes holds, as NumPy arrays.

    Raises:
        JaxshardError: as ``from_config`` and ``jaxshard.load_rank``.
    """
    from ..conversion.load_rank import load_rank as load_share  # noqa: PLC0415 - most callers want devices

    asked = config if isinstance(config, Loading) else from_config(config)
    own = asked.own_file(rank)
    catalog = asked.open() if own is None else open_checkpoint(own)
    how.setdefault("exclude", asked.exclude(catalog))
    if own is not None:
        return load_share(catalog, "full", **how)
    return load_share(catalog, _target(asked, catalog, how), rank, **how)


def saving(config: Config | PathLike) -> dict[str, Any]:
    """What ``training.CheckpointManager`` is to be given to save as a configuration says.

    That is its callback ``CheckpointMonitor``, or its section ``checkpoint``; none of them: an
    empty dict.

    Raises:
        FormatError: the file is not YAML, or a key has a value that means nothing.
        StorageError: the file cannot be read, or PyYAML is missing.
    """
    arguments, notes = saving_of(_read(config))
    log_notes(_called(config), notes)
    return arguments


def resuming(config: Config | PathLike) -> dict[str, Any]:
    """What ``training.resume_point`` is to be given to go on as a configuration says.

    >>> resuming({"trainer": {"data_skip_steps": 2}, "runner_config": {"sink_mode": True}})
    {'data_skip_steps': 2, 'sink_mode': True}

    Raises:
        FormatError: the file is not YAML, or a key has a value that means nothing.
        StorageError: the file cannot be read, or PyYAML is missing.
    """
    arguments, notes = resuming_of(_read(config))
    log_notes(_called(config), notes)
    return arguments


def job_of(config: Config | PathLike) -> tuple[Catalog, Strategy, bool]:
    """The tensors and the strategy of the job that a configuration describes.

    The tensors are those of its checkpoint; without one, those of the model in its
    ``config.json`` or, under MindFormers' names, of ``model.model_config``. Third is whether it
    trains, and so has optimizer states. That is what strategy files are made from.

    Raises:
        NotFoundError: nothing says which tensors there are.
        JaxshardError: as ``from_config`` and ``open_checkpoint``.
    """
    told = _read(config)
    strategy, notes = _strategy(told)
    notes += [*_unsaid(told, strategy), *_idle(told)]
    catalog = _described(told, os.fspath(config) if not isinstance(config, Mapping) else ".")
    catalog, more = with_layers(catalog, _num_layers(told).get("num_layers"))
    mode = str(told.get("run_mode") or "")
    is_training = mode in _TRAINING or bool(told.get("resume_training"))
    states = "adam_m and adam_v of each weight are among the tensors"
    if is_training:
        more.append(f"{states}, for the job trains (run_mode is {mode or 'absent'}).")
    return replace(catalog, notes=(*catalog.notes, *notes, *more)), strategy, is_training


def read_yaml(path: PathLike) -> Config:
    """The mapping in the YAML file at ``path``.

    Raises:
        NotFoundError: it does not exist.
        StorageError: it cannot be read, or PyYAML is missing.
        FormatError: it is not YAML, or no mapping.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        told = parse_yaml(text, str(path))
    except ImportError:
        raise StorageError(
            "PyYAML is not installed, which reads YAML files. Install jaxshard[yaml], or give the "
            "configuration as a dict."
        ) from None
    if not isinstance(told, dict):
        raise FormatError(f"{path} is no mapping of keys to values. Check the file.")
    return told


# ---------------------------------------------------------------------------- the keys


def _read(config: Config | PathLike) -> Config:
    return config if isinstance(config, Mapping) else read_yaml(config)


def _called(config: Config | PathLike) -> str:
    """What notes call a configuration: its file's path."""
    return "the configuration" if isinstance(config, Mapping) else os.fspath(config)


def _path(told: Config) -> tuple[Path, list[str]]:
    """The checkpoint that is named: ``load_checkpoint`` before ``pretrained_model_dir``."""
    new = section(told, "checkpoint")
    places = [
        ("checkpoint.load_path", new.get("load_path")),
        ("load_checkpoint", told.get("load_checkpoint")),
        ("pretrained_model_dir", told.get("pretrained_model_dir")),
    ]
    named = [(key, value) for key, value in places if value]
    if not named:
        alone = " For strategy files alone: jaxshard strategy make."
        raise NotFoundError(
            "the configuration names no checkpoint: neither load_checkpoint nor "
            "pretrained_model_dir (nor checkpoint.load_path) has a path."
            + _misspelt(told)
            + (alone if told.get("only_save_strategy") else "")
        )
    key, value = named[0]
    if not isinstance(value, str):
        raise FormatError(f"{key}: {value!r} is not a path. Name the checkpoint's folder or file.")
    if not os.path.exists(value):
        raise NotFoundError(f"{key}: {value} does not exist.")
    others = [f"{k} ({v})" for k, v in named[1:] if v != value]
    return Path(value), [f"{key} is loaded, not {other}." for other in others]


def _described(told: Config, path: str) -> Catalog:
    """The tensors of a job: of its checkpoint, or of its model."""
    if _names_checkpoint(told):
        place, _ = _path(told)
        try:
            return open_checkpoint(place, src_strategy=_source_strategy(told)[0])
        except NotFoundError:
            folder = LocalFolder(place)
            try:
                found = model_shapes.read(folder)
            finally:
                folder.close()
            if found is None:
                raise
            return found
    model, names = hf_model_of(section(told, "model"))
    root, name = os.path.split(os.path.abspath(path))
    plain = model_shapes.catalog_of(model, root, File(name, 0))
    return find_mapping(names, plain).apply(plain)


def _names_checkpoint(told: Config) -> bool:
    new = section(told, "checkpoint")
    return bool(new.get("load_path") or any(told.get(key) for key in _CHECKPOINT))


def _misspelt(told: Config) -> str:
    """A sentence on a key that may be a slip of one that names a checkpoint."""
    near = (k for k in map(str, told) if nearest_key(k, _CHECKPOINT) and k not in TOP.known)
    return "".join(did_you_mean(key, _CHECKPOINT) for key in list(near)[:1])


def _strategy(told: Config) -> tuple[Strategy, list[str]]:
    """How the job is parallel, and what of it contradicts itself."""
    config, parallel = section(told, "parallel_config"), section(told, "parallel")
    sizes = {name: _size(config, key) for key, name in _SIZES.items()}
    strategy = Strategy(
        **sizes,
        optimizer_shard=_optimizer_shard(parallel),
        vocab_emb_dp=sizes["mp"] > 1 and bool(config.get("vocab_emb_dp", True)),
    )
    use = told.get("use_parallel")
    if strategy.num_ranks == 1 or use:
        return strategy, []
    if use is None:
        return strategy, [
            f"use_parallel is absent, but parallel_config has {strategy.num_ranks} ranks: it is "
            f"taken for {strategy}."
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


def _source_strategy(told: Config) -> tuple[Path | None, list[str]]:
    """Where the strategy files of the source are, if it is said; and notes."""
    given = {key: told[key] for key in _SOURCE_STRATEGY if told.get(key)}
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


def _num_layers(told: Config) -> dict[str, int]:
    """The model's number of layers, if it is said."""
    model = section(told, "model.model_config")
    values = [model.get(key) for key in _NUM_LAYERS]
    found = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    return {"num_layers": found[0]} if found else {}


def _idle(told: Config) -> list[str]:
    """Notes on keys of the sections that loading has no use for."""
    paths = (path for path, keys in SECTIONS.items() if "load" in keys.verbs)
    return [note for path in paths for note in notes_of(path, section(told, path), "load")]


def _of_data(told: Config) -> list[str]:
    """Notes on keys about the data, which a run that goes on has seen a part of."""
    said = {key: value for key, value in data_keys(told).items() if value not in (None, False)}
    return [
        f"{key} is {value}, which is about the data: resume_point(progress, "
        "**mindformers.resuming(config)) has it."
        for key, value in said.items()
    ]


def _unsaid(told: Config, strategy: Strategy) -> list[str]:
    """Notes on what keys say of the layout and a strategy in words cannot."""
    config = section(told, "parallel_config")
    model = section(told, "model.model_config")
    notes = []
    for key, usual in (("offset", 0), ("pp_interleave_num", 1)):
        value = model.get(key)
        numbers = re.findall(r"\d+", str(value))  # of lists of lists too
        if strategy.pp > 1 and any(int(n) != usual for n in numbers):
            notes.append(
                f"{key} is {value}, but layers are given to the {strategy.pp} stages in order and "
                "evenly. For the job's own stages give its strategy files as the target, or rules "
                "with layers_per_stage."
            )
    is_sharded, parallel = strategy.optimizer_shard != 1, section(told, "parallel")
    if config.get("optimizer_shard") and not is_sharded:
        notes.append("optimizer_shard has no effect: parallel.enable_parallel_optimizer decides.")
    mode = parallel.get("parallel_mode")
    if str(mode).lower() in _UNCUT and strategy.mp * strategy.pp > 1:
        notes.append(
            f"parallel_mode is {mode}, in which MindSpore cuts no weight, but they are cut as "
            f"parallel_config says: {strategy}."
        )
    experts = config.get("expert_model_parallel")
    if experts not in (None, 1):
        notes.append(
            f"expert_model_parallel is {experts}, but experts are cut as mp says. For the job's "
            "own cut give its strategy files as the target."
        )
    return notes


def _how(told: Config) -> dict[str, Any]:
    """How the files are read, as ``checkpoint:`` or the keys before it say."""
    new = section(told, "checkpoint")
    balanced = new.get("load_balanced", told.get("balanced_load"))
    names = ("reshard_worker_num", "reshard_worker_number")
    workers = next((s[n] for s in (new, told) for n in names if s.get(n) is not None), None)
    how: dict[str, Any] = {"balanced": True} if balanced else {}
    if isinstance(workers, int) and workers > 1:
        how["workers"] = workers
    return how


def _resume(told: Config) -> tuple[str | None, bool]:
    """Which file of each rank is named, and whether training goes on."""
    new, resume = section(told, "checkpoint"), told.get("resume_training", False)
    if not isinstance(resume, bool | str):
        raise FormatError(f"resume_training: {resume!r} is neither True, False nor a file's name.")
    without = new.get("no_load_optim")
    with_states = bool(resume) if without is None else not without
    if not isinstance(resume, str) or not resume:
        return None, with_states
    stem = re.sub(r"\.(ckpt|safetensors)$", "", os.path.basename(resume))
    return rank_names.without_rank(stem), with_states


# ---------------------------------------------------------------------------- the files


def _contradictions(asked: Loading, catalog: Catalog) -> list[str]:
    """What the configuration says of the files and they are not."""
    notes = []
    kind = {"safetensors"} if not _is_ckpt(catalog) else {"ckpt"}
    told = asked.said.get("load_ckpt_format")
    if told is not None and told not in kind:
        notes.append(f"load_ckpt_format is {told}, but the files are {kind.pop()}; they are read.")
    once = _is_stored_once(catalog)
    redundancy = asked.said.get("remove_redundancy")
    if redundancy is not None and once is not None and bool(redundancy) != once:
        are = "stored once each" if once else "stored by every replica"
        notes.append(f"remove_redundancy is {redundancy}, but shards are {are}; so they are read.")
    ranks = catalog.layout.num_ranks if catalog.layout else 1
    if asked.said.get("auto_trans_ckpt") is False and ranks != asked.strategy.num_ranks:
        notes.append(
            f"auto_trans_ckpt is False, but the checkpoint is one of {ranks} ranks and the job has "
            f"{asked.strategy.num_ranks}; it is laid out anew."
        )
    return notes


def _target(asked: Loading, catalog: Catalog, how: Mapping[str, Any]) -> Strategy | str:
    """The target of a load.

    Raises:
        CoverageError: a part of a model.
        LayoutError: rules are given, and the ranks' own parts asked for.
    """
    refuse_part(asked.switch, asked.strategy, catalog)
    target = asked.target(catalog)
    if takes_whole(catalog, how.get("include", ()), how.get("exclude", ())):
        refuse_missing_layers(catalog)
        if target == SAME:
            refuse_half(catalog)
    if target == SAME and how.get("rules") is not None:
        raise LayoutError(
            "rules= lay out by names, and auto_trans_ckpt: False keeps each rank's own part. Leave "
            "them out, or set auto_trans_ckpt: True."
        )
    return target


def _is_ckpt(catalog: Catalog) -> bool:
    return any(file.path.endswith(".ckpt") for file in catalog.files)


def _is_stored_once(catalog: Catalog) -> bool | None:
    """Whether replicas are left out; None where there would be none."""
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
