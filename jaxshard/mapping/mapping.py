"""Mappings: a list of operations that makes one model's tensors from another's.

    catalog of files ──→ catalog whose tensors are strided views of the same files
    arrays           ──→ arrays, computed where they are

Optimizer states (``adam_m.NAME`` …) go the way of the weight whose name follows; tensors
that are no weights (``global_step``) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from typing import Any

from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout
from ..errors import JaxshardError
from ..rules.match import OPTIMIZER_PREFIXES
from .algebra import Algebra, Geometry, T
from .arrays import Expressions, evaluate, leaf
from .layouts import Placing, placed
from .ops import Op


@dataclass(frozen=True)
class Mapping:
    """Operations, in order. Plain data: it prints, compares, pickles and is saved as TOML.

    >>> from .ops import Rename, Transpose
    >>> there = Mapping((Rename((("{x*}.weight", "{x*}.kernel"),)), Transpose(("{x*}.kernel",))))
    >>> print(there.inverse())
    Transpose(names=('{x*}.kernel',), order=(1, 0))
    Rename(rules=(('{x*}.kernel', '{x*}.weight'),))
    """

    ops: tuple[Op, ...] = ()
    name: str = ""

    def apply(self, catalog: Catalog) -> Catalog:
        """``catalog`` with the target's names and shapes. Nothing is read.

        Raises:
            NotFoundError: a tensor is missing, or has no rule.
            LayoutError: shapes do not fit, or two sources make one target.
        """
        made = self.tensors(catalog.tensors, Geometry(), catalog.hyper)
        renamed = {n: t if t.name == n else replace(t, name=n) for n, t in made.items()}
        origin = Origin(catalog, self)
        told = {k: v for k, v in catalog.metadata.items() if k not in catalog.tensors}
        told |= {n: catalog.metadata[t.name] for n, t in made.items() if t.name in catalog.metadata}
        return replace(catalog, tensors=renamed, layout=None, metadata=told, origin=origin)

    def inverse(self) -> Mapping:
        """The mapping back.

        Raises:
            LayoutError: an operation has no inverse.
        """
        parts = self.name.split(":")
        back = ":".join(reversed(parts))
        return Mapping(tuple(op.inverse() for op in reversed(self.ops)), back)

    def then(self, other: Mapping) -> Mapping:
        """This mapping, and ``other`` on its result."""
        names = (self.name.split(":")[0], other.name.split(":")[-1])
        return Mapping((*self.ops, *other.ops), ":".join(n for n in names if n))

    def place(
        self, layout: Layout, tensors: Dict[str, Tensor], hyper: frozenset[str] = frozenset()
    ) -> Layout:
        """The layout of what ``tensors`` become, when they lie as ``layout`` says.

        Raises:
            LayoutError: what ranks share is no whole part of a target (fewer kv heads than mp).
        """
        made = self.tensors(placed(tensors, layout), Placing(), hyper)
        placements = {n: x.placements for n, x in made.items()}
        return replace(layout, placements=placements)

    def apply_arrays(self, arrays: Dict[str, Any], hyper: Iterable[str] = ()) -> dict[str, Any]:
        """Arrays by name as arrays by the target's names: JAX's stay on their devices.

        A dim that devices share stays shared wherever the mapping takes it.

        Raises:
            JaxshardError: as ``apply``.
            LayoutError: one result is made of arrays on different devices (pipeline stages).
        """
        kept = frozenset(hyper)
        leaves = {n: leaf(n, tuple(x.shape), x.dtype.name) for n, x in arrays.items()}
        made = self.tensors(leaves, Expressions(), kept)
        return evaluate(made, arrays)

    def tensors(
        self, tensors: Dict[str, T], algebra: Algebra[T], hyper: frozenset[str] = frozenset()
    ) -> dict[str, T]:
        """What becomes of ``tensors``, in the words of ``algebra``."""
        result = {n: t for n, t in tensors.items() if n in hyper}
        for prefix, group in _by_prefix(tensors, hyper).items():
            made = group
            try:
                for op in self.ops:
                    made = op.apply(made, algebra)
            except JaxshardError as error:
                if not prefix:
                    raise
                raise type(error)(f"names that begin with {prefix}: {error}") from None
            result |= {prefix + name: tensor for name, tensor in made.items()}
        return result

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops)) or "no operation"


@dataclass(frozen=True)
class Origin:
    """Where a mapped catalog comes from; see ``catalog.Origin``."""

    catalog: Catalog
    mapping: Mapping

    def place(self, layout: Layout) -> Layout:
        """The layout of the mapped tensors, when the catalog's own lie as ``layout`` says."""
        return self.mapping.place(layout, self.catalog.tensors, self.catalog.hyper)


def _by_prefix(tensors: Dict[str, T], hyper: frozenset[str]) -> dict[str, dict[str, T]]:
    groups: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        if name not in hyper:
            prefix = next((p for p in OPTIMIZER_PREFIXES if name.startswith(p)), "")
            groups.setdefault(prefix, {})[name[len(prefix) :]] = tensor
    return groups
