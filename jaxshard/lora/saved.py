"""Saved: the tensors that lie with an adapter, are no pair, and take the place of the base's.

    modules_to_save         trained whole; a new head of a classifier among them
    X.base_layer.weight     PEFT's copy of the base's, of embeddings that are adapted

What is none of these is another kind of adapter, and is refused. So is what would change a
head that is tied to an embedding, where training did not. Names and shapes decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..catalog import Catalog, Tensor
from ..errors import LayoutError
from .base_names import BaseNames
from .settings import Settings

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
