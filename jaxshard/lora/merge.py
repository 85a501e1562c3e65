"""Merging: a catalog whose weights have their adapters added when read.

    W' = W + scaling · (B @ A)      in float32, rounded once to the dtype of W

Nothing is computed here. The result is an ordinary catalog: converting it writes the merged
model with a few blocks in memory, loading it adds the product to each shard on its way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..core.catalog import AddProduct, Affine, Catalog, File, StoredShard, Tensor
from ..core.numpy_dtypes import is_plain_float
from ..errors import LayoutError, NotFoundError
from ..formats.huggingface import NO_CONFIG
from ..mapping.tensors import cut, join, reshape, with_step
from ..storage.places import is_remote
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
_APART = "Save the base with a head of its own first (tie_word_embeddings false)"


def saved_beside(
    others: Mapping[str, Tensor],
    names: BaseNames,
    base: Catalog,
    settings: Settings,
    notes: list[str],
) -> dict[str, Tensor]:
    """``others`` by the names that ``base`` has for them.

    Raises:
        LayoutError: one has another shape than the base's, is nobody's, or would change a tied
            head.
    """
    found: dict[str, Tensor] = {}
    kept = names.known
    is_copied = settings.keeps_ties and any(map(_EMBEDDING.search, others))
    for name, tensor in others.items():
        own = names.find(name) or names.given(name)
        if is_copied and own not in kept and _HEAD.search(own):
            continue  # the embedding once more, which the tied head is
        if own in found:
            raise LayoutError(
                f"two sources for one target: {found[own].name} and {tensor.name} were both saved "
                f"for {own}. Leave one out of the adapter first (jaxshard convert --exclude REGEX)."
            )
        _check_replaced(tensor, kept.get(own))
        found[own] = tensor
    is_tied = has_tied_head(kept, base)
    for name in (n for n in found if n not in kept):
        if not (is_tied and _HEAD.search(name)):
            _check_new(name, settings, base)
        else:
            notes.append(
                f"{name} comes with the adapter, and the config of {base.root} says that it is "
                "tied to the embedding: set tie_word_embeddings to false there."
            )
    if is_tied and not any(map(_HEAD.search, found)) and not settings.keeps_ties:
        _check_embedding(found, base)
    return found


def has_tied_head(kept: Mapping[str, Tensor], base: Catalog) -> bool:
    """Whether the model has a head that is its embedding, and none of its own in ``kept``."""
    words = base.model.config.get("architectures")
    if not isinstance(words, list | tuple) or not any(_WITH_HEAD.search(str(w)) for w in words):
        return False
    return base.model.tied_embeddings and not any(map(_HEAD.search, kept))


def tied_to(
    name: str, names: BaseNames, base: Catalog, settings: Settings, notes: list[str]
) -> str | None:
    """The embedding that the adapted head ``name`` is, where the two are tied; else None.

    Raises:
        LayoutError: it would change the embedding, or the head would not be what was trained.
    """
    is_head, is_embedding = _HEAD.search(name), _EMBEDDING.search(name)
    if not (is_head or is_embedding) or not has_tied_head(base.tensors, base):
        return None
    if is_embedding:
        if not settings.keeps_ties:
            notes.append(f"{name} is the head too, which so changes with it, as when PEFT merges.")
        return None
    embeddings = [n for n in names.known if _EMBEDDING.search(n)]
    if not settings.keeps_ties or len(embeddings) != 1:
        raise LayoutError(
            f"{name} is adapted, and the head of {base.root} is tied to its embedding, which would "
            f"so change with it. {_APART}."
        )
    notes.append(
        f"{name} and {embeddings[0]} are one tensor with one adapter (ensure_weight_tying), which "
        "is added for each of the two, so twice, as when PEFT merges; the model that was trained "
        "has it once. For that, leave the head's out of the adapter first (jaxshard convert "
        'ADAPTER ONCE --exclude "lm_head").'
    )
    return embeddings[0]


def _check_embedding(found: Mapping[str, Tensor], base: Catalog) -> None:
    """Refuse a new embedding that the head would follow, though it was trained apart.

    The result would need both, and a config that no longer ties them.
    """
    for name, tensor in found.items():
        if _EMBEDDING.search(name) and ".base_layer." not in tensor.name:
            raise LayoutError(
                f"{name} was saved with the adapter (modules_to_save), and the head of {base.root} "
                f"is tied to it but was not trained with it. {_APART}, or merge with PEFT, which "
                "then does that."
            )


def _check_replaced(tensor: Tensor, before: Tensor | None) -> None:
    if before is not None and before.shape != tensor.shape:
        raise LayoutError(
            f"{tensor.name}: shape {tensor.shape} was saved with the adapter (modules_to_save), "
            f"and the base has {before.name} of shape {before.shape}. The adapter is of another "
            "model, or its embedding was resized: resize and save the base so first."
        )


def _check_new(name: str, settings: Settings, base: Catalog) -> None:
    modules = settings.saved_modules
    if modules is None or not settings.saved_ends.isdisjoint(name.split(".")):
        return
    raise LayoutError(
        f"{name} lies with the adapter, is no part of LoRA, and {base.root} has no such tensor; "
        f"modules_to_save in {settings.where} is {list(modules)}. The adapter is of another model "
        "or kind: merge it with the program that made it."
    )


# --- Merging: a catalog whose weights have their adapters added, block by block, when read


@dataclass(frozen=True)
class Merged:
    """A merged catalog, and what was done to it."""

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
    """``base`` with the adapters of ``adapter``, or with those among its own tensors, added.

    With ``sign`` -1 they are subtracted. ``reproducible`` is explained in ``views``,
    ``adapter_names`` in ``with_adapter``.

    Raises:
        NotFoundError: there are no adapters, a base weight or half a pair is missing, or alpha.
        LayoutError: shapes that do not fit, or a weight of a dtype that nothing is added to.
    """
    source = adapter if adapter is not None else base
    found = find_adapters(source.tensors, source.root)
    if not found.adapters:
        raise NotFoundError(
            f"{source.root} holds no adapters: no name of its {len(source.tensors)} tensors ends "
            "as lora_A.weight, lora_a, mindpet_delta_lora_a or lora_embedding_A do. "
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
        notes.append(f"The scaling of {unscaled} adapters is 0, so they change nothing.")
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
    """Refuse two pairs that different names of the adapter lead to one tensor of the base."""
    before = done.setdefault(part, pair.a.name)
    if before != pair.a.name and not settings.keeps_ties:
        raise LayoutError(
            f"two sources for one target: {before} and {pair.a.name} both adapt {part.name}. Leave "
            "one out of the adapter first (jaxshard convert --exclude REGEX)."
        )


def _where_adapters_are(base: Catalog, adapter: Catalog | None) -> str:
    """What to do where the adapters are not in ``adapter``, or not in ``base`` if that is None."""
    if adapter is None:
        return "Give their folder with adapter= (--adapter)."
    if any(map(is_adapter, base.tensors)):
        return f"{base.root} does: give the base model first, and the adapters as adapter=."
    return "Give the folder of the adapters, not of a model, with adapter= (--adapter)."


def _refuse_two(base: Catalog, adapter: Catalog) -> None:
    """Refuse to choose between adapters inside the base and those beside it."""
    own = [n for n in base.tensors if is_adapter(n)]
    raise LayoutError(
        f"{base.root} holds {len(own)} tensors of adapters itself ({own[0]} …), and {adapter.root} "
        "is given too. Merge its own first, without adapter=, or leave them out when converting it "
        '(exclude="lora", --exclude lora).'
    )


@dataclass(frozen=True)
class _MergeContext:
    """What is known while pairs are matched with the base's tensors."""

    names: BaseNames
    settings: Settings
    targets: Targets
    base: Catalog
    notes: list[str]


def _parameters(
    pairs: list[Adapter], context: _MergeContext
) -> list[tuple[Adapter, Parameter, bool]]:
    """What each of ``pairs``, which adapt one module, is added to, and whether transposed."""
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
            f"{pairs[-1].a.name} adapts a parameter of {module} other than its weight, and "
            f"{settings.where or 'no config'} does not name it in target_parameters. Put the "
            "adapter_config.json that PEFT saved with the adapter into its folder."
        )
    return [_of_module(pairs[0], context, is_parameter="weight" in targets, otherwise=named)]


def _of_module(
    pair: Adapter, context: _MergeContext, *, is_parameter: bool, otherwise: list[str]
) -> tuple[Adapter, Parameter, bool]:
    """The weight of the module that ``pair`` adapts, and whether the product is transposed."""
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
    """The product of a pair, or of each expert's share of it."""

    pair: Adapter
    scaling: float
    swapped: bool
    experts: int
    reproducible: bool

    def step(self, expert: int, row: int, at: tuple[Affine, Affine]) -> AddProduct:
        """What is added to a matrix whose first row is ``row`` of the product of ``expert``."""
        first, second = Affine(at[0].start + row, at[0].steps), at[1]
        rows, columns = (second, first) if self.swapped else (first, second)
        a, b = self.pair.a, self.pair.b
        if self.experts > 1:
            rank = self.pair.rank // self.experts
            a = cut(a, 0, expert * rank, (expert + 1) * rank)
        some = (expert, max(1, self.experts))
        return AddProduct(a, b, self.scaling, (rows, columns), some, self.reproducible)


def _added(weight: Tensor, part: ParameterPart, product: _Product) -> Tensor:
    """``weight`` with what ``part`` says of ``product`` added."""
    if not is_plain_float(weight.dtype):
        raise LayoutError(
            f"{weight.name} is {weight.dtype}; adapters are added to F16, BF16, F32 or F64. "
            'FP8 with factors gets its true values by converting with names="auto" (--names auto) '
            "first."
        )
    if len(weight.shape) == 2:
        return with_step(weight, partial(product.step, part.expert or 0, part.row))
    experts, *matrix = weight.shape
    each = [reshape(cut(weight, 0, e, e + 1), tuple(matrix)) for e in range(experts)]
    added = [with_step(m, partial(product.step, e, part.row)) for e, m in enumerate(each)]
    return join([reshape(m, (1, *matrix)) for m in added], 0, weight.name)


def _is_swapped(weight: Tensor, pair: Adapter, settings: Settings, notes: list[str]) -> bool:
    """Whether the weight is (in, out), so that the product is added transposed."""
    plain = (pair.b.shape[0], pair.a.shape[1])
    fits = [weight.shape == plain, weight.shape == plain[::-1]]
    made = plain[::-1] if pair.is_embedding else plain
    if not any(fits) or (pair.is_embedding and not fits[1]):
        raise LayoutError(
            f"{weight.name}: shape {weight.shape} does not fit B @ A, which is {made[0]} x "
            f"{made[1]} ({pair.b.name} {pair.b.shape}, {pair.a.name} {pair.a.shape}). The adapter "
            "is of another model, or lies in parts: give its strategy files."
        )
    if pair.is_embedding:
        return True
    if all(fits):
        if settings.fan_in_fan_out is None:
            notes.append(
                "Square weights are taken as (out, in); give fan_in_fan_out=True "
                "(--fan-in-fan-out) if they are stored as (in, out)."
            )
        return bool(settings.fan_in_fan_out)
    return fits[1]


def _with_files(base: Catalog, adapter: Catalog | None) -> tuple[tuple[File, ...], int]:
    """The files of both, and how much later the adapter's are numbered."""
    if adapter is None:
        return base.files, 0
    root = adapter.root if is_remote(adapter.root) else os.path.abspath(adapter.root)
    more = tuple(replace(f, path=os.path.join(root, f.path)) for f in adapter.files)
    return (*base.files, *more), len(base.files)


def _shifted(tensor: Tensor, by: int) -> Tensor:
    def piece(p: StoredShard) -> StoredShard:
        if p.view is not None and (p.view.operands or p.file < 0):
            raise LayoutError(f"{tensor.name}: an adapter is merged as it is stored, not mapped.")
        return replace(p, file=p.file + by)

    return replace(tensor, shards=tuple(map(piece, tensor.shards))) if by else tensor


def _notes(dropped: int, settings: Settings) -> list[str]:
    told = settings.where and not settings.given
    notes = [f"Alpha is as {settings.where} says."] if told else []
    if dropped:
        notes.append(f"{dropped} optimizer states of adapters are left out.")
    return notes
