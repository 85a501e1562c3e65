"""Tables: mappings between the forms of a known model's weights.

    table("llama-hf", "llama-mindformers", model)       any two forms, in both directions

Each form is defined by a mapping from Hugging Face's form; other pairs are composed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial

from ...core.catalog import Catalog
from ...core.patterns import Patterns, placeholders, template
from ...errors import (
    LayoutError,
    NotFoundError,
    StorageError,
    did_you_mean,
    format_list,
)
from ...rules import ModelFacts, weight_name
from ...rules.match import TEXT_MODEL, text_root, towers
from ..mapping import Mapping, read_mapping
from ..ops import Drop, Expect, Rename
from ..quantization import dequantized
from .forms import linen, linen_scan, maxtext, mcore, mindformers, nnx, nnx_scan, tunix
from .hf_weights import FAMILIES, Facts, facts_of

__all__ = ["FORMS", "find_mapping", "form_of", "table"]

_MAX_BYTES = 16_000_000  # of a mapping in TOML


def _hf(facts: Facts) -> Mapping:
    family = facts.family
    return Mapping((Drop(family.buffers, rebuilt=True), Expect(family.names, f"{family.name}-hf")))


#: The mapping from Hugging Face's form, by the name of the form.
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

#: Forms with equal names.
_TWINS = ("mcore-fused", "mcore-fused-blocks")


def table(source: str, target: str, model: ModelFacts | None = None) -> Mapping:
    """Return the mapping between two forms: ``FAMILY-FORM``, or ``FORM`` of ``model``'s family.

    Raises:
        NotFoundError: no such form or family, or ``config.json`` lacks a number.
        LayoutError: different families, or a family without that form.

    >>> class model: type, config = "llama", {}
    >>> print(table("hf", "mindformers", model).ops[2].rules[0][1])
    model.tok_embeddings.embedding_weight
    """
    family, a, b = _parsed_pair(source, target)
    return _between(facts_of(model, family), a, b)


def find_mapping(
    names: Mapping | str | os.PathLike[str], catalog: Catalog, dtype: str | None = None
) -> Mapping:
    """Return the mapping that ``names`` specifies for the tensors of ``catalog``.

    ``"llama-hf:llama-mindformers"`` is a table; ``"auto:mindformers"`` finds the family in
    ``config.json`` and the form in the names; ``"auto"`` maps to Hugging Face's form; the path
    of a TOML file is a user's own mapping. Quantized weights are dequantized first, to ``dtype``
    (the NumPy name of a float), or as documented in ``dequantized``.

    Raises:
        NotFoundError: no such table or file.
        LayoutError: as ``table`` and ``read_mapping``.
    """
    if isinstance(names, Mapping):
        return names
    text = os.fspath(names)
    if os.path.isfile(text):
        return read_mapping(_text_of(text), text)
    true = dequantized(catalog, dtype)
    if true is not None:
        plain = true.apply(catalog)
        if text == "auto" and not _has_tables(catalog.model):
            return true
        return Mapping((*true.ops, *_find_table(text, plain).ops))
    return _find_table(text, catalog)


def _has_tables(model: ModelFacts) -> bool:
    try:
        return bool(facts_of(model, None))
    except NotFoundError:
        return False


def _text_of(path: str) -> str:
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise LayoutError(
                f"names={path}: the file exceeds {_MAX_BYTES} bytes. Pass a TOML file, or a table."
            )
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise LayoutError(
            f"names={path}: the file is not text. Pass a mapping in TOML, or a table such as "
            "llama-hf:llama-mindformers."
        ) from None
    except OSError as error:
        raise StorageError(f"names={path} cannot be read: {error.strerror}.") from error


def _find_table(text: str, catalog: Catalog) -> Mapping:
    source, _, target = text.partition(":")
    if source == "auto" or (target and _parsed(source)[1] == "hf"):
        alone = _text_alone(catalog)
        if alone is not None:
            plain = alone.apply(catalog)
            return Mapping((*alone.ops, *_find_table(text, plain).ops))
    if source == "auto":
        facts, form = form_of(catalog.tensors, catalog.model, scalars=catalog.scalars)
        _refuse_twins(facts, form, catalog)
        return _between(facts, form, _parsed(target or "hf")[1])
    if not target:
        raise NotFoundError(
            f"names={text!r} is neither a file nor a table. Write FROM:TO, such as "
            f"llama-hf:llama-mindformers (forms: {', '.join(FORMS)})."
        )
    prefixed = _is_prefixed(catalog.tensors)
    family, a, b = _parsed_pair(source, target)
    return _between(facts_of(catalog.model, family, prefixed), a, b)


def _text_alone(catalog: Catalog) -> Mapping | None:
    """Return the mapping of a multimodal model's text part to plain names, or None if plain.

    Raises:
        LayoutError: tensors of other modalities exist.
    """
    config = catalog.model.config
    names = [weight_name(n) for n in catalog.tensors if n not in catalog.scalars]
    apart, root = towers(names, config), text_root(names)
    if apart and root is not None:
        patterns = Patterns(apart)
        count = sum(patterns.find(n, template(n)) is not None for n in names)
        raise LayoutError(
            f"{count} of {len(names)} tensors are not of the text model ({format_list(apart)}), "
            "but "
            "tables are for text models. Leave them out: exclude=, --exclude "
            f"'^({'|'.join(p.removesuffix('*').replace('.', '[.]') for p in apart)})'."
        )
    if root is None or not TEXT_MODEL.search(root):
        return None
    heads = {n.rpartition("lm_head.")[0] for n in names if "lm_head." in n}
    rules = [(f"{head}lm_head.{{x*}}", "lm_head.{x*}") for head in sorted(heads) if head]
    return Mapping((Rename((*rules, (f"{root}{{x*}}", "model.{x*}"))),))


def form_of(
    names: Iterable[str],
    model: ModelFacts,
    family: str | None = None,
    scalars: frozenset[str] = frozenset(),
) -> tuple[Facts, str]:
    """Return the family's facts and the form of ``names``.

    Raises:
        NotFoundError: no known form.
    """
    weights = [weight_name(n) for n in names if n not in scalars]
    facts = facts_of(model, family, _is_prefixed(weights))
    unknown: dict[str, list[str]] = {}
    for form, make in FORMS.items():
        try:
            ops = make(facts).ops
        except (LayoutError, NotFoundError):
            continue  # this family does not have the form
        last = next((op for op in reversed(ops) if isinstance(op, Expect)), None)
        if last is not None:
            patterns = Patterns((*last.names, *facts.family.buffers), placeholders)
            unknown[form] = [n for n in weights if patterns.find(n) is None]
            if not unknown[form]:
                return facts, form
    near = min(unknown, key=lambda form: len(unknown[form]), default="hf")  # the first of equals
    strange = unknown.get(near, weights)
    if len(strange) == len(weights):
        raise NotFoundError(
            f"the names match no known form of {facts.family.name} ({format_list(weights, 3)}; "
            f"forms: {', '.join(FORMS)}). Specify FROM:TO."
        )
    raise NotFoundError(
        f"{facts.family.name}-{near} has no rule for {len(strange)} of {len(weights)} names: "
        f"{format_list(strange)}. Leave them out (exclude=, --exclude), or specify the form "
        f"(FROM:TO; forms: {', '.join(FORMS)})."
    )


def _refuse_twins(facts: Facts, form: str, catalog: Catalog) -> None:
    """Refuse to choose between forms with equal names and different row orders.

    Raises:
        LayoutError: always for such forms.
    """
    fused = [n for n in catalog.tensors if n.endswith(".linear_fc1.weight")]
    if form in _TWINS and fused:
        family = facts.family.name
        raise LayoutError(
            f"the names match {' and '.join(_TWINS)}, which differ in the order of gate and up in "
            f"{fused[0]}: alternating rows, or one after the other. Specify "
            + ", or ".join(f"{family}-{twin}:{family}-hf" for twin in _TWINS)
            + "."
        )


def _between(facts: Facts, source: str, target: str) -> Mapping:
    there, back = FORMS[target](facts), FORMS[source](facts).inverse()
    ops = there.ops if source == "hf" else back.ops if target == "hf" else (*back.ops, *there.ops)
    return Mapping(ops, f"{facts.family.name}-{source}:{facts.family.name}-{target}")


def _parsed_pair(source: str, target: str) -> tuple[str | None, str, str]:
    """Return the family, if stated, and both forms."""
    (family, a), (other, b) = _parsed(source), _parsed(target)
    if family and other and FAMILIES[family] != FAMILIES[other]:
        raise LayoutError(
            f"{source}:{target}: source and target must belong to the same model family."
        )
    return family or other, a, b


def _parsed(text: str) -> tuple[str | None, str]:
    """Return the family, if stated, and the form."""
    if text in FORMS:
        return None, text
    for family in sorted(FAMILIES, key=len, reverse=True):
        form = text.removeprefix(family + "-")
        if form != text and form in FORMS:
            return family, form
    every = [*FORMS, *(f"{family}-{form}" for family in FAMILIES for form in FORMS)]
    raise NotFoundError(
        f"no such table {text!r}.{did_you_mean(text, every)} Write FAMILY-FORM (families: "
        f"{', '.join(FAMILIES)}; forms: {', '.join(FORMS)})."
    )


def _is_prefixed(names: Iterable[str]) -> bool:
    """Return whether gpt2's or bert's names have the prefix of a model with a head."""
    return any("transformer." in n or "bert." in n for n in names)
