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

from ..catalog import Catalog
from ..errors import JaxshardError
from ..rules.match import OPTIMIZER_PREFIXES
from .algebra import Algebra, Geometry, T
from .expressions import Expressions, evaluate, leaf
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
        return replace(catalog, tensors=renamed, layout=None)

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

    def apply_arrays(self, arrays: Dict[str, Any], hyper: Iterable[str] = ()) -> dict[str, Any]:
        """Arrays by name as arrays by the target's names: JAX's stay on their devices.

        Raises:
            JaxshardError: as ``apply``.
        """
        leaves = {n: leaf(n, tuple(x.shape)) for n, x in arrays.items()}
        made = self.tensors(leaves, Expressions(), frozenset(hyper))
        return evaluate(made, arrays)

    def tensors(
        self, tensors: Dict[str, T], algebra: Algebra[T], hyper: frozenset[str] = frozenset()
    ) -> dict[str, T]:
        """What becomes of ``tensors``, in the words of ``algebra``."""
        result = {n: t for n, t in tensors.items() if n in hyper}
        for prefix, group in _by_prefix(tensors, hyper).items():
            for op in self.ops:
                try:
                    group = op.apply(group, algebra)
                except JaxshardError as error:
                    if not prefix:
                        raise
                    raise type(error)(f"names that begin with {prefix}: {error}") from None
            for name, tensor in group.items():
                result[prefix + name] = tensor
        return result

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops)) or "no operation"


def _by_prefix(tensors: Dict[str, T], hyper: frozenset[str]) -> dict[str, dict[str, T]]:
    groups: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        if name not in hyper:
            prefix = next((p for p in OPTIMIZER_PREFIXES if name.startswith(p)), "")
            groups.setdefault(prefix, {})[name[len(prefix) :]] = tensor
    return groups
