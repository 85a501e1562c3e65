"""Cadence: is it time to save? By steps, by seconds, or by whichever comes first.

This module reads no clock: the time is given to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayoutError


@dataclass(frozen=True, slots=True)
class Cadence:
    """When to save.

    Attributes:
        every_steps: save steps that this divides; 0 for never.
        every_seconds: save once this time has passed since the last save; 0 for never.

    >>> Cadence(every_steps=10).is_due(20, now=0.0, last_step=10, last_time=0.0)
    True
    >>> Cadence(every_seconds=60).is_due(21, now=59.0, last_step=20, last_time=0.0)
    False
    """

    every_steps: int = 0
    every_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.every_steps < 0 or not self.every_seconds >= 0:
            raise LayoutError(
                f"save every {self.every_steps} steps or {self.every_seconds} seconds: neither "
                "may be negative. Give 0 for never."
            )

    def is_due(self, step: int, *, now: float, last_step: int | None, last_time: float) -> bool:
        """Whether ``step`` should be saved, given when the last one was (or saving began)."""
        if step == last_step:
            return False  # the last step of an epoch and of the run are often the same
        by_steps = self.every_steps > 0 and step % self.every_steps == 0
        by_seconds = self.every_seconds > 0 and now - last_time >= self.every_seconds
        return by_steps or by_seconds
