"""All problems of a request, reported as one error before any I/O.

A caller who names tensors should see every mismatch between the names, shapes and dtypes of a
source and of a target at once, not one per attempt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ..errors import LayoutError, NotFoundError, did_you_mean, format_list

_MAX_HINTS = 3  # a search for similar names takes long among 100,000
_MAX_MISFITS = 20


@dataclass
class Problems:
    """Mismatches between a source and a target.

    Attributes:
        source: what the source is called in the report.
        missing: names of the target that the source lacks.
        unexpected: tensors of the source that the target lacks.
        misfits: tensors whose shape, dtype or sharding differs, each with its numbers.
    """

    source: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def check(
        self,
        tensors: Collection[str],
        names: Iterable[str],
        *,
        if_missing: str = "",
        if_unexpected: str = "",
    ) -> None:
        """Raise one error if there are problems.

        Args:
            tensors: names of the source.
            names: names of the target.
            if_missing: the remedy for missing names.
            if_unexpected: the remedy for unexpected tensors.

        Raises:
            NotFoundError: names are missing on either side.
            LayoutError: only shapes, dtypes or shardings differ.

        >>> Problems("src/", misfits=["w: shape (2,), expected (3,)"]).check([], [])
        Traceback (most recent call last):
        jaxshard.errors.LayoutError: 1 tensors do not fit the target:
          w: shape (2,), expected (3,)
        """
        report = []
        if self.missing:
            report.append(
                f"{len(self.missing)} names of the target are not among the {len(tensors)} "
                f"tensors of {self.source}: {format_list(self.missing)}."
                f"{_hints(self.missing, tensors)} {if_missing}"
            )
        if self.unexpected:
            report.append(
                f"{len(self.unexpected)} tensors of {self.source} are not in the target: "
                f"{format_list(self.unexpected)}.{_hints(self.unexpected, names)} {if_unexpected}"
            )
        if self.misfits:
            more = len(self.misfits) - _MAX_MISFITS
            listed = [*self.misfits[:_MAX_MISFITS], *([f"and {more} more"] if more > 0 else ())]
            report.append(
                "\n  ".join((f"{len(self.misfits)} tensors do not fit the target:", *listed))
            )
        if report:
            kind = NotFoundError if self.missing or self.unexpected else LayoutError
            raise kind("\n".join(report))


def _hints(names: list[str], known: Iterable[str]) -> str:
    listed = list(known)
    found = ((name, did_you_mean(name, listed)) for name in names[:_MAX_HINTS])
    return "".join(f" For {name}:{hint}" for name, hint in found if hint)
