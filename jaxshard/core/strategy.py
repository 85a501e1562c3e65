"""Strategies: sizes of a job's parallel axes, and the order of its ranks.

    dp2mp4pp2       two pipeline stages of 2 x 4 ranks

    stage 0   mp →  0  1  2  3      stage 1   mp →   8  9 10 11
      dp ↓          4  5  6  7        dp ↓          12 13 14 15

Stages are the slowest, tensor ("model") parallel ranks the fastest, which is the
order of MindSpore and Megatron. This module does not depend on tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from math import prod

from ..errors import LayoutError

Axes = tuple[tuple[str, int], ...]  # mesh axes in row-major order: (name, size), last fastest

_PART = re.compile(r"(dp|mp|tp|pp|ep|cp|opt)([0-9]{1,9}|all)|(vocabdp)")
_MAX_RANKS = 1 << 20  # boxes are listed per rank; the largest jobs have tens of thousands
_FIELD = {"tp": "mp", "opt": "optimizer_shard"}


@dataclass(frozen=True, slots=True, init=False)
class Strategy:
    """Sizes of the parallel axes, from a text or one by one.

    Attributes:
        dp: data parallel ranks (replicas of the weights).
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
    >>> str(Strategy(tp=8))
    'dp1mp8'
    """

    dp: int = 1
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
        given: dict[str, int] = {"dp": dp, "mp": mp * tp, "pp": pp, "ep": ep, "cp": cp}
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
        for name in ("dp", "mp", "pp", "ep", "cp"):
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
        data: Axes = (
            (("dp", self.dp),) if self.ep == 1 else (("ep", self.ep), ("edp", self.dp // self.ep))
        )
        context: Axes = (("cp", self.cp),) if self.cp > 1 else ()
        return (*data, *context, ("mp", self.mp))

    @property
    def stage_ranks(self) -> int:
        """Ranks in one pipeline stage."""
        return prod(n for _, n in self.stage_axes)

    @property
    def num_ranks(self) -> int:
        """Ranks in the whole job."""
        return self.stage_ranks * self.pp

    def __str__(self) -> str:
        text = f"dp{self.dp}mp{self.mp}"
        for name in ("pp", "ep", "cp"):
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
            "dp2mp4, dp1mp2pp2, mp8, dp4mp2ep2, dp2mp2optall (axes: dp, mp or tp, pp, ep, cp, "
            "opt; vocabdp leaves the embedding whole over mp)."
        )
    return sizes
