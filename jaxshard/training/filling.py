"""Filling: the leaves of a target from the tensors of a catalog.

Leaves that are arrays on devices, or describe them, are loaded where they are to lie;
NumPy's and Python's numbers are read on the host. Every complaint about names, shapes
and dtypes is made at once, before a byte is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from numpy.typing import NDArray

from .. import rules as family_rules
from ..box import Box
from ..catalog import Catalog, Tensor
from ..conversion import default_budget
from ..devices import rank_devices, shardings
from ..elements import numpy_dtype
from ..errors import LayoutError, NotFoundError, nearest, some
from ..formats.job_numbers import NAMES
from ..loading import load
from ..planning import Move, move_into
from ..storage.engine import fit_budget, run
from ..storage.sources import open_source
from ..strategy import Strategy
from ..targets import lay_out_for
from .states import Leaf, Roles, as_array, is_optimizer_name, take_apart

_ROLES = {
    "all": ("weights", "optimizer", "rest"),
    "weights": ("weights",),
    "optimizer": ("optimizer",),
    "no_optimizer": ("weights", "rest"),
}


@dataclass(frozen=True)
class Where:
    """How a state is laid out and called, where its own leaves do not say.

    Attributes:
        strategy: by which leaves without a sharding are laid out.
        rules: layout rules that go before the family's.
        devices: the device of each rank.
        roles: where a state's weights and its optimizer's state are.
        rename: the names of weights in files.
        strict: refuse leaves that the step has not, and tensors that the target has not.
    """

    strategy: str | Strategy | None = None
    rules: family_rules.Rules | None = None
    devices: Sequence[jax.Device] | None = None
    roles: Roles = Roles()  # noqa: RUF009 - frozen
    rename: Callable[[str], str] | None = None
    strict: bool = True
    workers: int | None = None
    host_bytes: int | None = None


def fill(catalog: Catalog, target: Any, where: Where, parts: str = "all") -> Any:
    """``target`` with its leaves as they are in ``catalog``.

    Raises:
        NotFoundError: names are missing on either side.
        LayoutError: shapes or dtypes differ, or the target does not fit the devices.
        FormatError, CoverageError, StorageError: as ``load``.
    """
    if isinstance(target, str | Strategy):
        return load(
            _with_numbers(catalog),
            target,
            devices=where.devices,
            rules=where.rules,
            workers=where.workers,
            host_bytes=where.host_bytes,
        )
    state = take_apart(target, where.roles, where.rename)
    wanted = [leaf for leaf in state.leaves if leaf.role in _ROLES[parts]]
    found = _check(catalog, wanted, where.strict, parts)
    structs = {leaf.name: _struct(leaf) for leaf in found if _is_on_devices(leaf)}
    structs = _placed(catalog, structs, where)
    arrays = _on_devices(catalog, structs, where)
    values = _on_host(catalog, [leaf.name for leaf in found if not _is_on_devices(leaf)])
    names = {leaf.name for leaf in found}
    return state.build(
        [
            _as_was(leaf, arrays.get(leaf.name), values.get(leaf.name))
            if leaf.name in names
            else leaf.value
            for leaf in state.leaves
        ]
    )


def _check(catalog: Catalog, wanted: list[Leaf], strict: bool, parts: str) -> list[Leaf]:
    """The leaves that the step has; everything that does not fit is told at once."""
    missing = [leaf for leaf in wanted if leaf.name not in catalog.tensors]
    if missing and (strict or any(isinstance(m.value, jax.ShapeDtypeStruct) for m in missing)):
        names = [leaf.name for leaf in missing]
        raise NotFoundError(
            f"{len(names)} leaves of the target are not in the step: {some(names)}."
            f"{nearest(names[0], catalog.tensors)} Restore weights only with parts='weights', or "
            "what is there with strict=False."
        )
    over = _left_over(catalog, {leaf.name for leaf in wanted}, parts)
    if over and strict:
        raise NotFoundError(
            f"{len(over)} tensors of the step are not in the target: {some(over)}. They would be "
            "lost; give a target that has them, or strict=False."
        )
    found = [leaf for leaf in wanted if leaf.name in catalog.tensors]
    wrong = [why for leaf in found if (why := _misfit(leaf, catalog.tensors[leaf.name]))]
    if wrong:
        raise LayoutError(f"{len(wrong)} leaves do not fit the step: {some(wrong)}.")
    return found


def _left_over(catalog: Catalog, wanted: set[str], parts: str) -> list[str]:
    """Tensors that nobody asked for and somebody would miss."""
    over = [n for n in catalog.tensors if n not in wanted and n not in NAMES]
    if parts == "all":
        return over
    if parts == "optimizer":
        return [n for n in over if is_optimizer_name(n)]
    lost = [n for n in over if not is_optimizer_name(n)]
    return [n for n in lost if n not in catalog.hyper and catalog.tensors[n].shape]


def _misfit(leaf: Leaf, tensor: Tensor) -> str:
    struct = _struct(leaf)
    stored = numpy_dtype(tensor.dtype)
    if tuple(struct.shape) != tensor.shape:
        return f"{leaf.path} has shape {tuple(struct.shape)}, saved was {tensor.shape}"
    plain = isinstance(leaf.value, bool | int | float)
    if not plain and struct.dtype != stored:
        return f"{leaf.path} is {struct.dtype}, saved was {stored}"
    return ""


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _is_on_devices(leaf: Leaf) -> bool:
    return isinstance(leaf.value, jax.Array | jax.ShapeDtypeStruct)


def _struct(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """What is stored for a leaf, and where it is to lie if the leaf says."""
    value = leaf.value
    if not _is_on_devices(leaf):
        array = as_array(value)
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    sharding = getattr(value, "sharding", None)
    if _is_key(value):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(value.shape, value.dtype))
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def _placed(
    catalog: Catalog, structs: dict[str, jax.ShapeDtypeStruct], where: Where
) -> dict[str, jax.ShapeDtypeStruct]:
    """``structs``, all with a sharding: by the strategy, if there is one."""
    if not structs:
        return {}  # and a state of NumPy's arrays wakes no device
    if where.strategy is None:
        lone = SingleDeviceSharding((where.devices or jax.devices())[0])
        return {
            name: s if s.sharding is not None else _with(s, lone) for name, s in structs.items()
        }
    strategy = where.strategy
    strategy = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    chosen = replace(catalog, tensors={n: catalog.tensors[n] for n in structs})
    chosen = _with_numbers(chosen)
    layout = lay_out_for(chosen, strategy, where.rules)
    found = shardings(layout, rank_devices(strategy, where.devices), structs)
    return {name: _with(s, found[name]) for name, s in structs.items()}


def _with_numbers(catalog: Catalog) -> Catalog:
    """``catalog``, in which the rest of a state is told from weights: no rule speaks of it."""
    rest = {
        t.name
        for t in catalog.tensors.values()
        if t.shape == () or t.name.startswith("opt_state.") or t.dtype.name[0] not in "FB"
    }
    tensors = catalog.tensors
    return replace(catalog, hyper=catalog.hyper | frozenset(rest & tensors.keys()))


def _with(struct: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def _on_devices(
    catalog: Catalog, structs: Mapping[str, jax.ShapeDtypeStruct], where: Where
) -> Mapping[str, jax.Array]:
    if not structs:
        return {}
    chosen = replace(catalog, tensors={n: catalog.tensors[n] for n in structs})
    found: Mapping[str, jax.Array] = load(
        chosen, dict(structs), workers=where.workers, host_bytes=where.host_bytes
    )
    return found


def _on_host(catalog: Catalog, names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """Whole tensors in memory of their own."""
    out = {name: np.empty(catalog.tensors[name].num_bytes, np.uint8) for name in names}

    def write(move: Move, target: int, offset: int, buffer: memoryview) -> int:
        out[move.name][offset : offset + len(buffer)] = np.frombuffer(buffer, np.uint8)
        return 1

    moves = [
        move_into(catalog.tensors[n], {Box.whole(catalog.tensors[n].shape): (0,)})
        for n in names
        if catalog.tensors[n].num_bytes
    ]
    files = open_source(catalog)
    try:
        run(moves, files.read, write, budget=fit_budget(default_budget(), 1))
    finally:
        files.close()
    return {
        name: data.view(numpy_dtype(catalog.tensors[name].dtype)).reshape(
            catalog.tensors[name].shape
        )
        for name, data in out.items()
    }


def _as_was(leaf: Leaf, array: jax.Array | None, value: NDArray[np.generic] | None) -> Any:
    """What was stored for a leaf as the kind of leaf it was."""
    if array is not None:
        if not _is_key(leaf.value):
            return array
        return jax.random.wrap_key_data(array, impl=_implementation(leaf.value))
    assert value is not None
    if isinstance(leaf.value, bool | int | float):
        return type(leaf.value)(value[()])
    if isinstance(leaf.value, np.generic):
        return value[()]
    return value


def _implementation(key: Any) -> str:
    if isinstance(key, jax.Array):
        return str(jax.random.key_impl(key))
    return str(key.dtype._impl.name)  # a description of a key has no public way to say it
