"""MindFormers configurations: loading, saving and resuming as a YAML file specifies.

    load_checkpoint: ./output/checkpoint      before pretrained_model_dir
    auto_trans_ckpt: True                     any layout is loaded onto any other anyway
    parallel_config: {data_parallel: 2 …}     the strategy of the job that loads it
    resume_training: False                    weights only

The files decide. Keys that describe them (``remove_redundancy``, ``load_ckpt_format``,
``auto_trans_ckpt``, ``use_parallel``) may be absent or wrong; a note reports each contradiction.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ..conversion.open import PathLike, open_checkpoint
from ..conversion.select import refuse_half, takes_whole
from ..conversion.targets import SAME
from ..core.catalog import Catalog, log_notes, with_notes_logged
from ..core.decoders import MAX_YAML_BYTES, parse_yaml
from ..core.layout import Strategy
from ..errors import CoverageError, FormatError, LayoutError, StorageError, format_list
from ..storage.fs import read_text
from .config_keys import Config, prefix_of, resuming_of, saving_of, unshared
from .configured_checkpoint import (
    checkpoint_of,
    contradictions,
    data_notes,
    ignored_notes,
    keeps_slicing,
    layout_notes,
    maybe_part,
    num_layers_of,
    other_slicing,
    own_file,
    read_options,
    refuse_missing_layers,
    refuse_part,
    resume_of,
    source_strategy_of,
    strategy_of,
    tensors_of,
    with_layers,
)

if TYPE_CHECKING:
    import jax
    from numpy.typing import NDArray

    from ..mapping import Mapping as NameMapping
    from ..rules import Policy, Rules, Unmatched
    from ..storage.resources import Counts

_STATES = (r"^adam_m\.", r"^adam_v\.", r"^moment[12]\.")
_GRADIENTS = r"^accu_grads\."
_TRAINING = ("train", "finetune", "train_with_eval")
_FILE_KINDS = ("ckpt", "safetensors")


class _CommonOptions(TypedDict, total=False):
    include: Iterable[str]
    exclude: Iterable[str]
    rules: Rules | None
    names: NameMapping | str | None
    workers: int | None
    host_bytes: int | str | None


class LoadOptions(_CommonOptions, total=False):
    """Options of ``jaxshard.load``, which documents them."""

    dtype: Any
    strict: bool
    name_of: Callable[[str], str] | None
    mmap: bool
    owned: bool
    balanced: bool
    verify: bool
    timeout_s: float
    counted: Callable[[Counts], None] | None


class LoadRankOptions(_CommonOptions, total=False):
    """Options of ``jaxshard.load_rank``, which documents them."""

    unmatched: Unmatched
    uneven: Policy
    drop_prefix: Iterable[str]
    keep_accu_grads: bool


@dataclass(frozen=True)
class Loading:
    """A load request read from a configuration.

    Attributes:
        path: the checkpoint.
        strategy: the strategy of the job that loads it.
        src_strategy: the strategy files of the checkpoint, if the configuration names them.
        suffix: which of several files a rank to read, if the configuration names one.
        with_states: load optimizer states and training scalars too, because training continues.
        how: further options of ``jaxshard.load``: ``balanced``, ``workers``.
        stated: values of keys that describe the files, to be compared with them.
        notes: notes for the user: ignored keys and contradictions.
        resumes: choose the newest valid step instead of the newest.
        prefix: the prefix of the job's steps where several jobs share a folder.
    """

    path: Path
    strategy: Strategy
    src_strategy: Path | None = None
    suffix: str | None = None
    with_states: bool = False
    how: Mapping[str, Any] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    resumes: bool = False
    prefix: str = ""

    def exclude(self, catalog: Catalog) -> tuple[str, ...]:
        """Return regular expressions for the tensors of ``catalog`` to leave out."""
        if self.with_states:
            return (_GRADIENTS,)
        return (_GRADIENTS, *_STATES, *(f"^{re.escape(n)}$" for n in sorted(catalog.scalars)))

    def target(self, catalog: Catalog) -> Strategy | str:
        """Return the layout of the job: that of the files if ``auto_trans_ckpt`` is False."""
        return SAME if keeps_slicing(self.switch, self.strategy, catalog) else self.strategy

    def own_file(self, rank: int) -> Path | None:
        """Return the file of ``rank`` if it holds the rank's share and no strategy files exist."""
        ranks = range(self.strategy.num_ranks)
        if self.switch is not False or self.src_strategy is not None or rank not in ranks:
            return None
        try:
            return own_file(self.path, rank, len(ranks), self.suffix)
        except CoverageError:
            suffix = self._suffix_of_kind()
            if suffix is None:
                raise
            return own_file(self.path, rank, len(ranks), suffix)

    @property
    def switch(self) -> bool | None:
        """``auto_trans_ckpt``, or None if it is absent."""
        switch = self.stated.get("auto_trans_ckpt")
        return None if switch is None else bool(switch)

    @property
    def _kind(self) -> str | None:
        kind = self.stated.get("load_ckpt_format")
        return kind if kind in _FILE_KINDS else None

    def _suffix_of_kind(self) -> str | None:
        """Return the suffix of the files of ``load_ckpt_format``, or None without that key."""
        return self._kind and f"{self.suffix or ''}.{self._kind}"

    def open(self) -> Catalog:
        """Open the checkpoint, with a note for each key that contradicts its files.

        Raises:
            JaxshardError: as ``open_checkpoint``.
        """
        catalog = self._catalog()
        catalog, found = with_layers(catalog, self.stated.get("num_layers"))
        found += [
            *contradictions(self.stated, self.strategy, catalog),
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
        """Open the files; ``load_ckpt_format`` only decides between files of both kinds."""
        if self.resumes and (found := self._newest_valid()):
            return found
        try:
            return open_checkpoint(self.path, src_strategy=self.src_strategy, suffix=self.suffix)
        except CoverageError:
            suffix = self._suffix_of_kind()
            if suffix is None:
                raise
            try:
                return open_checkpoint(self.path, src_strategy=self.src_strategy, suffix=suffix)
            except CoverageError:
                pass  # the kinds of files were not the reason: report the first error
            raise

    def _newest_valid(self) -> Catalog | None:
        """Open the newest valid step of the run, if the folder has steps."""
        from ..training.open_step import open_newest  # noqa: PLC0415 - only to resume

        return open_newest(
            self.path, strategy=self.src_strategy, prefix=self.prefix, kind=self._kind
        )


def from_config(config: Config | PathLike) -> Loading:
    """Read a load request from a MindFormers YAML file, or from its contents as a mapping.

    Relative paths start at the current folder, as in MindFormers.

    Raises:
        NotFoundError: no checkpoint is named, or it does not exist.
        FormatError: the file is not YAML, or a key has an invalid value.
        LayoutError: ``parallel_config`` is impossible.
        StorageError: the file cannot be read, or PyYAML is missing.
    """
    keys = _read(config)
    path, notes = checkpoint_of(keys)
    strategy, more = strategy_of(keys)
    suffix, with_states = resume_of(keys)
    if suffix is not None and path.is_file():
        suffix = None
        more.append(
            f"resume_training is {keys['resume_training']}, which has no effect: {path} is one "
            "file, from which training continues."
        )
    resumes = keys.get("resume_training") is True
    src, other = source_strategy_of(keys)
    if keys.get("only_save_strategy"):
        more.append(
            "only_save_strategy: there is nothing to load; jaxshard strategy make CONFIGURATION "
            "OUT writes the files."
        )
    about_files = ("remove_redundancy", "load_ckpt_format", "auto_trans_ckpt")
    stated = {k: keys[k] for k in about_files if keys.get(k) is not None} | num_layers_of(keys)
    notes += [*more, *other, *layout_notes(keys, strategy), *data_notes(keys), *ignored_notes(keys)]
    notes += unshared(path, "each process reads the files that it finds there")
    log_notes(_label(config), notes)
    return Loading(
        path,
        strategy,
        src,
        suffix,
        with_states,
        read_options(keys),
        stated,
        tuple(notes),
        resumes=resumes,
        prefix=prefix_of(keys) if resumes else "",
    )


def load(
    config: Config | PathLike | Loading,
    *,
    devices: Sequence[jax.Device] | None = None,
    **options: Unpack[LoadOptions],
) -> dict[str, jax.Array]:
    """Load the tensors of a configuration onto devices, with its strategy.

    Nothing is merged on disk first, for any strategy of the checkpoint. ``options`` are those of
    ``jaxshard.load``.

    Raises:
        JaxshardError: as ``from_config`` and ``jaxshard.load``.
    """
    from ..loader import load as load_arrays  # noqa: PLC0415 - imports JAX

    request = config if isinstance(config, Loading) else from_config(config)
    catalog = request.open()
    given: dict[str, Any] = {"exclude": request.exclude(catalog), **request.how, **options}
    target = _target(request, catalog, given)
    arrays: dict[str, jax.Array] = load_arrays(catalog, target, devices=devices, **given)
    return arrays


def load_rank(
    config: Config | PathLike | Loading, rank: int = 0, **options: Unpack[LoadRankOptions]
) -> dict[str, NDArray[Any]]:
    """Load the share of one rank of the configured job as NumPy arrays.

    ``options`` are those of ``jaxshard.load_rank``.

    Raises:
        JaxshardError: as ``from_config`` and ``jaxshard.load_rank``.
    """
    from ..conversion.load_rank import load_rank as load_share  # noqa: PLC0415 - rarely needed

    request = config if isinstance(config, Loading) else from_config(config)
    own = request.own_file(rank)
    catalog = request.open() if own is None else open_checkpoint(own)
    options.setdefault("exclude", request.exclude(catalog))
    if own is not None:
        return load_share(catalog, "full", **options)
    return load_share(catalog, _target(request, catalog, options), rank, **options)


def saving(config: Config | PathLike) -> dict[str, Any]:
    """Return the arguments of ``training.CheckpointManager`` that a configuration specifies.

    They come from its callback ``CheckpointMonitor`` or its section ``checkpoint``; without
    either the dict is empty.

    Raises:
        FormatError: the file is not YAML, or a key has an invalid value.
        StorageError: the file cannot be read, or PyYAML is missing.
    """
    arguments, notes = saving_of(_read(config))
    log_notes(_label(config), notes)
    return arguments


def resuming(config: Config | PathLike) -> dict[str, Any]:
    """Return the arguments of ``training.resume_point`` that a configuration specifies.

    >>> resuming({"trainer": {"data_skip_steps": 2}, "runner_config": {"sink_mode": True}})
    {'data_skip_steps': 2, 'sink_mode': True}

    Raises:
        FormatError: the file is not YAML, or a key has an invalid value.
        StorageError: the file cannot be read, or PyYAML is missing.
    """
    arguments, notes = resuming_of(_read(config))
    log_notes(_label(config), notes)
    return arguments


def job_of(config: Config | PathLike) -> tuple[Catalog, Strategy, bool]:
    """Return the tensors of the configured job, its strategy, and whether it trains.

    The tensors are those of its checkpoint; without one, those of the model in its
    ``config.json`` or, under MindFormers' names, of ``model.model_config``. A job that trains has
    optimizer states. Strategy files are made from this.

    Raises:
        NotFoundError: the configuration does not determine the tensors.
        JaxshardError: as ``from_config`` and ``open_checkpoint``.
    """
    keys = _read(config)
    strategy, notes = strategy_of(keys)
    notes += [*layout_notes(keys, strategy), *ignored_notes(keys)]
    catalog = tensors_of(keys, os.fspath(config) if not isinstance(config, Mapping) else ".")
    catalog, more = with_layers(catalog, num_layers_of(keys).get("num_layers"))
    mode = str(keys.get("run_mode") or "")
    is_training = mode in _TRAINING or bool(keys.get("resume_training"))
    if is_training:
        more.append(
            "adam_m and adam_v of each weight are among the tensors, because the job trains "
            f"(run_mode is {mode or 'absent'})."
        )
    return replace(catalog, notes=(*catalog.notes, *notes, *more)), strategy, is_training


def read_yaml(path: PathLike) -> Config:
    """Read the mapping in the YAML file at ``path``.

    Raises:
        NotFoundError: it does not exist.
        StorageError: it cannot be read, or PyYAML is missing.
        FormatError: it is not YAML, or not a mapping.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        keys = parse_yaml(text, str(path))
    except ImportError:
        raise StorageError(
            "YAML files need PyYAML, which is not installed. Install jaxshard[yaml], or pass the "
            "configuration as a dict."
        ) from None
    if not isinstance(keys, dict):
        raise FormatError(f"{path} is not a mapping of keys to values. Check the file.")
    return keys


def _read(config: Config | PathLike) -> Config:
    return config if isinstance(config, Mapping) else read_yaml(config)


def _label(config: Config | PathLike) -> str:
    """Return the name of a configuration in notes: its file's path."""
    return "the configuration" if isinstance(config, Mapping) else os.fspath(config)


def _target(request: Loading, catalog: Catalog, options: Mapping[str, Any]) -> Strategy | str:
    """Return the target of a load.

    Raises:
        CoverageError: the checkpoint is a part of a model.
        LayoutError: rules are given although the ranks keep their own parts.
    """
    refuse_part(request.switch, request.strategy, catalog)
    target = request.target(catalog)
    if takes_whole(catalog, options.get("include", ()), options.get("exclude", ())):
        refuse_missing_layers(catalog)
        if target == SAME:
            refuse_half(catalog)
    if target == SAME and options.get("rules") is not None:
        raise LayoutError(
            "rules= lay out by names, but auto_trans_ckpt: False keeps each rank's own part. "
            "Remove rules=, or set auto_trans_ckpt: True."
        )
    return target
