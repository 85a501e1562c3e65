"""Settings: what an adapter's product is multiplied with, and who says so.

    scaling = alpha / rank, or alpha / √rank with rslora

Alpha is never guessed: an adapter whose alpha nobody says is refused, with the places that
were looked in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from ..errors import FormatError, LayoutError, NotFoundError
from ..formats.strict_json import parse_object
from ..storage.local import LocalFolder
from .adapters import Adapter

PEFT_CONFIG = "adapter_config.json"
OWN_CONFIG = "mindformers_adapter_config.json"
_PARENTS = 3  # MindFormers keeps one file for several checkpoints, above them
_MAX_BYTES = 1 << 22


@dataclass(frozen=True)
class Settings:
    """How strongly adapters act. ``where`` says who said so, for messages."""

    alpha: float | None = None
    rank: int | None = None
    scaling: float | None = None
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool | None = None
    where: str = ""
    looked_in: tuple[str, ...] = ()

    def scaling_of(self, adapter: Adapter) -> float:
        """What the product of ``adapter`` is multiplied with.

        Raises:
            NotFoundError: nobody says alpha; the places that were looked in are listed.
            FormatError: the config says another rank than the adapter has.
        """
        if self.scaling is not None:
            return self.scaling
        alpha: float | None = _by_pattern(self.alpha_pattern, adapter.module, self.alpha)
        if alpha is None:
            raise NotFoundError(
                f"{adapter.a.name}: its alpha is not known, and is not guessed. Looked for "
                f"lora_alpha in {', '.join(self.looked_in) or 'no file'}. Give alpha= (what it was "
                "trained with), or scaling= (alpha / rank)."
            )
        rank: int | None = _by_pattern(self.rank_pattern, adapter.module, self.rank)
        if rank is not None and rank != adapter.rank:
            raise FormatError(
                f"{adapter.a.name}: shape {adapter.a.shape} has rank {adapter.rank}, but "
                f"{self.where} says {rank}. The adapter and its config do not belong together."
            )
        return alpha / (sqrt(adapter.rank) if self.rslora else adapter.rank)


def find_settings(root: str) -> Settings:
    """What the config beside the adapter in the folder ``root``, or above it, says.

    Raises:
        FormatError: a config is not what it claims to be.
        LayoutError: it describes another kind of adapter.
    """
    at = Path(root).absolute()
    looked = []
    for place in (at, *list(at.parents)[:_PARENTS]):
        for name in (PEFT_CONFIG, OWN_CONFIG):
            path = place / name
            looked.append(str(path))
            if path.is_file():
                return _read(path)
    return Settings(looked_in=tuple(looked))


def _read(path: Path) -> Settings:
    folder = LocalFolder(path)
    try:
        size = folder.files()[path.name].num_bytes
        if size > _MAX_BYTES:
            raise FormatError(f"{path} has {size} bytes; an adapter's config has a few thousand.")
        config = parse_object(folder.read(path.name, 0, size), str(path))
    finally:
        folder.close()
    inner = config.get("lora_config")
    said = {**config, **inner} if isinstance(inner, dict) else config
    kind = said.get("peft_type")
    if kind not in (None, "LORA"):
        raise LayoutError(f"{path}: peft_type is {kind!r}; only LORA can be merged.")
    for flag in ("use_dora", "lora_bias", "target_parameters"):
        if said.get(flag):
            raise LayoutError(
                f"{path}: {flag} is {said[flag]!r}; that is more than adding a product to a "
                "matrix, and cannot be merged here. Merge it with PEFT."
            )
    return Settings(
        alpha=_number(said, "lora_alpha", path),
        rank=_whole(said, ("r", "lora_rank"), path),
        rslora=bool(said.get("use_rslora")),
        rank_pattern={k: int(v) for k, v in _patterns(said, "rank_pattern", path).items()},
        alpha_pattern=_patterns(said, "alpha_pattern", path),
        fan_in_fan_out=bool(said["fan_in_fan_out"]) if "fan_in_fan_out" in said else None,
        where=str(path),
        looked_in=(str(path),),
    )


def _number(said: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = said.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{path}: {key} is {value!r}, not a number.")
    return float(value)


def _whole(said: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> int | None:
    found = next((_number(said, k, path) for k in keys if k in said), None)
    return None if found is None else int(found)


def _patterns(said: Mapping[str, Any], key: str, path: Path) -> dict[str, float]:
    value = said.get(key) or {}
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {key} is no table of names and numbers.")
    found = {}
    for pattern in value:
        number = _number(value, pattern, path)
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(
                f"{path}: {key} has {pattern!r}, no regular expression: {error}."
            ) from None
        if number is None:
            raise FormatError(f"{path}: {key} says nothing for {pattern!r}.")
        found[pattern] = number
    return found


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of ``module`` is."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
