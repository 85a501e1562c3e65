"""The training loop's checkpoints: ``CheckpointManager``.

    manager = CheckpointManager("output", prefix="llama", save_every_steps=100, keep_max=5)
    found = manager.restore(state)            # the newest good step, onto the layout of state
    for step in range(found.step + 1, 1001):
        state = train_step(state, batch)
        manager.maybe_save(step, state)
    manager.close()

    cadence, retention, lineage, naming, progress      decisions: no file, no device, no clock
    records, checksums                                 what is kept beside the data
    places, committing, steps, examining               effects on the directory
    states, laying, snapshots, writing, restoring      effects on arrays

Only the last row, and ``manager`` above it, import JAX; names are fetched when first used.
"""

from __future__ import annotations

from ..core.lazy_imports import lazy_getattr

_HOME = {
    "CheckpointManager": "manager",
    "Cadence": "policy",
    "Progress": "policy",
    "RestoreResult": "restore",
    "ResumePoint": "policy",
    "StepName": "records",
    "resume_point": "policy",
}

__all__ = list(_HOME)

__getattr__ = lazy_getattr(__name__, _HOME)
