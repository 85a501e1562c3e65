"""Permutations of the axes of a model: what a table says of its tensors, checked by computing.

A row says which index of a tensor is a head, a hidden unit, an expert. If this is right, the same
permutation of the hidden units of every tensor leaves the output as it was; if one tensor is left
out, the output changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch

from jaxshard.core.patterns import fill, match
from jaxshard.models import Family, Sizes
from jaxshard.models.axes import Dim, Sum
from jaxshard.models.family import Row

#: Axes that are one thing under two names: a family names them apart because they are cut apart.
SAME = {"route": "expert", "feature": "embed", "looked_up": "embed", "turned": "embed"}
#: Parts of axes that tables do not take apart, one after the other.
JOINED = {
    "qk_dim": ("nope", "rope"),
    "kv_dim": ("nope", "v_dim"),
    "kv_rank_and_rope": ("kv_rank", "rope"),
}
PARTS = {"nope": "qk_nope_head_dim", "rope": "qk_rope_head_dim"}
#: Axes whose order means something: the pair of a rotation, the taps of a convolution.
ORDERED = {"two", "conv"}

Order = Callable[[str], np.ndarray]


class Permutation:
    """One random permutation for each axis of a model's tensors."""

    def __init__(self, family: Family, form: str, sizes: Sizes, names: Iterable[str]) -> None:
        self._weights = {n: found for n in names if (found := family.find(form, n))}
        self.rows = {n: family.form(form)[weight] for n, weight in self._weights.items()}
        self._family, self._sizes = family, sizes
        self._random = np.random.default_rng(0)
        self._orders: dict[str, np.ndarray] = {}
        self.axes_of = {row: self._axes(row) for row in dict.fromkeys(self.rows.values())}

    def _axes(self, row: Row) -> tuple[str, ...]:
        """The axes of a row that are permuted, each by its own name."""
        found = [*row.axes.expanded(self._family.aliases).names]
        for dim in row.axes.expanded(self._family.aliases).dims:
            found += [a for t in (dim.sum.terms if dim.sum else ()) for a in t.axes]
        found += ["expert"] if "{expert}" in row.name else []
        parts = [p for a in found for p in JOINED.get(a, (a,))]
        named = dict.fromkeys(map(self._name, parts))
        return tuple(a for a in named if not a.isdigit() and a not in ORDERED and self._len(a) > 1)

    def _len(self, axis: str) -> int:
        return self._sizes.config[PARTS[axis]] if axis in PARTS else self._sizes[axis]

    def _name(self, axis: str) -> str:
        other = SAME.get(axis, axis)
        return other if other != axis and self._len(other) == self._len(axis) else axis

    def order(self, axis: str) -> np.ndarray:
        """The permutation of an axis: which old index is at each new one."""
        axis = self._name(axis)
        if axis not in self._orders:
            n = self._len(axis)
            if axis == "rope":  # pairs of neighbours stay together
                pairs = self._shuffled(n // 2)
                self._orders[axis] = (2 * pairs[:, None] + np.arange(2)).ravel()
            else:
                self._orders[axis] = np.arange(n) if axis in ORDERED else self._shuffled(n)
        return self._orders[axis]

    def _shuffled(self, n: int) -> np.ndarray:
        while n > 1:
            found = self._random.permutation(n)
            if (found != np.arange(n)).any():
                return found
        return np.arange(n)

    def applied(
        self, arrays: Mapping[str, np.ndarray], names: Iterable[str], left_out: str = ""
    ) -> dict[str, np.ndarray]:
        """Permute tensors along every axis but ``left_out``."""

        def order(axis: str) -> np.ndarray:
            if axis in JOINED:
                first, second = JOINED[axis]
                return np.concatenate([order(first), self._len(first) + order(second)])
            if self._name(axis) == left_out:
                return np.arange(self._len(axis))
            return self.order(axis)

        return {n: self._one(n, arrays, order) for n in names}

    def changed(
        self, arrays: Mapping[str, np.ndarray], steps: Mapping[str, tuple[float, float]]
    ) -> dict[str, np.ndarray]:
        """Multiply weights and add to them, also where several share a tensor."""
        out: dict[str, np.ndarray] = {}
        for name, row in self.rows.items():
            wanted = {w: steps[w] for w in row.axes.weights or (self._weights[name],) if w in steps}
            for weight, (times, plus) in wanted.items():
                here = out.setdefault(name, arrays[name].copy())
                place = tuple(
                    _part(dim.factors, weight, self._sizes)
                    for dim in row.axes.expanded(self._family.aliases).dims
                )
                here[np.ix_(*place)] = here[np.ix_(*place)] * times + plus
        return out

    def weight(self, name: str) -> str:
        """The weight that a tensor is; the first of those that share it."""
        return self._weights[name]

    def row(self, weight: str) -> Row | None:
        """The row of a weight that the model has."""
        return next((self.rows[n] for n, w in self._weights.items() if w == weight), None)

    def has(self, weight: str) -> bool:
        """Whether the model has the weight."""
        return any(weight in (self._weights[n], *r.axes.weights) for n, r in self.rows.items())

    def _one(self, name: str, arrays: Mapping[str, np.ndarray], order: Order) -> np.ndarray:
        row = self.rows[name]
        if "{expert}" in row.name:
            found = dict(match(row.name, name) or {})
            found["expert"] = str(order("expert")[int(found["expert"])])
            name = fill(row.name, found)
        values = arrays[name]
        for i, dim in enumerate(row.axes.expanded(self._family.aliases).dims):
            values = np.take(values, _indices(dim.factors, order), axis=i)
        return values


def _indices(factors: tuple[str | Sum, ...], order: Order) -> np.ndarray:
    """The old indices of a dim, in the new order."""
    if not factors:
        return np.zeros(1, int)
    first, rest = factors[0], factors[1:]
    if isinstance(first, Sum):
        parts, at = [], 0
        for term in first.terms:
            parts.append(at + _indices((*term.axes, *rest), order))
            at += parts[-1].size
        return np.concatenate(parts)
    outer = np.arange(int(first)) if first.isdigit() else order(first)
    inner = _indices(rest, order)
    return (outer[:, None] * inner.size + inner).ravel()


def _part(factors: tuple[str | Sum, ...], weight: str, sizes: Sizes) -> np.ndarray:
    """The indices of a dim that are a weight's."""
    if not factors:
        return np.zeros(1, int)
    first, rest = factors[0], factors[1:]
    if isinstance(first, Sum):
        found, at = [], 0
        for term in first.terms:
            mine = _part((*term.axes, *rest), weight, sizes)
            found += [at + mine] if term.weight == weight else []
            at += mine.size
        return np.concatenate(found)
    inner = _part(rest, weight, sizes)
    whole = sizes.length(Dim(rest)) if rest else 1
    return (np.arange(sizes[first])[:, None] * whole + inner).ravel()


class Computed:
    """A model whose tensors can be replaced, and what it computes for fixed inputs."""

    def __init__(self, model: torch.nn.Module, with_types: bool) -> None:
        inner = getattr(model, "language_model", model)
        self.model = model if not hasattr(inner, "lm_head") else inner  # Llama 4
        modules = model.named_modules()
        self.looked_up = [f"{n}.weight" for n, m in modules if isinstance(m, torch.nn.Embedding)]
        every = dict(model.named_parameters(remove_duplicate=False))
        held = model.state_dict()
        every |= {n: x for n, x in model.named_buffers() if n in held}
        names = [*self.looked_up, *every]  # of tensors that are tied, the name of the embedding
        first = {id(every[n]): n for n in reversed(names)}
        self.tensors = {n: every[n] for n in every if first[id(every[n])] == n}
        generator = torch.Generator().manual_seed(1)
        self._inputs = {"input_ids": torch.randint(3, 99, (2, 9), generator=generator)}
        if with_types:
            self._inputs["token_type_ids"] = torch.randint(0, 2, (2, 9), generator=generator)

    def arrays(self) -> dict[str, np.ndarray]:
        """Copy the tensors."""
        return {n: x.detach().numpy().copy() for n, x in self.tensors.items()}

    def put(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace tensors."""
        with torch.no_grad():
            for name, values in arrays.items():
                self.tensors[name].copy_(torch.from_numpy(values))

    def turn(self, order: np.ndarray) -> None:
        """Permute the frequencies of the rotary embedding."""
        for name, buffer in self.model.named_buffers():
            if name.endswith("inv_freq") and buffer.shape == order.shape:
                buffer.copy_(buffer[torch.from_numpy(order)])

    def still(self) -> None:
        """Stop the rotation of q and k, so that a bias of k adds the same to a query's scores."""
        for name, buffer in self.model.named_buffers():
            if name.endswith("inv_freq"):
                buffer.zero_()

    def logits(self, lookups: Mapping[str, np.ndarray]) -> np.ndarray:
        """Compute the output, with the looked-up rows of tensors (by name) at other places."""
        by_id = {id(self.tensors[n]): torch.from_numpy(np.argsort(o)) for n, o in lookups.items()}
        with torch.no_grad(), _looking_up(by_id):
            return self.model(**self._inputs).logits.numpy()


@contextlib.contextmanager
def _looking_up(by_id: Mapping[int, torch.Tensor]) -> Iterator[None]:
    plain = torch.nn.functional.embedding

    def embedding(ids, weight, padding_idx=None, *args, **kwargs):
        places = by_id.get(id(weight))
        return plain(ids if places is None else places[ids], weight, None, *args, **kwargs)

    torch.nn.functional.embedding = embedding
    try:
        yield
    finally:
        torch.nn.functional.embedding = plain
