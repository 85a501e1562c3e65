"""Cadence: is it time to save? By steps, by seconds, or by whichever comes first.

    maybe_save(40)   began      saved     40 is on the disk: not due again
    maybe_save(40)   began      failed    40 counts as never begun: due again
    restore → 30                          30 is on the disk, and the steps after it are due again

This module reads no clock: the time is given to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class Mark:
    """A save: its step, and when it began; None for a state that no step holds."""

    step: int | None
    time: float


class Schedule:
    """Decides when a run saves, from what is saved and good, not from what was last tried.

    ``ended`` may be called by the thread that saves in the background. All processes of a job
    make the same calls in the same order, but see a background save end at different times:
    only where ``step == tried`` can that change the answer of ``is_due``.

    Attributes:
        tried: the step that was last begun or restored.
    """

    def __init__(self, cadence: Cadence, now: float) -> None:
        self._cadence = cadence
        self._saved = Mark(None, now)
        self._begun: Mark | None = None  # on its way to the disk
        self.tried: int | None = None

    @property
    def never_saves(self) -> bool:
        """Whether no step is ever due."""
        return self._cadence == Cadence()

    @property
    def is_timed(self) -> bool:
        """Whether the clock counts, which differs between processes."""
        return self._cadence.every_seconds > 0

    def is_due(self, step: int, now: float) -> bool:
        """Whether ``step`` should be saved now."""
        self._reach(step)
        last = self._begun or self._saved
        return self._cadence.is_due(step, now=now, last_step=last.step, last_time=last.time)

    def began(self, step: int, now: float) -> None:
        """Count ``step`` as saved until ``ended`` reports otherwise."""
        self._reach(step)
        self._begun, self.tried = Mark(step, now), step

    def ended(self, *, saved: bool) -> None:
        """Record how the save that began last has ended."""
        begun = self._begun
        if saved and begun is not None:
            self._saved = begun
        self._begun = None

    def restored(self, step: int | None, now: float) -> None:
        """Record that the run goes on from ``step``; None if no step holds all of its state.

        Then what is not saved yet is as old as before.
        """
        time = now if step is not None else self._saved.time
        self._saved, self._begun, self.tried = Mark(step, time), None, step

    def _reach(self, step: int) -> None:
        """Forget steps beyond ``step``: the loop went back without ``restore``."""
        if self.tried is None or step >= self.tried:
            return
        self._saved, self.tried = replace(self._saved, step=None), None
        if self._begun is not None:
            self._begun = replace(self._begun, step=None)
