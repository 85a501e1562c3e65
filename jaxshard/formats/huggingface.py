"""Hugging Face folders: weight files, their index and ``config.json``.

    config.json                        configuration of the model
    model.safetensors.index.json       {"weight_map": {name: file}}
    model-00001-of-00002.safetensors   …
    tokenizer.json                     an extra file: copied, never read

If there is an index, it decides which file serves a name; it must not name files outside the
folder. A folder unified by MindSpore has the same structure under other names. This module reads
headers, the index and the config, and does not depend on shardings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from posixpath import basename, normpath
from typing import Any

from ..core.box import Box
from ..core.catalog import Catalog, File, Model, StoredShard, Tensor, group_by_bytes
from ..core.decoders import FETCH, parse_object
from ..core.layout import Layout, Placement
from ..errors import CoverageError, FormatError, LayoutError, NotFoundError, format_list, quote_name
from ..models.facts import text_config
from ..planning.outputs import Outputs, arrange
from .folder import Folder
from .output_files import Request, Result, SafetensorsContainer
from .safetensors import Header, HeaderEntry, read_header


def plan_files(tensors: Iterable[tuple[str, int]], max_shard_bytes: int) -> list[list[str]]:
    """Group (name, bytes) pairs into files of at most ``max_shard_bytes``, in order.

    A larger tensor gets a file of its own, and the current file continues after it, as in
    ``huggingface_hub``. Without tensors there is one empty file.

    >>> plan_files([("a", 3), ("b", 3), ("big", 9), ("c", 1)], max_shard_bytes=4)
    [['a'], ['big'], ['b', 'c']]
    """
    return list(group_by_bytes(tensors, max_shard_bytes, large_alone=True)) or [[]]


def file_names(num_files: int) -> list[str]:
    """Return the names of ``num_files`` weight files.

    >>> file_names(1), file_names(2)[0]
    (['model.safetensors'], 'model-00001-of-00002.safetensors')
    """
    if num_files == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]


def index_json(
    weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, Any]
) -> bytes:
    """Return ``model.safetensors.index.json``; ``total_size`` is the bytes of all tensors."""
    index = {"metadata": {**metadata, "total_size": total_size}, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


# --- reading a folder -----------------------------------------------------------------------------

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"  # of PEFT, which also writes adapter_config.json
ADAPTER_PREFIX = "base_model.model."  # of all names in it
CONFIG = "config.json"
CHECKSUMS = "checksums.json"  # checksums of the folder's files, written on request
NO_CONFIG = f"{CONFIG} is missing, so the model's family is unknown."
MINDSPORE_INDEX = "param_name_map.json"
MINDSPORE_SCALARS = "hyper_param.safetensors"

_MAX_INDEX_BYTES = 100_000_000  # the limit of headers, which list the same names
MAX_CONFIG_BYTES = 16_000_000
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|ot|npz)(\.index\.json)?$"
)
_HIDDEN = re.compile(r"(^|/)(\.|__pycache__/)")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
# Mistral's own form of the same model, and adapters: not parts of the model in the folder
_OTHER_FORM = re.compile(r"consolidated|adapter_(model|config)")
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True, slots=True)
class _Choice:
    """Chosen weight files; ``serves`` maps names to files if there is an index."""

    paths: tuple[str, ...]
    serves: Mapping[str, str] | None = None
    index: str = ""
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def recognise(files: Mapping[str, File]) -> bool:
    """Return whether ``files`` have safetensors weights or an index at their top."""
    return bool(_top(files, ".safetensors")) or bool(_indexes(files))


def read(folder: Folder) -> Catalog:
    """Read the catalog of the checkpoint in ``folder``: all headers, the index and the config.

    Raises:
        FormatError: a file or the index is damaged.
        NotFoundError: no safetensors weights.
        CoverageError: a file of the index, or of a numbered set, is missing.
    """
    files = folder.files()
    choice = _choose(folder, files)
    used = tuple(files[path] for path in choice.paths)
    headers = [read_header(folder, f.path, file_bytes=f.num_bytes) for f in used]
    tensors, left_out = _tensors(choice, headers)
    model, config_notes = read_model(folder, files)
    extras, unread = carried(files, choice.paths)
    not_used = [path for path in unread if path not in choice.left_out]
    notes = [*choice.notes, *config_notes]
    if left_out:
        notes.append(
            f"{choice.index} does not list {format_list(map(quote_name, left_out))}: left out."
        )
    if not_used:
        notes.append(
            f"Weight files neither read nor copied: {format_list(map(quote_name, not_used))}."
        )
    return Catalog(
        root=folder.root,
        format="huggingface",
        files=used,
        tensors=tensors,
        model=model,
        metadata=_agreed([h.metadata for h in headers]),
        extras=extras,
        scalars=_scalar_names(used, tensors),
        notes=tuple(notes),
    )


def _choose(folder: Folder, files: Mapping[str, File]) -> _Choice:
    """Choose the weight files: those of the index, the single file, or all at the top."""
    indexes, found = _indexes(files), _top(files, ".safetensors")
    if not indexes and not found:
        raise NotFoundError(_nothing(folder, files))
    if not indexes:
        return _choose_without_index(folder, found, alone=len(files) == 1)
    index, *others = indexes
    serves = _read_index(folder, files[index])
    notes = [f"{index} is followed, not {format_list(others)}."] if others else []
    if index == INDEX and SINGLE in found and SINGLE not in serves.values():
        # as in transformers: the single file is a newer save than the index
        return _Choice((SINGLE,), notes=(f"{SINGLE} is read, not the files of {INDEX}.",))
    _check_present(folder, files, index, serves)
    used = set(serves.values())
    if index == MINDSPORE_INDEX and MINDSPORE_SCALARS in found:
        used.add(MINDSPORE_SCALARS)  # that index does not list training scalars
    return _Choice(tuple(sorted(used)), serves, index, tuple(notes))


def _choose_without_index(folder: Folder, found: Sequence[str], *, alone: bool) -> _Choice:
    """Choose the single file, or all files at the top that may be parts of one model."""
    scalars = (MINDSPORE_SCALARS,) if MINDSPORE_SCALARS in found else ()
    if SINGLE in found:
        return _Choice((SINGLE, *scalars))
    parts = tuple(path for path in found if not _OTHER_FORM.match(path)) or tuple(found)
    _check_numbered(folder, parts, alone=alone)
    notes = []
    others = tuple(path for path in found if path not in parts)
    if others:
        notes.append(
            f"{format_list(map(quote_name, others))} is not read: it holds the same model in "
            "another form, or an adapter. Pass the file itself to read it."
        )
    stems = {_SHARD.sub(r"\g<stem>-of-\g<total>", path) for path in parts} - set(scalars)
    if len(stems) > 1:
        notes.append(
            f"{INDEX} is missing, so all {len(parts)} weight files are read as one model "
            f"({format_list(map(quote_name, parts))}). Pass one file to read it alone."
        )
    return _Choice(parts, notes=tuple(notes), left_out=others)


def _read_index(folder: Folder, file: File) -> dict[str, str]:
    """Read the index ``file``: the file that serves each name, always inside the folder."""
    path, size = file.path, file.num_bytes
    if size > _MAX_INDEX_BYTES:
        raise FormatError(f"{path} has {size} bytes (expected at most {_MAX_INDEX_BYTES}). {FETCH}")
    parsed = parse_object(folder.read(path, 0, size), path)
    flat = path == MINDSPORE_INDEX and "weight_map" not in parsed  # older MindSpore versions
    weight_map = parsed if flat else parsed.get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{path}: weight_map is missing or not an object. {FETCH}")
    for name, target in weight_map.items():
        if not isinstance(target, str):
            raise FormatError(
                f"{path}: the file of {quote_name(name)} is {quote_name(repr(target))} (expected a "
                f"name). {FETCH}"
            )
    where = {target: _inside(path, target) for target in set(weight_map.values())}
    return {name: where[target] for name, target in weight_map.items()}


def _check_present(
    folder: Folder, files: Mapping[str, File], index: str, serves: Mapping[str, str]
) -> None:
    named = set(serves.values())
    missing = sorted(named - files.keys())
    if not missing:
        return
    whole = _complete_set(set(_top(files, ".safetensors")) - named)
    raise CoverageError(
        f"{index} names {len(named)} files, {len(missing)} of which {folder.root} does not have "
        f"({format_list(map(quote_name, missing))}). "
        + (
            f"{quote_name(whole)} is complete, so the index belongs to an older save: remove it."
            if whole
            else "Fetch the missing files."
        )
    )


def _complete_set(paths: Iterable[str]) -> str:
    """Return the name of a complete set of numbered files in ``paths``, or ""."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, paths)):
        numbers.setdefault((match["stem"], match["total"]), set()).add(int(match["number"]))
    for (stem, total), found in sorted(numbers.items()):
        if found == set(range(1, int(total) + 1)):
            return f"{stem}-*-of-{total}.safetensors ({int(total)} files)"
    return ""


def _inside(index: str, target: str) -> str:
    """Normalize ``target``; refuse it if it could leave the folder on any system."""
    parts = target.split("/")
    if not parts[-1] or not parts[0] or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", target):
        raise FormatError(
            f"{index} names the file {quote_name(repr(target))} outside the folder. Fetch the "
            "checkpoint from a source you trust."
        )
    return normpath(target)


def _tensors(
    choice: _Choice, headers: Sequence[Header]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors in byte order, and the names that the index does not list."""
    boxes: dict[tuple[int, ...], Box] = {}
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    for number, (path, header) in enumerate(zip(choice.paths, headers, strict=True)):
        for entry in header.entries:
            if choice.serves is not None and path != MINDSPORE_SCALARS:
                served_by = choice.serves.get(entry.name)
                if served_by is None:
                    left_out.append(entry.name)
                if served_by != path:
                    continue
            if entry.name in tensors:
                first = choice.paths[tensors[entry.name].shards[0].file]
                raise FormatError(
                    f"{quote_name(entry.name)} is in both {first} and {path}, without an "
                    "index to choose one. Remove the stale file."
                )
            tensors[entry.name] = _tensor(entry, number, boxes)
    lacking = [name for name in choice.serves or () if name not in tensors]
    if lacking:
        name = lacking[0]
        raise FormatError(
            f"{(choice.serves or {})[name]} does not contain "
            f"{format_list(map(quote_name, lacking))}, which {choice.index} lists there. Fetch "
            "both again."
        )
    return tensors, tuple(left_out)


def _tensor(entry: HeaderEntry, file: int, boxes: dict[tuple[int, ...], Box]) -> Tensor:
    name, kind, shape, start, _ = entry
    box = boxes.get(shape)
    if box is None:  # thousands of tensors share a shape, and so its box
        box = boxes[shape] = Box.whole(shape)
    return Tensor(name, kind, shape, (StoredShard(file, start, box),))


def read_model(
    folder: Folder, files: Mapping[str, File], path: str = CONFIG
) -> tuple[Model, list[str]]:
    """Read ``config.json``; return a note instead if it is unreadable."""
    listed = files.get(path)
    if listed is None:
        return Model(), [NO_CONFIG]
    if listed.num_bytes > MAX_CONFIG_BYTES:
        return Model(), [f"{CONFIG} is not read: it has {listed.num_bytes} bytes."]
    try:
        return model_of(parse_config(folder.read(path, 0, listed.num_bytes))), []
    except ValueError as error:
        return Model(), [f"{CONFIG} is not read: {error}."]


def parse_config(raw: bytes) -> dict[str, Any]:
    """Parse a ``config.json``.

    Raises:
        ValueError: not a JSON object; the message completes "is not read:".
    """
    try:
        # not the strict parser: Python writes Infinity into configs, and no value is trusted
        config = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise ValueError("it is not an object")
    return config


def model_of(config: Mapping[str, Any]) -> Model:
    """Return the model of a ``config.json``; of a multimodal model, its text part.

    >>> model_of({"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False})
    Model(type='llama', num_layers=2, tied_embeddings=False)
    """
    nested = text_config(config)
    places = (config,) if nested is config else (config, nested)
    kind = config.get("model_type")
    kind = kind if isinstance(kind, str) else None
    layers = [p[key] for p in places for key in _NUM_LAYERS if type(p.get(key)) is int]
    tied = [p["tie_word_embeddings"] for p in places if "tie_word_embeddings" in p]
    return Model(
        type=kind,
        num_layers=layers[0] if layers and layers[0] >= 0 else None,
        # before version 5, transformers left the key out where it had its default: True
        tied_embeddings=tied[0] is True if tied else kind is not None,
        config=config,
    )


def carried(files: Iterable[str], used: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the extra files to copy, and the weight files neither read nor copied."""
    extras, not_used = [], []
    for path in files:
        if path in used or path == CHECKSUMS or _HIDDEN.search(path):
            continue
        if not is_weights(path):
            if path != MINDSPORE_INDEX:
                extras.append(path)
        elif not path.endswith(".index.json"):
            not_used.append(path)
    return tuple(extras), tuple(not_used)


def is_weights(path: str) -> bool:
    """Return whether ``path`` is the name of a weight file of any format, or of an index."""
    return bool(_WEIGHTS.search(path))


def _scalar_names(used: Sequence[File], tensors: Mapping[str, Tensor]) -> frozenset[str]:
    numbers = {n for n, file in enumerate(used) if basename(file.path) == MINDSPORE_SCALARS}
    named = scalar_names(tensors.values())
    if not numbers:
        return named
    return named | {t.name for t in tensors.values() if t.shards[0].file in numbers}


def _agreed(all_metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the union of the files' metadata, without keys on which two files differ."""
    union: dict[str, str] = {}
    for metadata in all_metadata:
        union |= metadata
    return {
        key: value
        for key, value in union.items()
        if all(m.get(key, value) == value for m in all_metadata)
    }


def _indexes(files: Mapping[str, File]) -> list[str]:
    """Return the indexes at the top, the one to follow first."""
    found = [*_top(files, ".safetensors.index.json")]
    if MINDSPORE_INDEX in files:
        found.append(MINDSPORE_INDEX)
    return sorted(found, key=lambda path: (path != INDEX, path == MINDSPORE_INDEX, path))


def _top(files: Iterable[str], ending: str) -> tuple[str, ...]:
    return tuple(
        sorted(p for p in files if "/" not in p and p.endswith(ending) and not p.startswith("."))
    )


def _check_numbered(folder: Folder, paths: Sequence[str], *, alone: bool) -> None:
    """Raise CoverageError if a set numbered ``-of-00003`` lacks a file, unless ``alone``."""
    sets: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, paths)):
        sets.setdefault((match["stem"], match["total"]), set()).add(int(match["number"]))
    for (stem, total), numbers in sets.items():
        missing = int(total) - len(numbers)
        if missing > 0 and not alone:
            raise CoverageError(
                f"{folder.root} has {len(numbers)} of the {int(total)} files "
                f"{stem}-*-of-{total}.safetensors. Fetch the other {missing}."
            )


def _nothing(folder: Folder, files: Mapping[str, File]) -> str:
    weights = [p for p in files if is_weights(p)]
    if any(p.endswith(".safetensors") for p in weights):
        return (
            f"{folder.root} has no safetensors weights at its top, only below it: "
            f"{format_list(p for p in weights if p.endswith('.safetensors'))}. Pass that folder."
        )
    if weights:
        return (
            f"{folder.root} has {format_list(weights)}, but only safetensors files are supported. "
            "Save it with save_pretrained(…, safe_serialization=True), or fetch those files."
        )
    return f"{folder.root} has no safetensors weights ({len(files)} other files). Check the path."


# --- training scalars among the weights: global_step, loss_scale and others -----------------------

TRAINING_SCALARS = frozenset(
    {
        *("epoch_num", "step_num", "global_step", "global_batch_size", "consumed_samples"),
        *("learning_rate", "loss_scale", "scale_sense", "current_iterator_step"),
        *("last_overflow_iterator_step", "batch_num"),
    }
)

_FRACTIONS = frozenset({"learning_rate", "loss_scale", "scale_sense"})
_SCALAR_LIMIT = 1 << 63  # MindSpore stores signed 64-bit integers


def scalar_names(tensors: Iterable[Tensor]) -> frozenset[str]:
    """Return the names of the training scalars among ``tensors``."""
    return frozenset(t.name for t in tensors if t.name in TRAINING_SCALARS and prod(t.shape) == 1)


def scalar_value(name: str, value: object, where: str) -> int | float:
    """Return the value of training scalar ``name``, read from ``where``, in its own type.

    Raises:
        FormatError: the value is not a valid number.

    >>> [scalar_value(name, 10.0, "") for name in ("global_step", "loss_scale")]
    [10, 10.0]
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if name in _FRACTIONS:
            return value
        if isfinite(value) and int(value) == value and abs(value) < _SCALAR_LIMIT:
            return int(value)
    expected = "a number" if name in _FRACTIONS else "an integer of 64 bits"
    raise FormatError(f"{where}: {name} is {quote_name(repr(value))}, expected {expected}. {FETCH}")


# --- output files: every tensor whole, in shards of a limited size --------------------------------

_HUGGINGFACE_BYTES = 5 * 10**9  # what transformers puts in one file
_UNIFIED_BYTES = 3 << 30  # what MindSpore does


def plan_complete(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """Plan the files of a folder that transformers loads."""
    groups = _groups(source, tensors, request.max_shard_bytes or _HUGGINGFACE_BYTES)
    paths = file_names(len(groups))
    if len(groups) == 1 and tensors and all(t.name.startswith(ADAPTER_PREFIX) for t in tensors):
        paths = [ADAPTER]
    if request.one_file and len(groups) == 1:
        groups = [[t.name for t in tensors]]
    outputs, weight_map = _arranged(tensors, groups, paths)
    side = {}
    if len(groups) > 1:
        total = sum(t.num_bytes for t in tensors)
        side[INDEX] = index_json(weight_map, total, {})
    metadata = {"format": "pt", **source.metadata}
    if metadata["format"] == "ms":
        metadata["format"] = "pt"  # transformers refuses files of another format
    return Result("huggingface", outputs, SafetensorsContainer(metadata), side)


def plan_unified(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """Plan the files of a folder as ``mindspore.unified_safetensors`` makes it."""
    groups = _groups(source, tensors, request.max_shard_bytes or _UNIFIED_BYTES)
    paths = [f"part{i}.safetensors" for i in range(len(groups))]
    outputs, weight_map = _arranged(tensors, groups, paths)
    weights = {n: p for n, p in weight_map.items() if p != MINDSPORE_SCALARS}
    total = sum(t.num_bytes for t in tensors if t.name in weights)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    side = {MINDSPORE_INDEX: json.dumps(index, indent=4).encode()}
    metadata = {**source.metadata, "format": "ms", "remove_redundancy": "False"}
    return Result("unified", outputs, SafetensorsContainer(metadata), side)


def check_config(config: object) -> None:
    """Raise LayoutError if ``config`` cannot be written as ``config.json``."""
    try:
        if config is None or (isinstance(config, Mapping) and json.dumps(dict(config))):
            return
        why = f"got a {type(config).__name__}"
    except (TypeError, ValueError) as error:
        why = str(error)
    raise LayoutError(f"config= must be an object for config.json: {why}.")


def _groups(source: Catalog, tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[str]]:
    weights = [(t.name, t.num_bytes) for t in tensors if t.name not in source.scalars]
    return plan_files(weights, max_shard_bytes)


def _arranged(
    tensors: Sequence[Tensor], groups: list[list[str]], paths: list[str]
) -> tuple[Outputs, dict[str, str]]:
    """Return the outputs and the file of each name; ungrouped scalars share a file."""
    grouped = {name for group in groups for name in group}
    scalars = [t for t in tensors if t.name not in grouped]
    weights = [t for t in tensors if t.name in grouped]
    if scalars:
        groups, paths = [*groups, [t.name for t in scalars]], [*paths, MINDSPORE_SCALARS]
    alone = [(Placement((), first_rank=i),) for i in range(len(groups))]
    placements = {name: alone[i] for i, group in enumerate(groups) for name in group}
    outputs = arrange([*weights, *scalars], Layout(len(groups), placements), paths)
    weight_map = {name: paths[p[0].first_rank] for name, p in placements.items()}
    return outputs, weight_map
