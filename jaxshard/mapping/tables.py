"""Mappings by name: between two forms of a model's weights, or of a user's own file.

"llama-hf:llama-mindformers"    FAMILY-FORM:FAMILY-FORM, or FORM:FORM of the family in config.json
"auto:nnx"                      from the form that the names are in
"my.toml"                       a mapping in TOML
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace

from ..core.catalog import Catalog, log_notes
from ..core.patterns import Patterns, template
from ..errors import LayoutError, NotFoundError, StorageError, format_list
from ..models import Family, Sizes, family_of, model_types
from ..models.facts import Config
from ..rules import ModelFacts, weight_name
from ..rules.match import TEXT_MODEL, text_root, towers
from .deriving import derive
from .mapping import Mapping, read_mapping
from .ops import Op, Pad, Rename
from .quantization import dequantized

__all__ = ["find_mapping", "form_of", "table"]

_MAX_BYTES = 16_000_000  # of a mapping in TOML
_PARAMS = "params."
_INNER = re.compile(r"^(params\.)*|\.value$")
_VOCABULARY = (("token",), ("vocab",))  # dims that MaxText makes longer, so that they divide

# The names of low-rank adapters in PEFT's files.
_PREFIX = "base_model.model."
_PEFT = re.compile(r"\.lora_[AB](?:\.default)?\.weight$")

Shapes = dict[str, tuple[int, ...]]


def table(source: str, target: str, model: ModelFacts | None = None) -> Mapping:
    """Return the mapping between two forms: ``FAMILY-FORM``, or ``FORM`` of ``model``'s family.

    Raises:
        NotFoundError: no such form or family, or ``config.json`` lacks a number.
        LayoutError: different families.

    >>> class model: type, config = "llama", {"num_attention_heads": 4}
    >>> print(table("hf", "mindformers", model).ops[2].rules[0][1])
    model.tok_embeddings.embedding_weight
    """
    kind, a, b = _parsed_pair(source, target)
    family, config = _family_of(model, kind)
    return derive(family, a, b, Sizes(family, config))


def find_mapping(
    names: Mapping | str | os.PathLike[str],
    catalog: Catalog,
    dtype: str | None = None,
    wanted: Shapes | None = None,
) -> Mapping:
    """Return the mapping that ``names`` specifies for the tensors of ``catalog``.

    ``"llama-hf:llama-mindformers"`` is derived from the family's table; ``"auto:mindformers"``
    finds the family in ``config.json`` and the form in the names; ``"auto"`` maps to Hugging
    Face's form; the path of a TOML file is a user's own mapping. Quantized weights are dequantized
    first, to ``dtype`` (the NumPy name of a float), or as documented in ``dequantized``. Where the
    shapes ``wanted`` of the target have a longer vocabulary, it is padded with zeros.

    Raises:
        NotFoundError: no such table or file.
        LayoutError: as ``table`` and ``read_mapping``, or a shape that contradicts the table.
    """
    if isinstance(names, Mapping):
        return names
    text = os.fspath(names)
    if os.path.isfile(text):
        return read_mapping(_text_of(text), text)
    true = dequantized(catalog, dtype)
    if true is not None:
        if text == "auto" and not _has_table(catalog.model):
            return true
        return _after(true, text, catalog, wanted or {})
    return _find_table(text, catalog, wanted or {})


def _has_table(model: ModelFacts) -> bool:
    try:
        return bool(_family_of(model, None))
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


def _find_table(text: str, catalog: Catalog, wanted: Shapes) -> Mapping:
    source, _, target = text.partition(":")
    if source != "auto" and not target:
        raise NotFoundError(
            f"names={text!r} is neither a file nor a table. Write FROM:TO, such as "
            "llama-hf:llama-mindformers (jaxshard models lists families and forms)."
        )
    is_auto = source == "auto"
    kind, a, b = (None, "", _parsed(target or "hf")[1]) if is_auto else _parsed_pair(source, target)
    if is_auto or a == "hf":
        for usual in (_text_alone(catalog), _adapters_as_in_files(catalog)):
            if usual is not None:
                return _after(usual, text, catalog, wanted)
    shapes = _weights(catalog)
    family, config = _family_of(catalog.model, kind, shapes)
    wrapped = _in_params(family, a, shapes)
    if wrapped is not None:
        return _after(wrapped, text, catalog, wanted)
    sizes = Sizes(family, config)
    if is_auto:
        form = _known_form(family, sizes, shapes)
        sizes = sizes.seeing(form, shapes)
        _refuse_twins(family, form, shapes, sizes)
        return _padded(family, form, b, sizes, wanted)
    longer = _paddings(family, a, sizes, shapes) if a != "hf" else ()
    if longer:
        note = f"the vocabulary is padded to {longer[0].to}; {longer[0].length} are taken."
        log_notes(catalog.root, (note,))
        shorter = Mapping(tuple(op.inverse() for op in longer))
        return _after(shorter, text, catalog, wanted)
    return _padded(family, a, b, sizes.seeing(a, shapes), wanted)


def _after(first: Mapping, text: str, catalog: Catalog, wanted: Shapes) -> Mapping:
    """Return ``first``, and then the table ``text`` of what it makes of ``catalog``."""
    return Mapping((*first.ops, *_find_table(text, first.apply(catalog), wanted).ops))


def _padded(family: Family, source: str, target: str, sizes: Sizes, wanted: Shapes) -> Mapping:
    """Return the mapping between two forms, with the target's vocabulary as long as wanted."""
    made = derive(family, source, target, sizes)
    has_params = any(r.name.startswith(_PARAMS) for r in family.forms[target].values())
    alike = {_PARAMS * has_params + _INNER.sub("", n): shape for n, shape in wanted.items()}
    ops = _paddings(family, target, sizes, alike)
    if not ops:
        return made
    note = f"the vocabulary of {ops[0].length} is padded with zeros to {ops[0].to}."
    log_notes(f"{family.name}-{target}", (note,))
    return replace(made, ops=(*made.ops, *ops))


def _paddings(family: Family, form: str, sizes: Sizes, shapes: Shapes) -> tuple[Pad, ...]:
    """Return the operations that make the vocabulary as long as in ``shapes``."""
    ops: list[Pad] = []
    for name, shape in shapes.items():
        weight = family.find(form, name)
        axes = family.forms[form][weight].axes.dims if weight else ()
        for i, (dim, n) in enumerate(zip(axes, shape, strict=False)):
            if dim.factors in _VOCABULARY and n > (length := sizes.length(dim) or n):
                ops.append(Pad((name,), i, length, n))
    return tuple(ops)


def _in_params(family: Family, form: str, shapes: Shapes) -> Mapping | None:
    """Return the mapping to names in as many ``params`` as the form's, or None if they are so.

    Without a ``form``, it is the one that the names have.

    ``params`` is Linen's collection of weights; a train state has it in a ``params`` of its own,
    and an NNX model has none.
    """
    now = next(k for k in (2, 1, 0) if any(n.startswith(k * _PARAMS) for n in shapes or ("",)))
    if not form:
        inner = [n.removeprefix(now * _PARAMS) for n in shapes]
        known = (k for k in (now, 0, 1) if not family.form_of(k * _PARAMS + n for n in inner)[1])
        wanted = next(known, now)
    else:
        wanted = int(any(r.name.startswith(_PARAMS) for r in family.form(form).values()))
    if wanted == now:
        return None
    return Mapping((Rename(((now * _PARAMS + "{x*}", wanted * _PARAMS + "{x*}"),)),))


def _weights(catalog: Catalog) -> Shapes:
    """Return the shape of each weight, without those of optimizer states and scalars."""
    return {
        n: t.shape
        for n, t in catalog.tensors.items()
        if n not in catalog.scalars and weight_name(n) == n
    }


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


def _adapters_as_in_files(catalog: Catalog) -> Mapping | None:
    """Return the mapping of PEFT's names in memory to those in its files, or None if they are."""
    known = [n for n in catalog.tensors if _PEFT.search(n)]
    ops: list[Op] = []
    if any(".default." in n for n in known):
        ops.append(Rename((("{x*}.lora_{half}.default.weight", "{x*}.lora_{half}.weight"),)))
    if known and not any(n.startswith(_PREFIX) for n in known):
        ops.append(Rename((("{x*}.lora_{half}.weight", _PREFIX + "{x*}.lora_{half}.weight"),)))
    return Mapping(tuple(ops)) if ops else None


def form_of(shapes: Shapes, model: ModelFacts, kind: str | None = None) -> tuple[Family, str]:
    """Return the family of a model, and the form of tensors with these names and shapes.

    Raises:
        NotFoundError: no known form.
    """
    family, config = _family_of(model, kind, shapes)
    return family, _known_form(family, Sizes(family, config), shapes)


def _known_form(family: Family, sizes: Sizes, shapes: Shapes) -> str:
    form, strange = sizes.form_of(shapes)
    if not strange:
        return form
    known = f"forms: {', '.join(family.listed)}"
    if len(strange) == len(shapes):
        raise NotFoundError(
            f"the names match no known form of {family.name} ({format_list(shapes, 3)}; {known}). "
            "Specify FROM:TO."
        )
    raise NotFoundError(
        f"{family.name}-{form} has no rule for {len(strange)} of {len(shapes)} names: "
        f"{format_list(strange)}. Leave them out (exclude=, --exclude), or specify the form "
        f"(FROM:TO; {known})."
    )


def _refuse_twins(family: Family, form: str, shapes: Shapes, sizes: Sizes) -> None:
    """Refuse to choose between forms with equal names and shapes and another order of elements.

    Raises:
        LayoutError: another form would do as well.
    """
    for twin, strange in family.left(shapes).items():
        if strange or twin == form:
            continue
        for name in shapes:
            rows = [family.forms[f][w] for f in (form, twin) if (w := family.find(f, name))]
            if len(rows) == 2 and (rows[0].axes, rows[0].steps) != (rows[1].axes, rows[1].steps):
                if tuple(map(sizes.length, rows[1].axes.dims)) != shapes[name]:
                    break
                raise LayoutError(
                    f"the names match {form} and {twin}, which differ in the order of {name}: "
                    f"{rows[0].axes}, or {rows[1].axes}. Specify {family.name}-{form}:… or "
                    f"{family.name}-{twin}:…"
                )


def _family_of(
    model: ModelFacts | None, kind: str | None, names: Iterable[str] = ()
) -> tuple[Family, Config]:
    """Return the family, and ``config.json``."""
    names, config = list(names), model.config if model else {}
    kind = kind or (model.type if model and model.type in model_types() else None)
    family = family_of(config, kind, names=(n for n in names if not _is_adapter(n)))
    return family.with_adapters() if any(map(_is_adapter, names)) else family, config


def _is_adapter(name: str) -> bool:
    return "lora_" in name


def _parsed_pair(source: str, target: str) -> tuple[str | None, str, str]:
    """Return the model type, if stated, and both forms."""
    (kind, a), (other, b) = _parsed(source), _parsed(target)
    if kind and other and kind != other:
        raise LayoutError(
            f"{source}:{target}: source and target must belong to the same model family."
        )
    return kind or other, a, b


def _parsed(text: str) -> tuple[str | None, str]:
    """Return the model type, if stated, and the form."""
    for kind in sorted(model_types(), key=len, reverse=True):
        if text.startswith(kind + "-"):
            return kind, text.removeprefix(kind + "-")
    return None, text
