"""Strategies and layouts: the parallel axes of a job, and the boxes that each rank holds.

A *placement* is a ``jax.sharding.NamedSharding`` in plain integers, on a range of ranks, so
layouts of 16,384 ranks can be computed, printed and tested without an accelerator. MindSpore's
``dev_matrix`` and ``tensor_map`` are equivalent, with other numbering.

    axes (dp 2, mp 2), spec (("mp",), ())      rank  0  1  2  3
                                               rows  ▀  ▄  ▀  ▄     0 and 2 are replicas
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain, product
from math import prod

from ..errors import LayoutError, html_table
from .box import Box
from .runtime import LRUCache, cached

# --- Strategies: sizes of a job's parallel axes, and the order of its ranks

Axes = tuple[tuple[str, int], ...]  # mesh axes in row-major order: (name, size), last fastest

_PART = re.compile(r"(dp|fsdp|mp|tp|pp|ep|cp|opt)([0-9]{1,9}|all)|(vocabdp)")
_MAX_RANKS = 1 << 20  # boxes are listed per rank; the largest jobs have tens of thousands
_FIELD = {"tp": "mp", "opt": "optimizer_shard"}


@dataclass(frozen=True, slots=True, init=False)
class Strategy:
    """Sizes of the parallel axes, from a text or one by one.

    Attributes:
        dp: data parallel ranks (replicas of the weights).
        fsdp: further data parallel ranks, over which every tensor is split ("fully sharded").
        mp: tensor ("model") parallel ranks; ``tp`` is an alias.
        pp: pipeline stages.
        ep: expert parallel ways; a part of ``dp``, as in MindSpore.
        cp: context parallel ways; weights are replicas over it.
        optimizer_shard: further ways to split dim 0 over the replicas
            (ZeRO, MindSpore's optimizer parallel); -1 for all of them, 1 for none.
        vocab_emb_dp: keep the embedding whole on every tensor-parallel rank; written
            ``vocabdp``.

    >>> Strategy("dp2mp4pp2").num_ranks
    16
    >>> str(Strategy(tp=8)), str(Strategy(fsdp=4, mp=2))
    ('dp1mp8', 'fsdp4mp2')
    """

    dp: int = 1
    fsdp: int = 1
    mp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    optimizer_shard: int = 1
    vocab_emb_dp: bool = False

    def __init__(
        self,
        text: str | None = None,
        /,
        *,
        dp: int = 1,
        fsdp: int = 1,
        mp: int = 1,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        cp: int = 1,
        optimizer_shard: int = 1,
        vocab_emb_dp: bool = False,
    ) -> None:
        """Make the strategy of ``text``, as ``parse`` does, or of the given sizes.

        Raises:
            LayoutError: the sizes are invalid, or given twice.
        """
        if mp != 1 and tp != 1:
            raise LayoutError(f"strategy: mp={mp} and tp={tp} are the same axis. Give one of them.")
        given: dict[str, int] = {
            "dp": dp,
            "fsdp": fsdp,
            "mp": mp * tp,
            "pp": pp,
            "ep": ep,
            "cp": cp,
        }
        given |= {"optimizer_shard": optimizer_shard, "vocab_emb_dp": vocab_emb_dp}
        if text is not None:
            twice = [f"{n}={v}" for n, v in given.items() if v != _DEFAULTS[n]]
            if twice:
                raise LayoutError(
                    f"strategy: {text!r} and {', '.join(twice)} are both given. Give one of them."
                )
            given |= _sizes(str(text))
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        for name in ("dp", "fsdp", "mp", "pp", "ep", "cp"):
            if getattr(self, name) < 1:
                raise LayoutError(f"strategy: {name}={getattr(self, name)}; it must be 1 or more.")
        if self.dp % self.ep:
            raise LayoutError(
                f"strategy: ep={self.ep} does not divide dp={self.dp}. "
                "Expert parallel ranks are a part of the data parallel ones."
            )
        if self.num_ranks > _MAX_RANKS:
            raise LayoutError(
                f"strategy: {self} has {self.num_ranks} ranks, more than {_MAX_RANKS}. Correct its "
                "sizes."
            )
        if self.optimizer_shard != -1 and self.optimizer_shard < 1:
            raise LayoutError(
                f"strategy: optimizer_shard={self.optimizer_shard}; give a number of ways, "
                "-1 for all replicas, or 1 for none."
            )

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Parse a strategy such as ``dp2mp4pp2``; ``opt2`` or ``optall`` shards the optimizer.

        Raises:
            LayoutError: the text is not a strategy, or names an axis twice.

        >>> Strategy.parse("dp2mp4vocabdp")
        Strategy(dp=2, mp=4, vocab_emb_dp=True)
        """
        return cls(text)

    @classmethod
    def of(cls, target: str | Strategy) -> Strategy:
        """Return ``target``, parsed if it is a text (errors as ``parse``)."""
        return target if isinstance(target, Strategy) else cls.parse(target)

    @property
    def stage_axes(self) -> Axes:
        """Mesh axes of one pipeline stage, slowest first.

        With experts, ``dp`` is two axes: ``ep`` and the replicas of each expert, ``edp``.

        >>> Strategy(dp=4, mp=2, ep=2).stage_axes
        (('ep', 2), ('edp', 2), ('mp', 2))
        """
        return self.mesh_axes.stage_axes

    @property
    def mesh_axes(self) -> MeshAxes:
        """All mesh axes, and their meaning in rules."""
        data: Axes = (
            (("dp", self.dp),) if self.ep == 1 else (("ep", self.ep), ("edp", self.dp // self.ep))
        )
        more = tuple((n, getattr(self, n)) for n in ("fsdp", "cp") if getattr(self, n) > 1)
        stages: Axes = (("pp", self.pp),) if self.pp > 1 else ()
        return MeshAxes(
            (*stages, *data, *more, ("mp", self.mp)),
            {
                "pp": "pp",
                "ep": "ep",
                "dp": "dp",
                "edp": "dp",
                "fsdp": "fsdp",
                "cp": "cp",
                "mp": "mp",
            },
            text=str(self),
            optimizer_shard=self.optimizer_shard,
            vocab_emb_dp=self.vocab_emb_dp,
        )

    @property
    def stage_ranks(self) -> int:
        """Ranks in one pipeline stage."""
        return prod(n for _, n in self.stage_axes)

    @property
    def num_ranks(self) -> int:
        """Ranks in the whole job."""
        return self.stage_ranks * self.pp

    def __str__(self) -> str:
        text = "" if self.fsdp > 1 else f"dp{self.dp}mp{self.mp}"
        for name in ("pp", "ep", "cp") if text else ("dp", "fsdp", "mp", "pp", "ep", "cp"):
            size = getattr(self, name)
            text += f"{name}{size}" if size > 1 else ""
        if self.optimizer_shard != 1:
            text += "optall" if self.optimizer_shard == -1 else f"opt{self.optimizer_shard}"
        return text + "vocabdp" * self.vocab_emb_dp

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"Strategy({', '.join(changed)})"


_DEFAULTS = {f.name: f.default for f in fields(Strategy)}


def _sizes(text: str) -> dict[str, int]:
    """Parse ``text`` into values of the fields, by name."""
    sizes: dict[str, int] = {}
    at = 0
    lowered = text.strip().lower()
    for match in _PART.finditer(lowered):
        name = "vocab_emb_dp" if match[3] else _FIELD.get(match[1], match[1])
        if match.start() != at or name in sizes or (match[2] == "all" and match[1] != "opt"):
            break
        sizes[name] = True if match[3] else -1 if match[2] == "all" else int(match[2])
        at = match.end()
    if not sizes or at != len(lowered):
        raise LayoutError(
            f"{text[:60]!r} is not a strategy. Write each axis once with its size: "
            "dp2mp4, dp1mp2pp2, mp8, fsdp4mp2, dp4mp2ep2, dp2mp2optall (axes: dp, fsdp, mp or "
            "tp, pp, ep, cp, opt; vocabdp leaves the embedding whole over mp)."
        )
    return sizes


@dataclass(frozen=True, slots=True)
class MeshAxes:
    """The axes along which ranks are numbered, and what each is in rules.

    Attributes:
        axes: slowest first: those of the pipeline stages, those of the experts, all others.
        roles: by name, the axis of a strategy that an axis acts as (``{"tensor": "mp"}``).
        text: what messages call them.
        by_name: rules name the axes themselves, and split tensors completely.
        optimizer_shard: as in `Strategy`.
        vocab_emb_dp: as in `Strategy`.
    """

    axes: Axes
    roles: Mapping[str, str]
    text: str
    by_name: bool = False
    optimizer_shard: int = 1
    vocab_emb_dp: bool = False

    def named(self, rule_axis: str) -> tuple[str, ...]:
        """Return the axes that ``rule_axis`` means: by their role, or one by its name.

        >>> MeshAxes((("data", 2), ("fsdp", 4)), {"data": "dp", "fsdp": "fsdp"}, "").named("dp")
        ('data', 'fsdp')
        """
        if self.by_name and rule_axis in dict(self.axes):
            return (rule_axis,)
        roles: tuple[str, ...] = _MEANS.get(rule_axis, (rule_axis,))
        if rule_axis == "vocab" and self.vocab_emb_dp:
            roles = ()
        return tuple(a for a, _ in self.axes if self.roles.get(a) in roles)

    def without_stages(self) -> MeshAxes:
        """Return the axes for tensors that have all layers: stages split a dim of them."""
        roles = {a: "layer" if role == "pp" else role for a, role in self.roles.items()}
        return replace(self, roles=roles)

    def ways(self, rule_axis: str) -> int:
        """Return the number of ranks along the axes that ``rule_axis`` means."""
        size = dict(self.axes)
        return prod(size[a] for a in self.named(rule_axis))

    @property
    def stage_axes(self) -> Axes:
        """The axes of one pipeline stage."""
        return tuple((a, n) for a, n in self.axes if self.roles.get(a) != "pp")

    @property
    def expert_axes(self) -> Axes:
        """The axes of the ranks of one expert in a stage."""
        return tuple((a, n) for a, n in self.stage_axes if self.roles.get(a) != "ep")

    @property
    def stage_ranks(self) -> int:
        """Ranks in one pipeline stage."""
        return prod(n for _, n in self.stage_axes)

    @property
    def num_ranks(self) -> int:
        """Ranks in the whole job."""
        return prod(n for _, n in self.axes)

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.num_ranks // self.stage_ranks

    def __str__(self) -> str:
        return self.text


#: Axes of rules that stand for several roles.
_MEANS = {
    "pp": ("pp", "layer"),
    "vocab": ("mp",),
    "dp": ("ep", "dp", "fsdp"),
    "edp": ("dp", "fsdp"),
}

# --- Layouts: which rank holds which box of each tensor

Spec = tuple[tuple[str, ...], ...]  # per dim, the mesh axes that split it, outer to inner

_MAX_CACHED_RANKS = 1 << 20  # 64 shapes on 16,384 ranks


@dataclass(frozen=True, slots=True)
class Placement:
    """Split of one tensor over the ranks ``first_rank … first_rank + num_ranks - 1``.

    Attributes:
        axes: the mesh axes over those ranks in row-major order, last fastest.
        spec: per tensor dim the axes that split it; missing trailing dims are whole.
        first_rank: the first rank of its pipeline stage, or of a part of one.
    """

    axes: Axes
    spec: Spec = ()
    first_rank: int = 0

    @property
    def num_ranks(self) -> int:
        """Number of ranks that hold a box of the tensor."""
        return prod(n for _, n in self.axes)

    @property
    def ranks(self) -> range:
        """The ranks that hold a box of the tensor."""
        return range(self.first_rank, self.first_rank + self.num_ranks)

    def ways(self, dim: int) -> int:
        """Return the number of parts that ``dim`` is split into."""
        size = dict(self.axes)
        return prod(size[a] for a in self.spec[dim]) if dim < len(self.spec) else 1

    def boxes(self, shape: tuple[int, ...]) -> tuple[Box, ...]:
        """Return the box of each rank of a tensor of ``shape``, in rank order.

        Raises:
            LayoutError: a dim does not divide, or the spec has more dims than the tensor.

        >>> Placement((("dp", 2), ("mp", 2)), ((), ("mp",))).boxes((4, 8))[1]
        Box(start=(0, 4), stop=(4, 8))
        """
        return _boxes(self.axes, self.spec, shape)

    def box(self, shape: tuple[int, ...], rank: int) -> Box:
        """Return the box of ``rank``, one of ``ranks``, without computing the others.

        Raises:
            LayoutError: as ``boxes``.

        >>> Placement((("dp", 2), ("mp", 2)), ((), ("mp",))).box((4, 8), 1)
        Box(start=(0, 4), stop=(4, 8))
        """
        return _box(self.axes, self.spec, shape, rank - self.first_rank)

    def shards(self, shape: tuple[int, ...]) -> tuple[Shard, ...]:
        """Return the distinct boxes with the ranks that hold each, relative to ``first_rank``.

        Raises:
            LayoutError: as ``boxes``.

        >>> Placement((("dp", 2), ("mp", 2)), (("mp",),)).shards((4,))[0]
        Shard(box=Box(start=(0,), stop=(2,)), holders=(0, 2))
        """
        return _shards(self.axes, self.spec, shape)

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of each rank's box.

        Raises:
            LayoutError: as ``boxes``.
        """
        return _local_shape(self.axes, self.spec, shape)

    def __str__(self) -> str:
        sizes = " ".join(f"{a}{n}" for a, n in self.axes)
        dims = ",".join("+".join(axes) or "-" for axes in self.spec) or "-"
        return f"[{dims}] over {sizes or 'one rank'} from rank {self.first_rank}"


@dataclass(frozen=True, slots=True)
class Shard:
    """Distinct box of one tensor, and its holders, counted from the first rank."""

    box: Box
    holders: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The boxes that each rank holds, for a whole checkpoint.

    A tensor may be placed in several disjoint sets of ranks (a tied embedding in the
    first and the last stage). No rank holds tensors without a placement.

    Attributes:
        notes: findings that are not errors.
        absent: tensors of the checkpoint's strategy that its files lack. MindSpore counts
            them to decide which replica stores a tensor.
        unknown: ranks whose tensors are unknown, because the strategy of their stage is missing.
    """

    num_ranks: int
    placements: Mapping[str, tuple[Placement, ...]] = field(repr=False)
    stage_axes: Axes = ()
    notes: tuple[str, ...] = ()
    absent: Mapping[str, tuple[Placement, ...]] = field(default_factory=dict, repr=False)
    unknown: tuple[int, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        return f"Layout({self.num_ranks:,} ranks, {len(self.placements):,} tensors)"

    def _repr_html_(self) -> str:
        """Return the number of tensors per placement, as a table for notebooks."""
        found = Counter(chain.from_iterable(self.placements.values()))
        rows = [(p, f"{p.ranks.start}-{p.ranks.stop - 1}", n) for p, n in found.most_common(50)]
        return html_table(repr(self), ("placement", "ranks", "tensors"), rows)

    def box_of(self, name: str, shape: tuple[int, ...], rank: int) -> Box | None:
        """Return the box of tensor ``name`` that ``rank`` holds, or None."""
        for placement in self.placements.get(name, ()):
            if rank in placement.ranks:
                return placement.box(shape, rank)
        return None


_Key = tuple[Axes, Spec, tuple[int, ...]]
_BOX_CACHE = LRUCache[_Key, tuple[Box, ...]](_MAX_CACHED_RANKS)
_SHARD_CACHE = LRUCache[_Key, tuple[Shard, ...]](_MAX_CACHED_RANKS)


def check_divides(placement: Placement, shape: tuple[int, ...], name: str = "") -> None:
    """Raise if the placement does not split ``shape`` into equal boxes.

    Raises:
        LayoutError: with the size to pad to, and the rule that leaves the dim whole.
    """
    where = f"{name}: " if name else ""
    spec = placement.spec
    if len(spec) > len(shape):
        raise LayoutError(
            f"{where}the spec {_text(spec)} has {len(spec)} dims, but the tensor has {len(shape)} "
            f"(shape {shape})."
        )
    size = dict(placement.axes)
    for dim, axes in enumerate(spec):
        ways = prod(size[a] for a in axes)
        if shape[dim] % ways:
            named = ", ".join(f"{a}={size[a]}" for a in axes)
            whole = tuple(() if d == dim else a for d, a in enumerate(spec))
            raise LayoutError(
                f"{where}dim {dim} of shape {shape} has {shape[dim]} elements, which {named} does "
                f"not divide. Pad it to {-(-shape[dim] // ways) * ways}, or leave it whole: "
                f'None in a PartitionSpec, the rule "{name or "NAME"}" = "{_text(whole)}".'
            )


def _text(spec: Spec) -> str:
    return ",".join("+".join(axes) or "-" for axes in spec) or "-"


@cached(4096)
def _local_shape(axes: Axes, spec: Spec, shape: tuple[int, ...]) -> tuple[int, ...]:
    placement = Placement(axes, spec)
    check_divides(placement, shape)
    return tuple(n // placement.ways(d) for d, n in enumerate(shape))


def _boxes(axes: Axes, spec: Spec, shape: tuple[int, ...]) -> tuple[Box, ...]:
    key = (axes, spec, shape)
    return _BOX_CACHE.get(key, _num_ranks(axes), lambda: _all_boxes(*key))


def _all_boxes(axes: Axes, spec: Spec, shape: tuple[int, ...]) -> tuple[Box, ...]:
    local, size = _local_shape(axes, spec, shape), dict(axes)
    made: dict[tuple[int, ...], Box] = {}  # replicas share one
    boxes = []
    for coordinates in product(*(range(n) for _, n in axes)):
        index = _index(spec, size, dict(zip(size, coordinates, strict=True)))
        if index not in made:
            made[index] = _part(index, local)
        boxes.append(made[index])
    return tuple(boxes)


@cached(1 << 14)
def _box(axes: Axes, spec: Spec, shape: tuple[int, ...], number: int) -> Box:
    """Return the box of rank ``number``, counted from the first rank."""
    at: dict[str, int] = {}
    for name, size in reversed(axes):
        number, at[name] = divmod(number, size)
    return _part(_index(spec, dict(axes), at), _local_shape(axes, spec, shape))


def _index(spec: Spec, size: Mapping[str, int], at: Mapping[str, int]) -> tuple[int, ...]:
    """Return the part number along each dim of the rank at mesh coordinates ``at``."""
    index = []
    for split in spec:
        part = 0
        for a in split:  # the first axis is the slowest, as in PartitionSpec
            part = part * size[a] + at[a]
        index.append(part)
    return tuple(index)


def _part(index: tuple[int, ...], local: tuple[int, ...]) -> Box:
    """Return the box of part ``index`` of each dim; all parts have the shape ``local``."""
    index += (0,) * (len(local) - len(index))
    start = tuple(i * n for i, n in zip(index, local, strict=True))
    return Box(start, tuple(a + n for a, n in zip(start, local, strict=True)))


def _shards(axes: Axes, spec: Spec, shape: tuple[int, ...]) -> tuple[Shard, ...]:
    key = (axes, spec, shape)
    return _SHARD_CACHE.get(key, _num_ranks(axes), lambda: _all_shards(*key))


def _all_shards(axes: Axes, spec: Spec, shape: tuple[int, ...]) -> tuple[Shard, ...]:
    holders: dict[Box, list[int]] = {}
    for rank, box in enumerate(_boxes(axes, spec, shape)):
        holders.setdefault(box, []).append(rank)
    return tuple(Shard(box, tuple(ranks)) for box, ranks in holders.items())


def _num_ranks(axes: Axes) -> int:
    return prod(n for _, n in axes)


def shard_dim_over_replicas(placement: Placement, ways: int, dim: int = 0) -> Placement:
    """Split ``dim`` by ``ways`` more over axes that only hold replicas.

    This is the optimizer shard (ZeRO; MindSpore's ``opt_weight_shard_size``). Replica axes are
    used from the innermost outward; if only a part of one is needed, the axis is factored and
    its fast part used. ``ways=-1`` uses all replicas.

    Raises:
        LayoutError: there are fewer replicas, or ``ways`` does not factor over them.

    >>> shard_dim_over_replicas(Placement((("dp", 4), ("mp", 2)), (("mp",),)), 2)
    Placement(axes=(('dp_outer', 2), ('dp', 2), ('mp', 2)), spec=(('mp', 'dp'),), first_rank=0)
    """
    used = {a for axes in placement.spec for a in axes}
    free = [(a, n) for a, n in placement.axes if a not in used and n > 1]
    replicas = prod(n for _, n in free)
    left = replicas if ways == -1 else ways
    axes, chosen = list(placement.axes), list[str]()
    for name, size in reversed(free):
        if left == 1:
            break
        if left % size and size % left:
            left = 0
            break
        if size > left:
            axes = _factor(axes, name, left)
        chosen.insert(0, name)
        left //= min(size, left)
    if left != 1:
        raise LayoutError(
            f"optimizer shard: {ways} ways do not fit the {replicas} replicas of "
            f"{placement} (axes {free})."
        )
    spec = list(placement.spec) + [()] * (dim + 1 - len(placement.spec))
    spec[dim] = (*spec[dim], *chosen)
    return replace(placement, axes=tuple(axes), spec=tuple(spec))


def _factor(axes: list[tuple[str, int]], name: str, fast: int) -> list[tuple[str, int]]:
    """Factor the axis ``name`` in two; the fast part keeps the name."""
    out = list[tuple[str, int]]()
    for a, n in axes:
        out += [(f"{a}_outer", n // fast), (a, fast)] if a == name else [(a, n)]
    return out
