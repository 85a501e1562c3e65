"""Ways round: specs between two specs, reached by moves that a compiler does well.

Asked for ``(b|a) → (b,c,a|)`` in one step, XLA rebuilds the whole tensor on every device; asked for
``(b|a) → (b,c|a) → (b,c,a|)`` it cuts, then exchanges. The moves it does well
change one thing about how the mesh axes split the dims:

    slice      (a|b)   → (a,c|b)    an unused axis splits a dim further
    gather     (a,c|b) → (a|b)      the fastest axis of a dim is given up
    exchange   (a,c|b) → (a|b,c)    the fastest axes of one dim go to the end of another
    permute    (a,c|b) → (b,a|c)    the same number of parts per dim, in another order

This module is about axes alone: it knows no arrays and no compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice, permutations
from math import prod

from ..layout import Spec
from ..strategy import Axes

_MAX_ORDERS = 720  # all orders of six axes, 64 devices; of more axes only the first are tried


def paths(axes: Axes, source: Spec, target: Spec) -> Iterator[list[Spec]]:
    """The one or two specs between ``source`` and ``target``, found as they are asked for.

    Every move can be undone by one, so the last spec is looked for among the
    moves of the target. None has larger shards than the larger of the two ends.

    >>> axes = (("a", 2), ("b", 2), ("c", 2))
    >>> next(paths(axes, (("b",), ("a",)), (("b", "c", "a"), ())))
    [(('b', 'c'), ('a',))]
    """
    least_parts = min(_parts(axes, source), _parts(axes, target))
    last = {s for s in _moves(axes, target) if _parts(axes, s) >= least_parts} - {source}
    first = [s for s in _moves(axes, source) if _parts(axes, s) >= least_parts and s != target]
    for spec in first:
        if spec in last:
            yield [spec]
    for spec in first:
        for other in _moves(axes, spec):
            if other in last:
                yield [spec, other]


@lru_cache(maxsize=4096)
def _moves(axes: Axes, spec: Spec) -> tuple[Spec, ...]:
    used = {a for dim in spec for a in dim}
    found: dict[Spec, None] = {}
    for d, split in enumerate(spec):
        for moved in range(1, len(split) + 1):  # exchange
            for other in range(len(spec)):
                if other != d:
                    changed = list(spec)
                    changed[d] = split[:-moved]
                    changed[other] = spec[other] + split[-moved:]
                    found[tuple(changed)] = None
        if split:  # gather
            found[_with(spec, d, split[:-1])] = None
        for name, _ in axes:  # slice
            if name not in used:
                found[_with(spec, d, (*split, name))] = None
    for other_spec in _same_counts(axes, tuple(len(dim) for dim in spec)):  # permute
        if _counts(axes, other_spec) == _counts(axes, spec):
            found[other_spec] = None
    found.pop(spec, None)
    return tuple(found)


@lru_cache(maxsize=256)
def _same_counts(axes: Axes, lengths: tuple[int, ...]) -> tuple[Spec, ...]:
    """Every spec with that many axes per dim."""
    names = [a for a, _ in axes]
    specs = []
    for order in islice(permutations(names, sum(lengths)), _MAX_ORDERS):
        left = list(order)
        specs.append(tuple(tuple(left.pop(0) for _ in range(n)) for n in lengths))
    return tuple(specs)


def _with(spec: Spec, dim: int, split: tuple[str, ...]) -> Spec:
    return (*spec[:dim], split, *spec[dim + 1 :])


def _counts(axes: Axes, spec: Spec) -> tuple[int, ...]:
    size: Mapping[str, int] = dict(axes)
    return tuple(prod(size[a] for a in dim) for dim in spec)


def _parts(axes: Axes, spec: Spec) -> int:
    return prod(_counts(axes, spec))
