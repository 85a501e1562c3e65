"""Model families: one table of weights with named axes for each.

Sharding rules, mappings between programs' names and shapes, and adapters are derived from the
tables (``tables/*.toml``). This package does not depend on any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..core.patterns import template
from ..errors import NotFoundError
from .facts import Config, text_config
from .family import Family, Form, Row, Sizes
from .reading import Table, build, find_roots, model_types, read_table, register, table_for

__all__ = [
    "Family",
    "Form",
    "Row",
    "Sizes",
    "family_of",
    "model_types",
    "read_family",
    "register_models",
]


def family_of(
    config: Config,
    kind: str | None = None,
    words: Mapping[str, str] | None = None,
    names: Iterable[str] = (),
) -> Family:
    """Return the family of a model.

    Args:
        config: ``config.json``.
        kind: the ``model_type``; by default that of ``config``, or of its text model.
        words: texts that replace those of the table's ``[words]``.
        names: of the tensors of the model, or of its text part, whose prefixes replace the
            table's (``language_model.model.``).

    Raises:
        NotFoundError: no table for the model.
    """
    stated = (config.get("model_type"), text_config(config).get("model_type"))
    kinds = [kind] if kind else [k for k in dict.fromkeys(stated) if isinstance(k, str)]
    for each in kinds:
        table = table_for(each)
        if table is not None:
            return _fitting(table, {"model_type": each, **config}, words or {}, names)
    raise NotFoundError(
        f"no table for model_type {' with '.join(map(repr, kinds)) or 'None'} (known: "
        f"{', '.join(model_types())}). Pass a table of the family in TOML."
    )


def _fitting(
    table: Table, config: Config, words: Mapping[str, str], names: Iterable[str]
) -> Family:
    """Return the family with the prefixes of ``names``, if no form with the usual ones fits."""
    usual = build(table, config, words)
    kinds = {template(name): name for name in names}.values()
    if not kinds or not (strange := _num_strange(usual, kinds)):
        return usual
    made = build(table, config, {**find_roots(table, config, kinds), **words})
    return made if _num_strange(made, kinds) < strange else usual


def _num_strange(family: Family, names: Iterable[str]) -> int:
    return min(map(len, family.left(names).values()))


def read_family(text: str, config: Config, where: str = "family") -> Family:
    """Return the family that ``text`` (TOML) describes; ``where`` begins its errors.

    Raises:
        LayoutError: not TOML, or an invalid table.
        NotFoundError: it is like a table that does not exist.
    """
    return _checked(read_table(text, where), config)


def _checked(table: Table, config: Config) -> Family:
    family = build(table, config)
    for forms in (family.forms, family.adapters):
        list(forms.values())  # builds all rows, and reports invalid ones
    return family


def register_models(text: str, where: str = "models") -> tuple[str, ...]:
    """Register a model family for this process, in TOML; return its values of ``model_type``.

    From then on all functions treat models of these types by the table: sharding, ``names=``
    and adapters. It precedes the package's own table for the same type. ``docs/models.md``
    documents the text; on the command line it is the file of ``--models``.

    Args:
        text: the TOML text.
        where: the source of ``text``, which begins the message of an error.

    Raises:
        LayoutError: not TOML, or an invalid table.
        NotFoundError: it is like a table that does not exist.
    """
    table = read_table(text, where)
    _checked(table, {})
    return register(table, where)
