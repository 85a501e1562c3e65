"""Slicing of a configured job: the files' own, or that of its strategy.

    auto_trans_ckpt: False      rank 3 has what rank_3's file has, where there is a file a rank
    otherwise                   what parallel_config says, whatever the files are

And whether the checkpoint is all of the model that the job has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..conversion.open import strategy_place
from ..conversion.select import TRAINABLE
from ..conversion.targets import lay_out_for
from ..core.box import Box
from ..core.catalog import Catalog, Model
from ..core.layout import Layout
from ..core.strategy import Strategy
from ..errors import (
    CoverageError,
    FormatError,
    JaxshardError,
    LayoutError,
    NotFoundError,
    format_list,
    quote_name,
)
from ..formats import rank_names
from ..formats.huggingface import model_of
from ..formats.registry import format_of
from ..rules import missing_layers, rules_for
from ..rules.match import is_part_of_adapter, weight_name
from ..storage.local import LocalFolder
from .config_keys import Config, section


def keeps_slicing(switch: bool | None, strategy: Strategy, catalog: Catalog) -> bool:
    """Whether each rank of the job is to have what its own file has.

    MindFormers calls that the original slicing. Checkpoint 2.0 knows no such switch.
    """
    return switch is False and _own(strategy, catalog) is not None


def _own(strategy: Strategy, catalog: Catalog) -> Layout | None:
    """The layout of rank files, if there is one for each rank of the job."""
    layout = catalog.layout if format_of(catalog.format).reads_strategy else None
    return layout if layout is not None and layout.num_ranks == strategy.num_ranks else None


def other_slicing(switch: bool | None, strategy: Strategy, catalog: Catalog) -> list[str]:
    """A note on weights that the ranks' files cut otherwise than ``strategy`` does."""
    own = _own(strategy, catalog)
    if switch or own is None:
        return []
    try:
        wanted = lay_out_for(catalog, strategy)
    except JaxshardError as error:
        unsaid = f"parallel_config is not compared with the ranks' own parts: {error}"
        return [unsaid] if switch is False else []
    names = [n for n in catalog.tensors if n not in catalog.scalars and weight_name(n) == n]
    differ = _cut_otherwise(catalog, names, own, wanted)
    if not differ:
        return []
    instead = (
        "each rank has what its own file has, as auto_trans_ckpt is False"
        if switch is False
        else "parallel_config counts; auto_trans_ckpt: False keeps what each rank has"
    )
    return [
        f"{len(differ)} of {len(names)} weights lie otherwise by the strategy files of the "
        f"checkpoint than by parallel_config ({strategy}): {format_list(differ, 3)}; {instead}."
    ]


def _cut_otherwise(
    catalog: Catalog, names: Iterable[str], first: Layout, second: Layout
) -> list[str]:
    """Those of ``names`` of which a rank holds another box by ``second`` than by ``first``."""
    same: dict[tuple[object, ...], bool] = {}  # by kind: there are a few hundred
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
    """The box that each rank holds of a tensor."""
    placements = layout.placements.get(name, ())
    return {r: box for p in placements for r, box in zip(p.ranks, p.boxes(shape), strict=True)}


def own_file(path: Path, rank: int, num_ranks: int, suffix: str | None) -> Path | None:
    """The file of ``rank``, where no strategy says what the files of all ranks hold.

    What a rank's own part is needs none, and MindFormers asks for none.
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
    """What suggests that rank files are of some pipeline stages of the job only; or nothing.

    Strategy files of the first stage alone look like those of a job without stages. The names
    of a known family tell which it is, when they are loaded; of others, the configuration's
    number of ranks is all there is.
    """
    layout = catalog.layout if format_of(catalog.format).reads_strategy else None
    ranks, stage = strategy.num_ranks, strategy.stage_ranks
    if layout is None or layout.num_ranks >= ranks or layout.num_ranks % stage:
        return ""
    if _is_of_known_family(catalog):
        return ""
    have = layout.num_ranks // stage
    return (
        f"the strategy files are of {layout.num_ranks} ranks, as many as {have} of the "
        f"{strategy.pp} pipeline stages that parallel_config ({strategy}, {ranks} ranks) has"
    )


def refuse_part(switch: bool | None, strategy: Strategy, catalog: Catalog) -> None:
    """Refuse what may be some pipeline stages only, unless a transformation is asked for.

    Raises:
        CoverageError: with the numbers.
    """
    text = "" if switch else maybe_part(strategy, catalog)
    if text:
        raise CoverageError(
            f"{catalog.root}: {text}. Fetch the ranks and the strategy files of all stages; or, if "
            "the checkpoint is of a job with fewer, set auto_trans_ckpt: True."
        )


def _is_of_known_family(catalog: Catalog) -> bool:
    try:
        rules_for(catalog.model, [n for n in catalog.tensors if n not in catalog.scalars])
    except (LayoutError, NotFoundError):
        return False
    return True


def with_layers(catalog: Catalog, num_layers: int | None) -> tuple[Catalog, list[str]]:
    """``catalog`` with the configuration's number of layers where it has none; and notes."""
    own = catalog.model.num_layers
    if num_layers is None or own == num_layers:
        return catalog, []
    if own is not None:
        return catalog, [
            f"the configuration's model has {num_layers} layers, but {own} by the config.json of "
            "the checkpoint, which counts."
        ]
    return replace(catalog, model=replace(catalog.model, num_layers=num_layers)), []


def refuse_missing_layers(catalog: Catalog) -> None:
    """Refuse a checkpoint that lacks layers of its model, whatever its format.

    Raises:
        CoverageError: with their numbers.
    """
    if any(TRAINABLE in file.path for file in catalog.files):
        return  # which layers were trained, nothing says
    if catalog.layout is not None and catalog.layout.unknown:
        return  # stages that are missing for certain are refused where they are needed
    weights = [
        name
        for name in (*catalog.tensors, *catalog.lost)
        if name not in catalog.scalars
        and weight_name(name) == name
        and not is_part_of_adapter(name)
    ]
    gone = missing_layers(catalog.model, weights)
    if gone:
        raise CoverageError(
            f"{catalog.root} is a part of a model: {gone}. Give the whole of it, or take what is "
            "there with include=."
        )


# --- MindFormers' model configurations in the terms of ``config.json``

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
    """The model of a configuration, and the mapping from Hugging Face's names to its own.

    Raises:
        NotFoundError: it is none of those, or says too little.
        FormatError: a number means nothing.

    >>> small = {"hidden_size": 32, "vocab_size": 64, "num_layers": 2, "num_heads": 4}
    >>> hf_model_of({"model_config": {"type": "LlamaConfig", **small}})[1]
    'llama-hf:llama-mindformers'
    """
    told = section(model, "model_config")
    kind = told.get("type")
    if kind not in _TYPES:
        what = f"the type {quote_name(repr(kind))}" if told else "nothing"
        raise NotFoundError(
            f"no checkpoint is named, and {_WHERE} says {what}, from which the names of tensors do "
            f"not follow (known are {', '.join(_TYPES)}). Name a checkpoint, or the folder of a "
            "config.json: load_checkpoint or pretrained_model_dir."
        )
    config: dict[str, Any] = {theirs: told[ours] for ours, theirs in _WORDS.items() if ours in told}
    config = {key: value for key, value in config.items() if value is not None}
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise NotFoundError(f"{_WHERE} has no {missing[0]}. Add it.")
    config["tie_word_embeddings"] = bool(told.get("tie_word_embeddings"))
    config["model_type"] = "qwen2" if told.get("qkv_has_bias") else "llama"
    config.setdefault("intermediate_size", _width(told, config["hidden_size"]))
    form = "mindformers-concat" if told.get("qkv_concat") else "mindformers"
    return model_of(config), f"llama-hf:llama-{form}"


def _width(told: Mapping[str, Any], hidden: Any) -> int:
    """The inner width of a layer, which follows from the outer one."""
    factor, step = told.get("ffn_dim_multiplier"), told.get("multiple_of") or _MULTIPLE_OF
    numbers = (hidden, step, 1 if factor is None else factor)
    if any(
        isinstance(n, bool) or not isinstance(n, int | float) or not 0 < n < _MOST for n in numbers
    ):
        raise FormatError(
            f"{_WHERE}: hidden_size, multiple_of and ffn_dim_multiplier are {numbers}, not numbers "
            "above 0."
        )
    width = 4 * hidden if factor is None else int((factor + 0.01) * 4 * hidden)  # as theirs is
    return int(-(-int(2 * width / 3) // step) * step)
