"""Rules of families, from the axes of their weights: which dims the axes of a strategy split.

    q            (heads head_dim) embed                 mp,-           split between heads
    experts      expert embed (mlp (gate + up))         ep,-,mp

A dim is split along its outermost factor, because no other split results in boxes. What is inside
that factor is the dim's *unit*, which ranks need whole: a head, a group of heads with its key, a
pair of gate and up.

``rules_of`` turns the rows of a family's table into patterns of names. A pattern is the end of a
name, as short as all rows allow, so it fits the model inside other models and adapters:

    model.layers.{layer}.self_attn.q_proj.weight        *.q_proj.weight
    bert.encoder.layer.{layer}.output.dense.weight      *.output.dense.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..errors import FormatError
from ..models import Family, Row, Sizes
from ..models.axes import Axes, Dim
from .logical_axes import LogicalAxes, assign, first_axis
from .match import base_name
from .table import BUFFER, EITHER, AxisRule, Dims, Rules, Spec, Unit

#: Megatron's tensor parallelism: tokens, heads and hidden units over mp; experts over ep.
TENSOR_PARALLEL: tuple[AxisRule, ...] = (
    ("expert", ("ep",)),
    *(
        (axis, ("mp",))
        for axis in ("token", "vocab", "feature", "heads", "kv_heads", "mlp", "moe_mlp")
    ),
    *((axis, ("mp",)) for axis in ("shared_mlp", "column")),
    ("layer", ("pp",)),
)
_EMBEDDING = "embed"  # the weight, and what its other weights begin with: they precede the layers
_SCALE = ".scale"
_PREDICTIONS = "mtp"  # layers that follow all others; some forms count them apart


def split_dims(axes: Axes) -> Dims:
    """Return the axes of a strategy that split each dim of a tensor of these axes.

    >>> from ..models.axes import parse
    >>> split_dims(parse("expert embed (mlp (gate + up))"))
    (('ep',), (), ('mp',))
    """
    dims = assign([first_axis(dim) for dim in axes.dims], TENSOR_PARALLEL)
    joined = [dim.factors[0] == "expert" and len(dim.factors) > 1 for dim in axes.dims]
    if any(joined):  # experts in one matrix: grouped products take whole experts
        return tuple(split if alone else () for split, alone in zip(dims, joined, strict=True))
    return dims


def rules_of(
    parts: Sequence[tuple[Family, str]],
    sizes: Sizes | None = None,
    logical: LogicalAxes | None = None,
    *,
    is_ordered: bool = True,
) -> Rules:
    """Return the rules of the tensors of families' forms.

    Args:
        parts: families and the names of forms; where rows differ the first decides.
        sizes: the lengths of the axes, from which the units of dims are derived.
        logical: the rules of the user for the axes of a mesh; by default those for strategies.
        is_ordered: whether the rows decide the order of dims where sizes do not.
    """
    rows = [
        (weight, row)
        for family, form in parts
        for weight, row in family.forms[form].items()
        if not weight.endswith(_SCALE)  # placed like its weight
    ]
    more = [pair for family, form in parts for pair in _more_rows(family, form)]
    texts, units = _specs((*rows, *more), sizes, logical)
    layers = _layers(rows)
    ends = [(w, r.name) for w, r in rows if not _is_layered(r) or _run(w) == _PREDICTIONS]
    first, last = ([p for p in ends if _is_first(p[0]) == want] for want in (True, False))
    experts = (_before(r.name, "expert") for _, r in rows if "{expert}" in r.name)
    buffers = (_starred(b) for family, _ in parts for b in family.buffers)
    return Rules(
        name=f"{parts[0][0].name}-{parts[0][1]}".removesuffix("-hf"),
        specs=(*((b, BUFFER) for b in dict.fromkeys(buffers)), *texts),
        layers=layers,
        first=_tops((name for _, name in first), layers),
        last=_tops((name for _, name in last), layers),
        experts=tuple(dict.fromkeys(f"*.{'.'.join(e.split('.')[-3:])}" for e in experts)),
        embedding=tuple(dict.fromkeys(f"*{name}" for w, name in first if w == _EMBEDDING)),
        head=tuple(dict.fromkeys(f"*{name}" for w, name in last if w == "head")),
        units=units,
        is_ordered=is_ordered,
        axes=logical.rules if logical else None,
        mesh_axes=frozenset(logical.mesh_axes if logical else ()),
        notes=logical.notes(rows) if logical else (),
    )


# --- Rows, and those that follow from them


def _more_rows(family: Family, form: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of biases and adapters of the weights of ``form``."""
    for weight, row in family.adapters.get(form, {}).items():
        if base_name(row.name) == row.name:  # a rule for the weight does not find it
            yield weight, row
    for weight, row in family.forms[form].items():
        module, _, end = row.name.rpartition(".")
        if end not in ("weight", "kernel"):
            continue
        own = family.inputs.get(weight.rpartition("/")[2], frozenset[str]())
        into, out = (
            tuple(d for d in row.axes.dims if own.isdisjoint(d.names) == is_out)
            for is_out in (False, True)
        )
        if into or len(row.axes.dims) == 1:
            yield weight, Row(f"{module}.bias", Axes(out))
        if end == "weight" and len(out) == len(into) == 1 and row.axes.dims[0] in into:
            rank = Dim(("rank",))  # of adapters of weights (in, out); A and B are as for others
            yield weight, Row(f"{module}.lora_A*", Axes((rank, *into)))
            yield weight, Row(f"{module}.lora_B*", Axes((*out, rank)))
            yield weight, Row(f"{module}.lora_magnitude_vector*", Axes((rank,)))


def _is_layered(row: Row) -> bool:
    return "{layer}" in row.name or "layer" in row.axes.names


def _is_first(weight: str) -> bool:
    return weight.rpartition("/")[2].partition(".")[0] == _EMBEDDING


def _run(weight: str) -> str:
    return weight.rpartition("/")[0]


# --- Names


def _specs(
    rows: Iterable[tuple[str, Row]], sizes: Sizes | None, logical: LogicalAxes | None
) -> tuple[tuple[tuple[str, str], ...], tuple[Unit, ...]]:
    """Return the specs of ``rows`` by patterns of names, and the units by the same patterns."""
    texts: dict[str, str] = {}
    units: dict[str, tuple[Unit, ...]] = {}
    for weight, row in rows:
        name = _starred(row.name)
        if name in texts:
            continue
        dims = logical.split(weight, row) if logical else split_dims(row.axes)
        if not logical and re.split("[./]", weight)[-1] == _EMBEDDING:
            dims = tuple(tuple("vocab" if a == "mp" else a for a in split) for split in dims)
        texts[name] = _text(dims, row.axes)
        units[name] = _units(row.axes, dims, sizes) if sizes else ()
    globs, unit_globs = _ends(texts), _ends(units)
    found = {glob: text for name, text in texts.items() for glob in globs[name]}
    longest = sorted(found.items(), key=lambda pair: -pair[0].count("."))  # exceptions first
    made = (u._replace(pattern=g) for name in units for g in unit_globs[name] for u in units[name])
    return tuple(longest), tuple(made)


def _text(dims: Dims, axes: Axes) -> str:
    """Return the spec of a tensor; of stacked experts both orders, of which sizes select one."""
    if not any(dims):
        return "-"
    straight = str(Spec(dims))
    is_stacked = len(dims) == 3 and axes.dims[0].factors == ("expert",)
    if not is_stacked or bool(dims[1]) == bool(dims[2]):
        return straight
    return f"{straight}{EITHER}{Spec((dims[0], dims[2], dims[1]))}"


def _units(axes: Axes, dims: Dims, sizes: Sizes) -> tuple[Unit, ...]:
    found = []
    for at, (dim, split) in enumerate(zip(axes.dims, dims, strict=True)):
        first, *rest = dim.factors or ("",)
        if split and rest and isinstance(first, str) and dim.block == 1:
            try:
                length = sizes.length(Dim(tuple(rest)))
            except FormatError:  # config.json contradicts itself, which concerns no rule
                continue
            if length and length > 1:
                found.append(Unit("", at, first, length))
    return tuple(found)


def _starred(name: str) -> str:
    return re.sub(r"\{\w+\*?\}", "*", name)


def _ends(rows: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Return the patterns of each name: its shortest end on which all rows agree.

    >>> _ends({"h.*.q.weight": 1, "h.*.a.out.weight": 2, "h.*.b.out.weight": 3, "norm.weight": 4})
    ... # doctest: +NORMALIZE_WHITESPACE
    {'h.*.q.weight': ('*.q.weight',), 'h.*.a.out.weight': ('*.a.out.weight',),
     'h.*.b.out.weight': ('*.b.out.weight',), 'norm.weight': ('norm.weight', '*.norm.weight')}
    """
    said: dict[str, set[object]] = {}
    for name, what in rows.items():
        for end in _endings(name):
            said.setdefault(end, set()).add(what)
    made: dict[str, tuple[str, ...]] = {}
    for name in rows:
        end = next((e for e in _endings(name) if len(said[e]) == 1), name)
        made[name] = (f"*.{end}",) if end != name and "*" in name else (end, f"*.{end}")
    return made


def _endings(name: str) -> Iterator[str]:
    """Yield the ends of ``name`` from its last two parts to all of it."""
    parts = name.split(".")
    for count in range(2, len(parts)):
        yield ".".join(parts[-count:])
    yield name


def _before(name: str, hole: str) -> str:
    """Return ``name`` up to the number, and the character that ends the number."""
    prefix, hole, rest = name.partition(f"{{{hole}}}")
    return prefix + hole + rest[:1]


def _layers(rows: Iterable[tuple[str, Row]]) -> tuple[str, ...]:
    """Return the prefixes of layers, or () if names do not have the numbers of all layers."""
    layered = [(w, row) for w, row in rows if _is_layered(row) and _run(w) != _PREDICTIONS]
    found = dict.fromkeys(_before(row.name, "layer") for _, row in layered)
    if len(found) > 1 or any("layer" in row.axes.names for _, row in layered):
        return ()
    return tuple(f"*{p}" if p.count(".") > 2 else p for p in found)


def _tops(names: Iterable[str], layers: tuple[str, ...]) -> tuple[str, ...]:
    """Return patterns of the modules of ``names`` that are siblings of the layers, or above."""
    if not layers:
        return ()
    roots = [p.removeprefix("*").split(".")[:-2] for p in layers]
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        depth = max((_shared(parts, root) for root in roots), default=0)
        top = ".".join(parts[: depth + 1]) + (".*" if depth + 1 < len(parts) else "*")
        found[f"*{top}" if depth or layers[0][0] == "*" else top] = None
    return tuple(found)


def _shared(parts: Sequence[str], other: Sequence[str]) -> int:
    """Return how many first parts are the same."""
    pairs = zip(parts, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(parts), len(other)))
