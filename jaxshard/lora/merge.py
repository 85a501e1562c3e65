"""Merging: a catalog whose weights have their adapters added on reading.

    W' = W + scaling · (B @ A)      in float32, rounded once to the dtype of W

Nothing is computed here. The result is an ordinary catalog: a conversion writes the merged
model with a few blocks in memory, and a load adds the product to each shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..core.catalog import AddProduct, Catalog, File, IndexMap, StoredShard, Tensor
from ..core.numpy_dtypes import is_plain_float
from ..errors import LayoutError, NotFoundError
from ..formats.huggingface import NO_CONFIG
from ..mapping.tensors import cut, join, reshape, with_step
from ..storage.remote import is_remote
from .adapters import OWN_CONFIG, PEFT_CONFIG, Adapter, Settings, find_adapters, is_adapter
from .base_weights import (
    AdapterNames,
    BaseNames,
    Parameter,
    ParameterPart,
    Targets,
    assigned,
    find_parameter,
    grouped,
    renaming,
    spellings,
)

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_WITH_HEAD = re.compile("CausalLM|LMHead|ConditionalGeneration")
_UNTIE = "Save the base with a head of its own first (tie_word_embeddings false)"


def saved_beside(
    others: Mapping[str, Tensor],
    names: BaseNames,
    base: Catalog,
    settings: Settings,
    notes: list[str],
) -> dict[str, Tensor]:
    """Rename ``others``, the tensors saved with the adapter, to the names of ``base``.

    Raises:
        LayoutError: a different shape, an unknown tensor, or a change of a tied head.
    """
    found: dict[str, Tensor] = {}
    kept = names.known
    is_copied = settings.keeps_ties and any(map(_EMBEDDING.search, others))
    for name, tensor in others.items():
        own = names.find(name) or names.given(name)
        if is_copied and own not in kept and _HEAD.search(own):
            continue  # a copy of the embedding, to which the head is tied
        if own in found:
            raise LayoutError(
                f"two sources for one target: {found[own].name} and {tensor.name} were both saved "
                f"for {own}. Remove one from the adapter first (jaxshard convert --exclude REGEX)."
            )
        _check_replaced(tensor, kept.get(own))
        found[own] = tensor
    is_tied = has_tied_head(kept, base)
    for name in (n for n in found if n not in kept):
        if not (is_tied and _HEAD.search(name)):
            _check_new(name, settings, base)
        else:
            notes.append(
                f"{name} is stored with the adapter, but the config of {base.root} ties it to the "
                "embedding: set tie_word_embeddings to false there."
            )
    if is_tied and not any(map(_HEAD.search, found)) and not settings.keeps_ties:
        _check_embedding(found, base)
    return found


def has_tied_head(kept: Mapping[str, Tensor], base: Catalog) -> bool:
    """Return whether the model's head is tied to its embedding and not in ``kept``."""
    words = base.model.config.get("architectures")
    if not isinstance(words, list | tuple) or not any(_WITH_HEAD.search(str(w)) for w in words):
        return False
    return base.model.tied_embeddings and not any(map(_HEAD.search, kept))


def tied_to(
    name: str, names: BaseNames, base: Catalog, settings: Settings, notes: list[str]
) -> str | None:
    """Return the embedding to which the adapted head ``name`` is tied, or None.

    Raises:
        LayoutError: the merge would change the embedding, or differ from the trained head.
    """
    is_head, is_embedding = _HEAD.search(name), _EMBEDDING.search(name)
    if not (is_head or is_embedding) or not has_tied_head(base.tensors, base):
        return None
    if is_embedding:
        if not settings.keeps_ties:
            notes.append(f"{name} is also the head, which changes with it, as in PEFT.")
        return None
    embeddings = [n for n in names.known if _EMBEDDING.search(n)]
    if not settings.keeps_ties or len(embeddings) != 1:
        raise LayoutError(
            f"{name} is adapted, but the head of {base.root} is tied to its embedding, which would "
            f"change with it. {_UNTIE}."
        )
    notes.append(
        f"{name} and {embeddings[0]} are one tensor with one adapter (ensure_weight_tying), which "
        "is added twice, once for each, as in PEFT; the trained model has it once. For that, "
        "remove "
        "the head's from the adapter first (jaxshard convert ADAPTER ONCE --exclude "
        '"lm_head").'
    )
    return embeddings[0]


def _check_embedding(found: Mapping[str, Tensor], base: Catalog) -> None:
    """Refuse a new embedding that would change a tied head that was trained without it.

    The result would need both, and a config that does not tie them.
    """
    for name, tensor in found.items():
        if _EMBEDDING.search(name) and ".base_layer." not in tensor.name:
            raise LayoutError(
                f"{name} was saved with the adapter (modules_to_save), but the head of "
                f"{base.root}, "
                f"which is tied to it, was not trained with it. {_UNTIE}, or merge with PEFT, "
                "which does that."
            )


def _check_replaced(tensor: Tensor, before: Tensor | None) -> None:
    if before is not None and before.shape != tensor.shape:
        raise LayoutError(
            f"{tensor.name}: shape {tensor.shape} was saved with the adapter (modules_to_save), "
            f"but {before.name} of the base has shape {before.shape}. Use the base model of the "
            "training; if its embedding was resized, resize and save the base first."
        )


def _check_new(name: str, settings: Settings, base: Catalog) -> None:
    modules = settings.saved_modules
    if modules is None or not settings.saved_ends.isdisjoint(name.split(".")):
        return
    raise LayoutError(
        f"{name} is stored with the adapter but is not part of LoRA, and {base.root} has no such "
        f"tensor; modules_to_save in {settings.where} is {list(modules)}. Merge the adapter with "
        "the "
        "program that made it."
    )


# --- The merge


@dataclass(frozen=True)
class Merged:
    """A merged catalog, its number of adapters, and the replaced tensors."""

    catalog: Catalog
    num_adapters: int
    replaced: tuple[str, ...] = ()


def merged(
    base: Catalog,
    settings: Settings,
    adapter: Catalog | None = None,
    *,
    sign: int = 1,
    reproducible: bool = False,
    adapter_names: AdapterNames | None = None,
) -> Merged:
    """Return ``base`` with the adapters of ``adapter``, or its own, added.

    With ``sign`` -1 they are subtracted. ``reproducible`` and ``adapter_names`` are documented in
    ``with_adapter``.

    Raises:
        NotFoundError: no adapters, or a base weight, half a pair or alpha is missing.
        LayoutError: shapes do not fit, or a weight's dtype is not supported.
    """
    source = adapter if adapter is not None else base
    found = find_adapters(source.tensors, source.root)
    if not found.adapters:
        raise NotFoundError(
            f"{source.root} has no adapters: none of its {len(source.tensors)} names ends in "
            "lora_A.weight, lora_a, mindpet_delta_lora_a or lora_embedding_A. "
            + _where_adapters_are(base, adapter)
        )
    kept = {n: t for n, t in base.tensors.items() if not is_adapter(n)}
    if adapter is not None and len(kept) < len(base.tensors):
        _refuse_two(base, adapter)
    files, shift = _with_files(base, adapter)
    notes: list[str] = []
    replaced: dict[str, Tensor] = {}
    names = BaseNames(kept, base.root, renaming(adapter_names))
    if adapter is not None:
        others = {n: t for n, t in found.others.items() if n not in source.scalars}
        replaced = saved_beside(others, names, base, settings, notes)
        kept |= {n: _shifted(replace(t, name=n), shift) for n, t in replaced.items()}
    context = _MergeContext(names, settings, Targets(settings.target_parameters), base, notes)
    unscaled, done = 0, dict[ParameterPart, str]()
    for pairs in grouped(found.adapters):
        for pair, parameter, swapped in _parameters(pairs, context):
            moved = replace(pair, a=_shifted(pair.a, shift), b=_shifted(pair.b, shift))
            experts = max(1, parameter.experts)
            scaling = sign * settings.scaling_of(pair, parameter.name, experts)
            for part in parameter.parts:
                _refuse_twice(part, pair, done, settings)
                product = _Product(moved, scaling, swapped, parameter.experts, reproducible)
                kept[part.name] = _added(kept[part.name], part, product)
            unscaled += not scaling
    names.check_given()
    notes += names.notes()
    if unscaled:
        notes.append(f"The scaling of {unscaled} adapters is 0, so they have no effect.")
    its_notes = adapter.notes if adapter is not None else ()
    more = (n for n in its_notes if n != NO_CONFIG)  # an adapter's folder has its own config
    catalog = replace(
        base,
        tensors=kept,
        files=files,
        extras=tuple(e for e in base.extras if Path(e).name not in (PEFT_CONFIG, OWN_CONFIG)),
        notes=(*base.notes, *more, *_notes(found.dropped, settings), *dict.fromkeys(notes)),
        logged=base.logged if adapter is None else base.logged | adapter.logged,
        has_merged_adapters=True,
    )
    return Merged(catalog, len(found.adapters), tuple(sorted(replaced)))


def _refuse_twice(
    part: ParameterPart, pair: Adapter, done: dict[ParameterPart, str], settings: Settings
) -> None:
    """Refuse two pairs with different names that adapt one tensor of the base."""
    before = done.setdefault(part, pair.a.name)
    if before != pair.a.name and not settings.keeps_ties:
        raise LayoutError(
            f"two sources for one target: {before} and {pair.a.name} both adapt {part.name}. "
            "Remove "
            "one from the adapter first (jaxshard convert --exclude REGEX)."
        )


def _where_adapters_are(base: Catalog, adapter: Catalog | None) -> str:
    """Return the remedy if ``adapter``, or ``base`` without one, has no adapters."""
    if adapter is None:
        return "Pass their folder as adapter= (--adapter)."
    if any(map(is_adapter, base.tensors)):
        return f"{base.root} has some: pass the base model first, and the adapters as adapter=."
    return "Pass the folder of the adapters, not of a model, as adapter= (--adapter)."


def _refuse_two(base: Catalog, adapter: Catalog) -> None:
    """Refuse to choose between adapters inside the base and separate ones."""
    own = [n for n in base.tensors if is_adapter(n)]
    raise LayoutError(
        f"{base.root} has {len(own)} tensors of adapters itself ({own[0]} …), but {adapter.root} "
        "was passed too. Merge its own first, without adapter=, or remove them in a conversion "
        '(exclude="lora", --exclude lora).'
    )


@dataclass(frozen=True)
class _MergeContext:
    """The inputs of matching pairs with the base's tensors."""

    names: BaseNames
    settings: Settings
    targets: Targets
    base: Catalog
    notes: list[str]


def _parameters(
    pairs: list[Adapter], context: _MergeContext
) -> list[tuple[Adapter, Parameter, bool]]:
    """Return the parameter of each of ``pairs`` of one module, and whether it is transposed."""
    settings, module = context.settings, pairs[0].module
    targets = context.targets.of(module)
    named = [f"{module}.{target}" for target in targets if target != "weight"]
    found = [p for name in named if (p := find_parameter(name, context.names)) is not None]
    if found:
        given = settings.fan_in_fan_out if settings.fan_is_given else None
        return [
            (pair, to, to.is_swapped(pair, given, context.base.model, context.notes))
            for pair, to in assigned(pairs, found)
        ]
    if len(pairs) > 1 or pairs[0].depth:
        if named:
            raise context.names.missing(pairs[0].a.name, spellings(named[0]))
        raise LayoutError(
            f"{pairs[-1].a.name} adapts a parameter of {module} other than its weight, but "
            f"{settings.where or 'no config'} does not list it in target_parameters. Put the "
            "adapter_config.json of PEFT into the adapter's folder."
        )
    return [_of_module(pairs[0], context, is_parameter="weight" in targets, otherwise=named)]


def _of_module(
    pair: Adapter, context: _MergeContext, *, is_parameter: bool, otherwise: list[str]
) -> tuple[Adapter, Parameter, bool]:
    """Return the weight of the module of ``pair``, and whether the product is transposed."""
    names = context.names
    name = tied_to(pair.weight, names, context.base, context.settings, context.notes) or names.find(
        pair.weight
    )
    if name is None:
        tried = [pair.weight, *(s for n in otherwise for s in spellings(n))]
        raise names.missing(pair.a.name, tried)
    swapped = _is_swapped(names.known[name], pair, context.settings, context.notes)
    rows, columns = names.known[name].shape
    known_as = pair.weight if is_parameter else pair.module
    return pair, Parameter(known_as, (rows, columns), 0, (ParameterPart(name, None),)), swapped


@dataclass(frozen=True)
class _Product:
    """The product of a pair, or of each expert's part of it."""

    pair: Adapter
    scaling: float
    swapped: bool
    experts: int
    reproducible: bool

    def step(self, expert: int, row: int, at: tuple[IndexMap, IndexMap]) -> AddProduct:
        """Return the step for a matrix whose first row is ``row`` of the product of ``expert``."""
        first, second = IndexMap(at[0].start + row, at[0].steps), at[1]
        rows, columns = (second, first) if self.swapped else (first, second)
        a, b = self.pair.a, self.pair.b
        if self.experts > 1:
            rank = self.pair.rank // self.experts
            a = cut(a, 0, expert * rank, (expert + 1) * rank)
        some = (expert, max(1, self.experts))
        return AddProduct(a, b, self.scaling, (rows, columns), some, self.reproducible)


def _added(weight: Tensor, part: ParameterPart, product: _Product) -> Tensor:
    """Return ``weight`` with the ``part`` of ``product`` added."""
    if not is_plain_float(weight.dtype):
        raise LayoutError(
            f"{weight.name} is {weight.dtype}; adapters can be added to F16, BF16, F32 or F64. "
            'Dequantize FP8 first by converting with names="auto" (--names auto).'
        )
    if len(weight.shape) == 2:
        return with_step(weight, partial(product.step, part.expert or 0, part.row))
    experts, *matrix = weight.shape
    each = [reshape(cut(weight, 0, e, e + 1), tuple(matrix)) for e in range(experts)]
    added = [with_step(m, partial(product.step, e, part.row)) for e, m in enumerate(each)]
    return join([reshape(m, (1, *matrix)) for m in added], 0, weight.name)


def _is_swapped(weight: Tensor, pair: Adapter, settings: Settings, notes: list[str]) -> bool:
    """Return whether the weight is (in, out), so that the product is added transposed."""
    plain = (pair.b.shape[0], pair.a.shape[1])
    fits = [weight.shape == plain, weight.shape == plain[::-1]]
    made = plain[::-1] if pair.is_embedding else plain
    if not any(fits) or (pair.is_embedding and not fits[1]):
        raise LayoutError(
            f"{weight.name}: shape {weight.shape} does not fit B @ A, which is {made[0]} x "
            f"{made[1]} ({pair.b.name} {pair.b.shape}, {pair.a.name} {pair.a.shape}). The adapter "
            "belongs to another model, or is split into ranks: pass its strategy files."
        )
    if pair.is_embedding:
        return True
    if all(fits):
        if settings.fan_in_fan_out is None:
            notes.append(
                "Square weights are read as (out, in); pass fan_in_fan_out=True "
                "(--fan-in-fan-out) if they are stored as (in, out)."
            )
        return bool(settings.fan_in_fan_out)
    return fits[1]


def _with_files(base: Catalog, adapter: Catalog | None) -> tuple[tuple[File, ...], int]:
    """Return the files of both, and the offset of the adapter's file indices."""
    if adapter is None:
        return base.files, 0
    root = adapter.root if is_remote(adapter.root) else os.path.abspath(adapter.root)
    more = tuple(replace(f, path=os.path.join(root, f.path)) for f in adapter.files)
    return (*base.files, *more), len(base.files)


def _shifted(tensor: Tensor, by: int) -> Tensor:
    def piece(p: StoredShard) -> StoredShard:
        if p.view is not None and (p.view.operands or p.file < 0):
            raise LayoutError(
                f"{tensor.name}: a mapped adapter cannot be merged. Pass it as it is stored."
            )
        return replace(p, file=p.file + by)

    return replace(tensor, shards=tuple(map(piece, tensor.shards))) if by else tensor


def _notes(dropped: int, settings: Settings) -> list[str]:
    from_config = settings.where and not settings.given
    notes = [f"Alpha comes from {settings.where}."] if from_config else []
    if dropped:
        notes.append(f"{dropped} optimizer states of adapters are dropped.")
    return notes
