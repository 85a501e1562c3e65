"""Checkpoints of training runs: ``CheckpointManager``.

    manager = CheckpointManager("output", prefix="llama", save_every_steps=100, keep_max=5)
    found = manager.restore(state)            # the newest valid step, in the layout of state
    for step in range(found.step + 1, 1001):
        state = train_step(state, batch)
        manager.maybe_save(step, state)
    manager.close()

    policy, records                         decisions, names and bytes: no file, no device
    run_directory, steps, commit_step       effects on the directory
    open_step                               steps as catalogs
    state, step_files, save_step            from arrays to files
    restore_state, restore                  from files to arrays

Only the last two rows and ``manager`` import JAX; names are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import lazy_getattr

if TYPE_CHECKING:
    from .manager import CheckpointManager
    from .policy import Cadence, Progress, ResumePoint, resume_point
    from .records import StepName
    from .restore import RestoreResult

_HOME = {
    "CheckpointManager": "manager",
    "Cadence": "policy",
    "Progress": "policy",
    "RestoreResult": "restore",
    "ResumePoint": "policy",
    "StepName": "records",
    "resume_point": "policy",
}

__all__ = [
    "Cadence",
    "CheckpointManager",
    "Progress",
    "RestoreResult",
    "ResumePoint",
    "StepName",
    "resume_point",
]

if not TYPE_CHECKING:  # without it, type checkers refuse unknown names
    __getattr__ = lazy_getattr(__name__, _HOME)
