"""Tables: the mappings between the forms in which a known model's weights are kept.

    table("llama-hf", "llama-mindformers", model)       and back, and between any two forms

Every form is described by what Hugging Face's own becomes; others are composed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import partial

from ...catalog import Catalog
from ...dtypes import BY_NUMPY
from ...errors import JaxshardError, LayoutError, NotFoundError, nearest, some
from ...rules import ModelFacts, weight_name
from ..joins import Dequantize
from ..mapping import Mapping
from ..ops import Drop, Expect, is_about
from ..text import read_mapping
from .families import FAMILIES, Facts, facts_of
from .jaxes import linen, linen_scan, maxtext, nnx, nnx_scan, tunix
from .mindspore import mcore, mindformers

__all__ = ["FORMS", "dequantized", "find_mapping", "form_of", "table", "true_config"]

CONFIG = "config.json"


def _hf(facts: Facts) -> Mapping:
    family = facts.family
    return Mapping((Drop(family.buffers, rebuilt=True), Expect(family.names, f"{family.name}-hf")))


#: What becomes of Hugging Face's form, by the name of the form.
FORMS: dict[str, Callable[[Facts], Mapping]] = {
    "hf": _hf,
    "mindformers": mindformers,
    "mindformers-concat": partial(mindformers, concat=True),
    "mcore": mcore,
    "mcore-fused": partial(mcore, fused=True),
    "mcore-fused-blocks": partial(mcore, fused=True, interleaved=False),
    "nnx": nnx,
    "nnx-scan": nnx_scan,
    "linen": linen,
    "linen-scan": linen_scan,
    "maxtext": maxtext,
    "tunix": tunix,
}


def table(source: str, target: str, model: ModelFacts | None = None) -> Mapping:
    """The mapping from one form to another: ``FAMILY-FORM``, or ``FORM`` of ``model``'s family.

    Raises:
        NotFoundError: no such form or family, or ``config.json`` lacks a number.
        LayoutError: two families, or a family that does not have the form.

    >>> class model: type, config = "llama", {}
    >>> print(table("hf", "mindformers", model).ops[2].rules[0][1])
    model.tok_embeddings.embedding_weight
    """
    (family, a), (other, b) = _parsed(source), _parsed(target)
    if family and other and FAMILIES[family] != FAMILIES[other]:
        raise LayoutError(f"{source}:{target} are two families; a table is about one.")
    return _between(facts_of(model, family or other), a, b)


def find_mapping(names: Mapping | str | os.PathLike[str], catalog: Catalog) -> Mapping:
    """The mapping that a person means by ``names``, for the tensors of ``catalog``.

    ``"llama-hf:llama-mindformers"`` is a table; ``"auto:mindformers"`` finds the family in
    ``config.json`` and the form in the names; ``"auto"`` goes to Hugging Face's form; the
    path of a TOML file is a mapping of one's own.

    Raises:
        NotFoundError: none of these.
        LayoutError: as ``table`` and ``read_mapping``.
    """
    if isinstance(names, Mapping):
        return names
    text = os.fspath(names)
    if os.path.isfile(text):
        with open(text, encoding="utf-8") as file:
            return read_mapping(file.read(), text)
    true = dequantized(catalog)
    if true is not None:
        plain = true.apply(catalog)
        return Mapping((*true.ops, *_find_table(text, plain).ops))
    return _find_table(text, catalog)


def dequantized(catalog: Catalog) -> Mapping | None:
    """The mapping that gives blockwise FP8 weights their true values; None if there are none.

    Their dtype is what ``config.json`` says the model computes with, or BF16.
    """
    if not any(n.endswith(".weight_scale_inv") for n in catalog.tensors):
        return None
    config = catalog.model.config
    quantization = config.get("quantization_config") or {}
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    word = config.get("dtype") or config.get("torch_dtype")
    kind = BY_NUMPY.get(word) if isinstance(word, str) else None
    dtype = kind.name if kind else "BF16"
    return Mapping((Dequantize(block=(int(rows), int(columns)), dtype=dtype),))


def true_config(mapped: Catalog) -> dict[str, bytes]:
    """``config.json`` for tensors that are no longer quantized, if it says that they are."""
    before = mapped.origin.catalog if mapped.origin else mapped
    if CONFIG not in mapped.extras or "quantization_config" not in before.model.config:
        return {}
    if dequantized(before) is None or dequantized(mapped) is not None:
        return {}
    left = {k: v for k, v in before.model.config.items() if k != "quantization_config"}
    return {CONFIG: json.dumps(left, indent=2).encode()}


def _find_table(text: str, catalog: Catalog) -> Mapping:
    source, _, target = text.partition(":")
    if source == "auto":
        facts, form = form_of(catalog.tensors, catalog.model, hyper=catalog.hyper)
        return _between(facts, form, _parsed(target or "hf")[1])
    if not target:
        raise NotFoundError(
            f"names={text!r} is neither a file nor a table; write FROM:TO, such as "
            f"llama-hf:llama-mindformers. Forms are {', '.join(FORMS)}."
        )
    prefixed = _is_prefixed(catalog.tensors)
    (family, a), (other, b) = _parsed(source), _parsed(target)
    if family and other and FAMILIES[family] != FAMILIES[other]:
        raise LayoutError(f"{text} are two families; a table is about one.")
    return _between(facts_of(catalog.model, family or other, prefixed), a, b)


def form_of(
    names: Iterable[str],
    model: ModelFacts,
    family: str | None = None,
    hyper: frozenset[str] = frozenset(),
) -> tuple[Facts, str]:
    """The family's facts and the form that ``names`` are of.

    Raises:
        NotFoundError: of none that is known.
    """
    weights = [weight_name(n) for n in names if n not in hyper]
    facts = facts_of(model, family, _is_prefixed(weights))
    for form, make in FORMS.items():
        try:
            ops = make(facts).ops
        except JaxshardError:
            continue  # a form that this family does not have
        last = next((op for op in reversed(ops) if isinstance(op, Expect)), None)
        if last is not None and all(
            is_about((*last.names, *facts.family.buffers), n) for n in weights
        ):
            return facts, form
    raise NotFoundError(
        f"the names are of no form of {facts.family.name} that is known ({some(weights, 3)}); "
        f"forms are {', '.join(FORMS)}. Say it: FROM:TO."
    )


def _between(facts: Facts, source: str, target: str) -> Mapping:
    there, back = FORMS[target](facts), FORMS[source](facts).inverse()
    ops = there.ops if source == "hf" else back.ops if target == "hf" else (*back.ops, *there.ops)
    return Mapping(ops, f"{facts.family.name}-{source}:{facts.family.name}-{target}")


def _parsed(text: str) -> tuple[str | None, str]:
    """The family, if it is said, and the form."""
    if text in FORMS:
        return None, text
    for family in sorted(FAMILIES, key=len, reverse=True):
        form = text.removeprefix(family + "-")
        if form != text and form in FORMS:
            return family, form
    every = [*FORMS, *(f"{family}-{form}" for family in FAMILIES for form in FORMS)]
    raise NotFoundError(
        f"there is no table {text!r}.{nearest(text, every)} Write FAMILY-FORM; families are "
        f"{', '.join(FAMILIES)}, forms {', '.join(FORMS)}."
    )


def _is_prefixed(names: Iterable[str]) -> bool:
    """Whether gpt2's and bert's names have the prefix that a model with a head has."""
    return any("transformer." in n or "bert." in n for n in names)
