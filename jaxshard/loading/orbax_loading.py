"""Loading from Orbax: its own library reads the shards and makes the arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from ..catalog import Catalog
from .wanted import Want


def restored_by_orbax(catalog: Catalog, wants: Sequence[Want]) -> bool:
    """Whether Orbax can make every array: each is a tensor as stored, and wanted once."""
    names = [want.tensor.name for want in wants]
    return (
        catalog.format == "orbax"
        and len(set(names)) == len(names)
        and all(catalog.tensors.get(want.tensor.name) is want.tensor for want in wants)
    )


def restore(catalog: Catalog, wants: Sequence[Want]) -> list[jax.Array]:
    """The arrays of ``wants``, in their order.

    Raises:
        FormatError: Orbax cannot read them.
    """
    from ..formats import orbax  # noqa: PLC0415 - a second to import, and seldom wanted

    found = orbax.load(catalog, {w.tensor.name: (w.dtype, w.sharding) for w in wants})
    return [found[want.tensor.name] for want in wants]
