"""Families from TOML: the package's own tables, and those of users, in the same text.

name = "mine"
types = ["mine"]                    # values of model_type
like = "llama"                      # begin with everything of that table
listed = ["hf", "nnx"]              # the forms it offers; all if left out

[words]                             # $word (or ${word}) in a row stands for this
layer = "h.{layer}"
[sizes]                             # lengths of axes by config.json
mlp = "ffn_hidden_size"
[aliases]
heads = "kv_heads q_per_kv"
[inputs]                            # the axes that weights contract
"q k v" = "embed"
[runs]                              # layers that a form stores apart: start : stop : step
dense = "0 : first_k_dense_replace"

[forms.hf]                          # WEIGHT NAME AXES | STEPS; WEIGHT - leaves one out
rows = '''
q    $layer.q.weight                (heads head_dim) embed
-    $layer.gate_up.weight          (gate:mlp + up:mlp) embed
'''
[forms.mine-scan]                   # made from another form by rule
like = "hf"
stack = ["layer 0"]

[[when]]                            # laid over the table where config.json is so
config = "use_bias == 1"
"""

from __future__ import annotations

import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from ..core.decoders import parse_toml
from ..core.patterns import template
from ..core.runtime import cached
from ..errors import FormatError, LayoutError, NotFoundError, did_you_mean
from . import facts
from .axes import parse
from .facts import Config
from .family import (
    Family,
    Form,
    Row,
    adapter_rows,
    by_run,
    stacked,
    with_flax_names,
    with_words,
)

_KEYS = {
    "name": str,
    "types": list,
    "like": str,
    "listed": list,
    "buffers": list,
    "lookups": str,
    "repeated": str,
    "words": dict,
    "sizes": dict,
    "aliases": dict,
    "inputs": dict,
    "runs": dict,
    "copies": dict,
    "copied_with": str,
    "forms": dict,
    "when": list,
}
_FORM_KEYS = {
    "rows": str,
    "like": str,
    "words": dict,
    "runs": dict,
    "stack": list,
    "replace": list,
    "prefix": str,
    "flax": bool,
    "adapters": list,
}
_STACK = re.compile(r"(?:layer|expert) \d(?: \w+)*")
_DOT = re.compile(r"\.")
_ROOTS = ("root", "head")
_MAX_LIKE = 8
_MAX_LAYERS = 10_000

Table = dict[str, Any]


def read_table(text: str, where: str) -> Table:
    """Parse the TOML of a family, and lay it over the tables that it is ``like``.

    Raises:
        LayoutError: not TOML, or an unknown key or value; begins with ``where``.
        NotFoundError: no table that it could be like.
    """
    table: Table = parse_toml(text, where)
    _check(table, _KEYS, where)
    for block in table.get("when", []):
        if not isinstance(block, dict) or "config" not in block:
            raise LayoutError(f'{where}: each [[when]] needs config = "EXPRESSION".')
        _check(block, {**_KEYS, "config": str}, f"{where}, [[when]]")
    chain = [table]
    while "like" in chain[-1]:
        if len(chain) == _MAX_LIKE:
            raise LayoutError(f"{where}: more than {_MAX_LIKE} tables are like each other.")
        chain.append(_packaged(chain[-1]["like"]))
    made: Table = {}
    for part in reversed(chain):
        inherited = {key: value for key, value in made.items() if key != "types"}
        made = _laid_over(inherited, part)
    return made


def build(table: Table, config: Config, words: Mapping[str, str] | None = None) -> Family:
    """Build the family that ``table`` describes, for one ``config.json``.

    Args:
        table: of ``read_table``.
        config: ``config.json``; may be empty.
        words: texts that replace those of ``[words]``.

    Raises:
        LayoutError: an invalid row.
        FormatError: ``config.json`` has a value that does not fit.
    """
    text = {**config, **facts.text_config(config)}
    for block in table.get("when", []):
        if facts.evaluate(block["config"], text):
            table = _laid_over(table, {k: v for k, v in block.items() if k != "config"})
    table = {**table, "words": {**table.get("words", {}), **(words or {})}}
    family = Family(
        name=table["name"],
        forms={},
        sizes=table.get("sizes", {}),
        aliases={axis: tuple(t.split()) for axis, t in table.get("aliases", {}).items()},
        inputs={
            w: frozenset(axes.split())
            for weights, axes in table.get("inputs", {}).items()
            for w in weights.split()
        },
        buffers=tuple(table.get("buffers", ())),
        runs={run: _layers(t, text) for run, t in table.get("runs", {}).items()},
        copies=table.get("copies", {}),
        copied_with=table.get("copied_with", ""),
        repeated=frozenset(table.get("repeated", "kv_heads").split()),
    )
    names = table.get("forms", {})
    listed = table.get("listed", list(names))
    unknown = [f for f in listed if f not in names]
    if unknown:
        raise LayoutError(
            f"{family.name}: listed = {unknown[0]!r} has no [forms.{unknown[0]}] (forms: "
            f"{', '.join(names)})."
        )
    every = tuple(dict.fromkeys((*listed, *names)))
    forms = _Forms(table, family, every)
    return replace(
        family,
        forms=forms,
        hidden=frozenset(names) - set(listed),
        adapters=_Adapters(table, family, every, forms),
    )


def find_roots(table: Table, config: Config, names: Iterable[str]) -> dict[str, str]:
    r"""Return the words ``root`` and ``head`` for the names of a model's tensors.

    A text model inside a multimodal one has other prefixes than the table's, a saved base model
    none. Of several the one that fits most kinds of names is returned.

    >>> table = read_table('name = "mine"\nlike = "decoder"', "mine")
    >>> find_roots(table, {}, ["language_model.model.norm.weight", "language_model.lm_head.weight"])
    {'root': 'language_model.model.', 'head': 'language_model.'}
    """
    words = {w: table["words"][w] for w in _ROOTS if w in table.get("words", {})}
    if not words:
        return {}
    family = build(table, config, {w: f"<{w}>" for w in words})
    kinds = {template(name): name for name in names}.values()
    found: dict[str, str] = {}
    for word, usual in words.items():
        fits = Counter(
            name[:at]
            for name in kinds
            for at in (0, *(dot.end() for dot in _DOT.finditer(name)))
            if any(family.find(form, f"<{word}>{name[at:]}") for form in _named_by_hub(family))
        )
        found[word] = max(fits, key=lambda root: (fits[root], root == usual), default=usual)
    return found


def _named_by_hub(family: Family) -> list[str]:
    return [form for form in family.listed if form.split("-")[0] == "hf"]


class _Forms(Mapping[str, Form]):
    """The forms of one table, each built when it is first used."""

    def __init__(self, table: Table, family: Family, names: tuple[str, ...]) -> None:
        self._table, self._family, self._names = table, family, names
        self._made: dict[str, Form] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Form:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = self._form(name)
        return self._made[name]

    def _form(self, name: str, depth: int = 0) -> Form:
        """Return the rows of the form ``name``."""
        entry = self._table["forms"].get(name)
        if entry is None or depth == _MAX_LIKE:
            raise LayoutError(
                f"{self._family.name}: like = {name!r} is not a form of the table, or a form is "
                "like itself."
            )
        rows = dict(self._form(entry["like"], depth + 1)) if "like" in entry else {}
        if entry.get("flax"):
            lookups = frozenset(self._table.get("lookups", "embed").split())
            rows = dict(with_flax_names(rows, self._family.inputs, lookups))
        rows = _renamed(rows, entry)
        self._add_rows(rows, entry, name)
        return _arranged(rows, entry)

    def _add_rows(self, rows: dict[str, Row], entry: Table, form: str) -> None:
        words = {**self._table["words"], **entry.get("words", {})}
        for line in entry.get("rows", "").splitlines():
            text = line.partition("#")[0].strip()
            for _ in range(_MAX_LIKE):  # words may have words
                text = with_words(text, words)
            if not text:
                continue
            where = f"{self._family.name}, {form}: {line.strip()!r}"
            left, _, steps = text.partition("|")
            parts = left.split(None, 2)
            if len(parts) == 2 and parts[1] == "-":
                rows.pop(parts[0], None)
                continue
            if len(parts) < 3:
                raise LayoutError(f"{where}: write WEIGHT NAME AXES, or WEIGHT - to leave it out.")
            row = Row(parts[1], parse(parts[2].strip()), steps.strip())
            shared = row.axes.weights
            run, _, weight = parts[0].rpartition("/")
            if not shared and weight == "-":
                raise LayoutError(f"{where}: only a row of several weights has no weight.")
            for w in shared or (weight,):
                rows[f"{run}/{w}" if run else w] = row


class _Adapters(_Forms):
    """The adapters of each form that defines them, or is like one that does."""

    def __init__(
        self, table: Table, family: Family, names: tuple[str, ...], forms: Mapping[str, Form]
    ) -> None:
        super().__init__(table, family, names)
        self._forms = forms

    def _form(self, name: str, depth: int = 0) -> Form:
        entry = self._table["forms"][name]
        if "stack" in entry and "adapters" not in entry:
            return _arranged(_renamed(self._form(entry["like"], depth + 1), entry), entry)
        while "adapters" not in entry:
            if "like" not in entry or entry.get("flax"):
                return {}
            entry = self._table["forms"][entry["like"]]
        return adapter_rows(self._forms[name], self._family.inputs, entry["adapters"])


def _renamed(rows: Form, entry: Table) -> dict[str, Row]:
    """Return the rows with the names that ``entry`` (of a form) makes of theirs."""
    names = {w: row.name for w, row in rows.items()}
    for old, new in entry.get("replace", []):
        names = {w: name.replace(old, new) for w, name in names.items()}
    before = entry.get("prefix", "")
    return {w: replace(row, name=before + names[w]) for w, row in rows.items()}


def _arranged(rows: Form, entry: Table) -> Form:
    """Return the rows with the runs and stacks of ``entry``."""
    made = by_run(rows, entry.get("runs", {}))
    for text in entry.get("stack", []):
        axis, dim, *runs = text.split()
        made = stacked(made, axis, int(dim), frozenset(runs))
    return made


def _layers(text: str, config: Config) -> range:
    """Return the numbers of the layers of a run, of which ``text`` is the slice."""
    start, stop, step, *_ = (*text.split(":"), "", "")
    count = facts.number("num_hidden_layers or n_layer or 0", config)
    ends = [
        facts.number(part, config) if part.strip() else default
        for part, default in ((start, 0), (stop, count), (step, 1))
    ]
    found = range(ends[0] or 0, ends[1] or 0, ends[2] or 1)
    if len(found) > _MAX_LAYERS:  # each is renamed: an untrusted number must not take hours
        raise FormatError(
            f"config.json: the layers {text} are {len(found)}, expected at most {_MAX_LAYERS}. "
            "Fetch it again."
        )
    return found


def _laid_over(base: Table, over: Table) -> Table:
    """Return ``base`` with the values of ``over``; the rows of a form are added to its rows."""
    made = dict(base)
    for key, value in over.items():
        known = base.get(key)
        if key == "when" and known:
            made[key] = [*known, *value]
        elif key == "rows" and known:
            made[key] = f"{known}\n{value}"
        elif isinstance(value, dict) and isinstance(known, dict) and "like" not in value:
            made[key] = _laid_over(known, value)
        else:
            made[key] = value
    return made


def _check(table: Table, keys: Mapping[str, type], where: str) -> None:
    for key, value in table.items():
        if key not in keys:
            raise LayoutError(
                f"{where}: unknown key {key!r}.{did_you_mean(key, keys)} Known keys: "
                f"{', '.join(keys)}."
            )
        if not isinstance(value, keys[key]):
            raise LayoutError(f"{where}: {key} must be a {keys[key].__name__}, got {value!r}.")
    texts = [v for k in ("types", "listed", "buffers") for v in table.get(k, [])]
    texts += [v for k in ("words", "sizes", "aliases", "inputs", "runs", "copies")
              for v in table.get(k, {}).values()]  # fmt: skip
    if not all(isinstance(t, str) for t in texts):
        raise LayoutError(f"{where}: all values of words, sizes, … must be texts in quotes.")
    for name, form in table.get("forms", {}).items():
        if not isinstance(form, dict):
            raise LayoutError(f"{where}: write [forms.{name}] on a line of its own, then rows = …")
        for key, value in form.items():
            if key not in _FORM_KEYS or not isinstance(value, _FORM_KEYS[key]):
                raise LayoutError(
                    f"{where}, forms.{name}: {key} = {str(value)[:40]!r} is not valid. Known keys: "
                    f"{', '.join(_FORM_KEYS)}."
                )
        pairs, stacks = form.get("replace", []), form.get("stack", [])
        if not all(isinstance(p, list) and list(map(type, p)) == [str, str] for p in pairs):
            raise LayoutError(f'{where}, forms.{name}: replace must be [["OLD", "NEW"], …].')
        if len(patterns := form.get("adapters", ["", ""])) != 2 or not all(
            isinstance(t, str) for t in patterns
        ):
            raise LayoutError(f'{where}, forms.{name}: adapters must be ["A AXES", "B AXES"].')
        if not all(isinstance(t, str) and _STACK.fullmatch(t) for t in stacks):
            raise LayoutError(f'{where}, forms.{name}: stack must be ["layer 0"], or ["expert 0"].')


# --- The package's own tables


@cached(1)
def _index() -> dict[str, str]:
    """Return the table of each ``model_type``."""
    found: dict[str, str] = {}
    for name in _names():
        types = re.search(r"^types = (\[[^\]]*\])", _text(name), re.MULTILINE)
        if types:
            found |= dict.fromkeys(parse_toml(types[0], name)["types"], name)
    return found


@cached(1)
def _names() -> tuple[str, ...]:
    """Return the names of the tables, also of those that only others are like."""
    from importlib.resources import files  # noqa: PLC0415 - slow to import

    folder = files(__package__) / "tables"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir()))


@cached(128)
def _text(name: str) -> str:
    return cast(bytes, pkgutil.get_data(__package__, f"tables/{name}.toml")).decode()


@cached(128)
def _packaged(name: str) -> Table:
    if name not in _names():
        raise NotFoundError(
            f"like = {name!r}: no such table.{did_you_mean(name, _names())} Tables: "
            f"{', '.join(_names())}."
        )
    table: Table = parse_toml(_text(name), f"models/tables/{name}.toml")
    _check(table, _KEYS, f"models/tables/{name}.toml")
    return table


@cached(128)
def _packaged_for(model_type: str) -> Table | None:
    name = _index().get(model_type)
    return None if name is None else read_table(_text(name), f"models/tables/{name}.toml")


# --- Tables that the user registered, which precede the package's own

_registered: dict[str, Table] = {}


def register(table: Table, where: str) -> tuple[str, ...]:
    """Register ``table`` for its ``types``; see ``jaxshard.register_models``."""
    own = table.get("types", [])
    if not own:
        raise LayoutError(
            f"{where}: types is missing. List the values of model_type of the family: "
            'types = ["mine"].'
        )
    _registered.update(dict.fromkeys(own, table))
    return tuple(own)


def table_for(model_type: str) -> Table | None:
    """Return the table for a ``model_type``, or None."""
    return _registered.get(model_type) or _packaged_for(model_type)


def model_types() -> tuple[str, ...]:
    """Return the values of ``model_type`` with a table."""
    return tuple(dict.fromkeys((*_registered, *_index())))


def tables() -> Mapping[str, Table]:
    """Return the tables of families by their names: the user's, and the package's own."""
    return {**{table["name"]: table for table in _registered.values()}, **_packaged_tables()}


@cached(1)
def _packaged_tables() -> Mapping[str, Table]:
    every = {name: read_table(_text(name), f"models/tables/{name}.toml") for name in _names()}
    return {t["name"]: t for t in every.values() if "listed" in t or "types" in t}
