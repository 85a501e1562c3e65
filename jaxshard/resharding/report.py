"""Totals of a prepared reshard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .geometry import Traffic


@dataclass(frozen=True, slots=True)
class LeafPlan:
    """One array: its route, the shardings between, and the bytes on each kind of link, all legs.

    Attributes:
        largest_bytes: the largest intermediate on a device: of a program, its largest array;
            of pieces, all that are in flight together.
        in_flight_bytes: all intermediates on the fullest device, beyond source and target.
            Leaves that share a program share both numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    between: tuple[str, ...]
    same_device_bytes: int
    cross_device_bytes: int
    largest_bytes: int
    in_flight_bytes: int


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """All leaves, and the number of programs that were compiled for them."""

    leaves: tuple[LeafPlan, ...]
    num_programs: int
    device_bytes: int | None = None

    @property
    def traffic(self) -> Traffic:
        """Bytes delivered, by link."""
        return Traffic(
            sum(leaf.same_device_bytes for leaf in self.leaves),
            sum(leaf.cross_device_bytes for leaf in self.leaves),
        )

    @property
    def in_flight_bytes(self) -> int:
        """The most that any one program has in flight on one device."""
        return max((leaf.in_flight_bytes for leaf in self.leaves), default=0)

    def __str__(self) -> str:
        by_kind: dict[str, list[LeafPlan]] = defaultdict(list)
        for leaf in self.leaves:
            by_kind[leaf.kind].append(leaf)
        rows: list[tuple[str, ...]] = [
            ("route", "arrays", "same device", "device to device", "largest", "in flight")
        ]
        rows += [_row(kind, leaves) for kind, leaves in by_kind.items()]
        rows.append(_row("all", self.leaves))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                f"{cell:<{w}}" if n == 0 else f"{cell:>{w}}"
                for n, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines += [
            f"{leaf.name}: by way of {', '.join(leaf.between)}"
            for leaf in self.leaves
            if leaf.between
        ]
        bound = "" if self.device_bytes is None else f", at most {self.device_bytes:,} in flight"
        lines.append(f"{self.num_programs} compiled programs{bound}")
        return "\n".join(lines)


def _row(kind: str, leaves: Sequence[LeafPlan]) -> tuple[str, ...]:
    return (
        kind,
        str(len(leaves)),
        f"{sum(leaf.same_device_bytes for leaf in leaves):,}",
        f"{sum(leaf.cross_device_bytes for leaf in leaves):,}",
        f"{max((leaf.largest_bytes for leaf in leaves), default=0):,}",
        f"{max((leaf.in_flight_bytes for leaf in leaves), default=0):,}",
    )
