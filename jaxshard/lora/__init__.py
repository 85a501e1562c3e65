"""LoRA: adapters merged into their base weights while the weights are streamed.

merge_lora("llama/", "merged/", adapter="adapter/")          file to file
load(with_adapter("llama/", "adapter/"), "dp2mp4")           inside a sharded load
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Unpack

from ..conversion.execute import Report, execute, progress_of
from ..conversion.open import PathLike, opened
from ..conversion.prepare import ConvertOptions, prepare, split, takes_options
from ..core.catalog import Catalog, log_done, log_notes
from ..core.layout import Layout, Strategy
from ..errors import LayoutError, format_list
from .adapters import Settings, find_adapters, find_settings, is_adapter
from .base_weights import AdapterNames
from .merge import Merged, merged

__all__ = [
    "Merged",
    "Settings",
    "find_adapters",
    "find_settings",
    "is_adapter",
    "merge_lora",
    "merged",
    "with_adapter",
]


def with_adapter(
    source: Catalog | PathLike,
    adapter: Catalog | PathLike | None = None,
    *,
    alpha: float | None = None,
    adapter_rank: int | None = None,
    scaling: float | None = None,
    fan_in_fan_out: bool | None = None,
    unmerge: bool = False,
    reproducible: bool = False,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    adapter_strategy: PathLike | None = None,
    adapter_names: AdapterNames | None = None,
) -> Catalog:
    """Return ``source`` with its adapters merged on reading; load or convert it like any catalog.

    Args:
        source: the base model, or base and adapters in one checkpoint.
        adapter: the adapters, if they are a separate checkpoint, such as a PEFT folder.
        alpha: alpha of the training, by default from the adapter's config; an error if it is
            missing, or if the config has other alphas for some modules.
        adapter_rank: refuse adapters of another rank.
        scaling: alpha / rank itself, for all adapters.
        fan_in_fan_out: whether square weights are (in, out); the shape of others decides.
        unmerge: subtract, to restore the base of a merged model up to rounding.
        reproducible: sum in one order on every machine, several times slower; otherwise the
            last bit of a weight may depend on the machine and on the sharding.
        src_strategy: strategy files of a source with rank files.
        suffix: which of several files a rank the source has.
        adapter_strategy: strategy files of adapters with rank files.
        adapter_names: the base's names of the adapter's tensors, where they are not found:
            ``{"model.language_model.{x*}": "language_model.model.{x*}"}``, the same as
            text (``"FROM=TO,FROM=TO"``), a mapping that only renames, or a TOML file of one.

    Raises:
        NotFoundError: no adapters, or a weight, half a pair or alpha is missing.
        LayoutError: shapes do not fit, or the adapter is more than a product.
        FormatError: a config that does not belong to the adapter.
    """
    base = opened(source, src_strategy=src_strategy, suffix=suffix)
    beside = None if adapter is None else opened(adapter, src_strategy=adapter_strategy)
    settings = find_settings((beside or base).root).with_given(
        alpha, adapter_rank, scaling, fan_in_fan_out
    )
    done = merged(
        base,
        settings,
        beside,
        sign=-1 if unmerge else 1,
        reproducible=reproducible,
        adapter_names=adapter_names,
    )
    if unmerge and done.replaced:
        raise LayoutError(
            f"unmerge= (--unmerge): the adapter replaced {format_list(done.replaced, 2)}, whose "
            "original values are lost. Use the base model."
        )
    return done.catalog


@takes_options(prepare, execute)
def merge_lora(
    source: Catalog | PathLike,
    destination: PathLike,
    to: str | PathLike | Strategy | Layout = "full",
    *,
    adapter: Catalog | PathLike | None = None,
    alpha: float | None = None,
    adapter_rank: int | None = None,
    scaling: float | None = None,
    fan_in_fan_out: bool | None = None,
    unmerge: bool = False,
    reproducible: bool = False,
    adapter_strategy: PathLike | None = None,
    adapter_names: AdapterNames | None = None,
    progress: bool | Callable[[int], Callable[[int], None]] | None = None,
    **options: Unpack[ConvertOptions],
) -> Report:
    """Write ``source`` with its adapters merged to ``destination`` in the layout ``to``.

    The arguments of the adapters are those of ``with_adapter``, all others those of ``convert``.
    Memory is bounded as in a conversion: the model may be larger.

    Raises:
        JaxshardError: as ``with_adapter`` and ``convert``, before a byte is written.
    """
    began = time.monotonic()
    result, run = split(options)
    catalog = with_adapter(
        source,
        adapter,
        alpha=alpha,
        adapter_rank=adapter_rank,
        scaling=scaling,
        fan_in_fan_out=fan_in_fan_out,
        unmerge=unmerge,
        reproducible=reproducible,
        src_strategy=result.pop("src_strategy", None),
        suffix=result.pop("suffix", None),
        adapter_strategy=adapter_strategy,
        adapter_names=adapter_names,
    )
    prepared = prepare(catalog, to, destination=destination, **result)
    with progress_of(progress, "merge_lora") as start:
        report = execute(prepared, destination, progress=start, **run)
    log_notes(str(destination), report.notes, prepared.plan.source.logged)
    log_done("merge_lora", destination, report.counts.bytes_written, time.monotonic() - began)
    return report
