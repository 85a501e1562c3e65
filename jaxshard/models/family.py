"""Families: one table of weights, whose columns are the forms in which programs store them.

    weight   hf                                                  tunix
    q        model.layers.{layer}.self_attn.q_proj.weight        layers.{layer}.attn.q_proj.w
             (heads head_dim) embed                              embed heads head_dim

A placeholder in a name ({layer}, {expert}) is an index in this form, and a dim in others.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod, sqrt

from ..core.patterns import Patterns, holes, placeholders, template
from ..errors import LayoutError, NotFoundError, did_you_mean
from . import facts
from .axes import Axes, Dim, parse
from .facts import Config

_STEP = re.compile(r"\s*([*/+-])\s*(?:(bfloat16\()?sqrt\(\s*(\w+)\s*\)(?(2)\))|(\d+(?:\.\d+)?))")

#: The axis that the two matrices of an adapter share.
RANK = "rank"
#: Axes along which weights are stacked.
SHARED_AXES = frozenset({"layer", "expert"})


@dataclass(frozen=True, slots=True)
class Value:
    """What a form stores instead of each value: the value times ``times``, plus ``plus``."""

    times: float = 1.0
    plus: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """How a form stores a weight: the name, the axes, and the steps from values to stored values.

    Raises:
        LayoutError: an axis is both in the name and in the dims, or the steps are invalid.
    """

    name: str
    axes: Axes
    steps: str = ""

    def __post_init__(self) -> None:
        twice = holes(self.name) & set(self.axes.names)
        if twice:
            raise LayoutError(f"{self.name}: {', '.join(twice)} is in the name and in the axes.")
        if _STEP.sub("", self.steps).strip():
            raise LayoutError(
                f"{self.name}: the steps {self.steps!r} are invalid. Write, for example, "
                "/ sqrt(head_dim), or + 1."
            )


_WORD = re.compile(r"\$(?:\{([a-z]+)\}|([a-z]+))")


def with_words(text: str, words: Mapping[str, str]) -> str:
    """Replace ``$word`` and ``${word}`` by the text of that word; unknown ones stay."""
    return _WORD.sub(lambda found: words.get(found[1] or found[2], found[0]), text)


#: The rows by weight. Weights that share a tensor have the same row.
Form = Mapping[str, Row]


@dataclass(frozen=True)
class Family:
    """The weights of one kind of models.

    Attributes:
        name: the name in messages.
        forms: the columns.
        sizes: by axis, the expression of ``config.json`` that is its length (see ``facts``).
        aliases: axes that are products of others.
        inputs: by weight, the axes that it contracts, which an adapter's A has.
        buffers: patterns of names that are not weights.
        runs: the numbers of the layers that some forms store apart. Such a form has rows for
            ``RUN/WEIGHT``, and counts the layers of each run from 0.
        copies: weights that repeat another one. A form without them drops them, and they are
            restored in models that have the weight ``copied_with``.
        repeated: axes that a form may lengthen by repeating; others are padded.
        hidden: forms that only define others, and are not offered.
        adapters: the forms' rows of low-rank adapters; see ``adapter_rows``.
    """

    name: str
    forms: Mapping[str, Form]
    sizes: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    runs: Mapping[str, range] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    copied_with: str = ""
    repeated: frozenset[str] = frozenset({"kv_heads"})
    hidden: frozenset[str] = frozenset()
    adapters: Mapping[str, Form] = field(default_factory=dict)

    def with_adapters(self) -> Family:
        """Return the same, whose forms have the rows of the weights' adapters too."""
        forms = {f: {**rows, **self.adapters.get(f, {})} for f, rows in self.forms.items()}
        return replace(self, forms=forms, adapters={})

    @property
    def listed(self) -> tuple[str, ...]:
        """The forms that the family offers."""
        return tuple(f for f in self.forms if f not in self.hidden)

    def form(self, name: str) -> Form:
        """Return a column.

        Raises:
            NotFoundError: the family does not have it.
        """
        if name not in self.listed:
            raise NotFoundError(
                f"{self.name} has no form {name!r} (forms: {', '.join(self.listed)})."
                + did_you_mean(name, self.listed)
            )
        return self.forms[name]

    def find(self, form: str, name: str, kind: str = "") -> str | None:
        """Return the weight ``name`` of ``form``, the first of those that share it, or None.

        ``kind`` is the ``template`` of the name, if the caller has it.
        """
        weights, patterns = self._found[form]
        at = patterns.find(name, kind)
        return None if at is None else weights[at]

    @cached_property
    def _buffers(self) -> Patterns:
        return Patterns(self.buffers, placeholders)

    @cached_property
    def _found(self) -> dict[str, tuple[tuple[str, ...], Patterns]]:
        return {
            f: (tuple(rows), Patterns((row.name for row in rows.values()), placeholders))
            for f, rows in self.forms.items()
        }

    def form_of(self, names: Iterable[str]) -> tuple[str, tuple[str, ...]]:
        """Return the form that most of ``names`` have, and the names that it does not have."""
        left = self.left(names)
        best = min(left, key=lambda f: len(left[f]))  # the first of equals
        return best, left[best]

    def left(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return for each form that the family offers the names that it does not have."""
        kinds = {n: template(n) for n in names}
        every = [(n, kind) for n, kind in kinds.items() if self._buffers.find(n, kind) is None]
        return {
            f: tuple(n for n, kind in every if self.find(f, n, kind) is None) for f in self.listed
        }


class Sizes:
    """The lengths of one model's axes: as stated, else by ``config.json``, else by its tensors."""

    def __init__(
        self, family: Family, config: Config, stated: Mapping[str, int] | None = None
    ) -> None:
        self.config: Config = {**config, **facts.text_config(config)}
        self._family, self._stated = family, dict(stated or {})
        self._seen: dict[str, int] = {}
        self._pending: set[str] = set()

    def having(self, stated: Mapping[str, int]) -> Sizes:
        """Return the same with other lengths (a padded vocabulary, repeated kv heads)."""
        made = Sizes(self._family, self.config, {**self._stated, **stated})
        made._seen = dict(self._seen)
        return made

    def seeing(self, form: str, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
        """Return the same, with lengths from tensors where ``config.json`` lacks them.

        Raises:
            LayoutError: a tensor's shape contradicts its axes.
        """
        made, rows = self.having({}), self._family.forms[form]
        alike: dict[tuple[str, tuple[int, ...]], str] = {}
        for name, shape in shapes.items():
            alike.setdefault((template(name), shape), name)
        for (kind, shape), name in alike.items():
            weight = self._family.find(form, name, kind)
            if weight is not None:
                made._see(name, shape, rows[weight].axes, weight.rpartition("/")[0])
        return made

    def _see(self, name: str, shape: tuple[int, ...], axes: Axes, run: str) -> None:
        if len(shape) != len(axes.dims):
            raise LayoutError(
                f"{name} has shape {shape}, expected {len(axes.dims)} dims ({axes}) for "
                f"{self._family.name}."
            )
        for i, (dim, n) in enumerate(zip(axes.dims, shape, strict=True)):
            is_run = bool(run) and dim.names == ("layer",)
            known = len(self._family.runs[run]) if is_run else self.length(dim)
            if dim.factors == (RANK,):
                continue  # of the adapters of one model, each may have its own
            if known is None:
                self._infer(dim, n)
            elif known != n:
                raise LayoutError(
                    f"{name} has shape {shape}, expected {known} elements along dim {i}: its axes "
                    f"are {axes} in {self._family.name}. Check config.json."
                )

    def _infer(self, dim: Dim, length: int) -> None:
        """Take the length of the only unknown axis of ``dim`` from that of the dim."""
        unknown = [a for a in dim.names if self.get(a) is None]
        if dim.block > 1 or dim.sum or len(unknown) != 1:
            return
        rest = self.product(a for a in dim.names if a != unknown[0]) or 1
        if length % rest == 0:
            self._seen[unknown[0]] = length // rest

    def form_of(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[str, ...]]:
        """Return the form of tensors, and the names that it does not have.

        Of forms with the same names, it is the first that has the shapes too.
        """
        left = self._family.left(shapes)
        fewest = min(map(len, left.values()))
        best = [form for form, others in left.items() if len(others) == fewest]
        fitting = (form for form in best if len(best) == 1 or self._has(form, shapes))
        form = next(fitting, best[0])
        return form, left[form]

    def _has(self, form: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        try:
            self.seeing(form, shapes)
        except LayoutError:
            return False
        return True

    def length(self, dim: Dim) -> int | None:
        """Return the length of a dim, or None."""
        found: list[int | None] = [
            self.get(f) if isinstance(f, str) else _sum([self.product(t.axes) for t in f.terms])
            for f in dim.factors
        ]
        return None if None in found else -(-prod(n or 0 for n in found) // dim.block)

    def product(self, axes: Iterable[str]) -> int | None:
        """Return the length of several axes together, or None."""
        found = [self.get(a) for a in axes]
        return None if None in found else prod(n or 0 for n in found)

    def __getitem__(self, axis: str) -> int:
        found = self.get(axis)
        if found is None:
            raise NotFoundError(
                f"config.json: {' or '.join(self._missing(axis))} is missing, which the length of "
                f"{axis} needs. Put config.json into the folder of the weights; for a save "
                "pass config= or extras=."
            )
        return found

    def _missing(self, name: str) -> list[str]:
        """Return the keys that ``config.json`` lacks for the length of an axis."""
        text = self._family.sizes.get(name)
        if text is None or name in self._pending:
            return [name]
        self._pending.add(name)
        absent = (n for n in facts.names_in(text) if self.config.get(n) is None)
        found = [key for n in absent for key in self._missing(n)]
        self._pending.discard(name)
        return list(dict.fromkeys(found))

    def get(self, axis: str) -> int | None:
        """Return the length of ``axis``, or None."""
        if axis.isdigit():
            return int(axis)
        if axis in self._stated:
            return self._stated[axis]
        if axis in self._pending:
            return None
        self._pending.add(axis)
        try:
            parts = self._family.aliases.get(axis)
            text = self._family.sizes.get(axis)
            found = None if text is None else facts.number(text, self.config, self.get, least=1)
            if found is None and parts:
                found = self.product(parts)
        finally:
            self._pending.discard(axis)
        return self._seen.get(axis) if found is None else found

    def value(self, row: Row) -> Value:
        """Return the steps of ``row`` in numbers."""
        times, plus = 1.0, 0.0
        for sign, rounded, axis, digits in _STEP.findall(row.steps):
            x = float(digits) if digits else self._root(axis)
            if axis and not x:
                raise LayoutError(f"{row.name}: {axis} is 0, and {row.steps} has no value.")
            x = _bfloat16(x) if rounded else x
            if sign in "*/":
                factor = x if sign == "*" else 1 / x
                times, plus = times * factor, plus * factor
            else:
                plus += x if sign == "+" else -x
        return Value(times, plus)

    def _root(self, axis: str) -> float:
        found = facts.evaluate(f"sqrt({axis})", {}, self.get)
        if found is None:
            found = facts.evaluate(f"sqrt({axis})", self.config)
        return found if isinstance(found, float) else sqrt(self[axis])


def _bfloat16(x: float) -> float:
    """Return the bfloat16 nearest to ``x``, the even one of two."""
    bits: int = struct.unpack("<I", struct.pack("<f", x))[0]
    return float(
        struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16))[0]
    )


def _sum(found: list[int | None]) -> int | None:
    return None if None in found else sum(n or 0 for n in found)


# --- Forms made from other forms by rule


def stacked(form: Form, axis: str, dim: int = 0, runs: frozenset[str] = frozenset()) -> Form:
    """Return the rows with ``axis`` as a dim instead of an index in the name.

    Args:
        form: the rows.
        axis: the index: ``layer`` or ``expert``.
        dim: where the new dim is; the last if the tensor has fewer.
        runs: stack only these runs of layers; all if empty.
    """

    def one(weight: str, row: Row) -> Row:
        run = weight.rpartition("/")[0]
        if f"{{{axis}}}" not in row.name or (runs and run not in runs):
            return row
        name = re.sub(rf"[._]\{{{axis}\}}", "", row.name)
        return replace(row, name=name, axes=row.axes.along(axis, min(dim, len(row.axes.dims))))

    return {w: one(w, c) for w, c in form.items()}


def with_flax_names(
    form: Form, inputs: Mapping[str, frozenset[str]], lookups: frozenset[str]
) -> Form:
    """Return the rows with Flax's names: kernels (in, out), scales, embeddings."""

    def one(weight: str, row: Row) -> Row:
        if not row.name.endswith(".weight"):
            return row
        if len(row.axes.dims) == 1:
            kind = "scale"
        else:
            kind = "embedding" if weight in lookups else "kernel"
        first = set(row.axes.dims[0].names[:1])
        turn = kind == "kernel" and not first & inputs.get(weight, frozenset())
        axes = row.axes.reversed() if turn else row.axes
        return replace(row, name=row.name.removesuffix("weight") + kind, axes=axes)

    return {w: one(w, c) for w, c in form.items()}


def by_run(form: Form, runs: Mapping[str, str]) -> Form:
    """Return the rows whose names have ``$run`` once for each run, with its text in place."""
    made: dict[str, Row] = {}
    for weight, row in form.items():
        if "$run" not in row.name:
            made[weight] = row
            continue
        for run, text in runs.items():
            made.setdefault(f"{run}/{weight}", replace(row, name=row.name.replace("$run", text)))
    return made


def adapter_rows(
    form: Form, inputs: Mapping[str, frozenset[str]], patterns: Sequence[str]
) -> dict[str, Row]:
    """Return the rows of the low-rank adapters of a form's weights: ``WEIGHT.lora_A`` and ``_B``.

    Weights that share a tensor, and stacked experts and layers, have none. Where the form scales
    a weight, it scales B.

    Args:
        form: the rows.
        inputs: by weight, the axes that it contracts.
        patterns: of A and of B: a name, in which ``$name`` is the weight's and ``$module`` that
            without its last part; then the dims: ``in`` and ``out`` for those of the weight,
            ``(in)`` and ``(out)`` for these as one dim, and ``rank``.
    """
    made: dict[str, Row] = {}
    for weight, row in form.items():
        own = inputs.get(weight.rpartition("/")[2])
        if not own or row.axes.weights or SHARED_AXES & set(row.axes.names):
            continue
        words = {"name": row.name, "module": row.name.rpartition(".")[0]}
        sides = {
            side: [d for d in row.axes.dims if own.isdisjoint(d.names) == (side == "out")]
            for side in ("in", "out")
        }
        for half, pattern in zip("AB", patterns, strict=True):
            name, *dims = pattern.split()
            made[f"{weight}.lora_{half}"] = Row(
                with_words(name, words),
                Axes(tuple(d for text in dims for d in _adapter_dims(text, sides))),
                row.steps if half == "B" else "",
            )
    return made


def _adapter_dims(text: str, sides: Mapping[str, list[Dim]]) -> list[Dim]:
    side = text.strip("()")
    if side not in sides:
        return list(parse(text).dims)
    if text == side:
        return sides[side]
    return [Dim(tuple(f for d in sides[side] for f in d.factors))]
