"""Process index and count, from JAX or the environment.

It is only looked at when asked for: a conversion that happens to run inside a batch job
is not split behind its user's back. In a program that has called
``jax.distributed.initialize`` JAX knows; JAX has no variables for it that one could look at.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..errors import LayoutError
from .partition import Part

#: Who sets which variables: (who, the process's number, how many there are).
STARTERS = (
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS"),
)


def part_of(
    index: str | int | None, count: str | int | None, environ: Mapping[str, str]
) -> Part | None:
    """The part that a request means; ``"auto"`` asks JAX or ``environ``; None if none is meant.

    Raises:
        LayoutError: one number without the other, no number, or nothing found.

    >>> part_of("auto", "auto", {"SLURM_PROCID": "2", "SLURM_NTASKS": "8"})
    Part(index=2, count=8)
    """
    if index is None and count is None:
        return None
    if index == "auto" or count == "auto":
        found = from_jax() or from_environment(environ)
        index = found.index if index in ("auto", None) else index
        count = found.count if count in ("auto", None) else count
    if index is None or count is None:
        given, missing = ("index", "count") if count is None else ("count", "index")
        raise LayoutError(
            f"--process-{given} needs --process-{missing} too; auto takes both from the job."
        )
    return Part(_number("--process-index", index), _number("--process-count", count))


def from_jax() -> Part | None:
    """The part that this process is of a job of ``jax.distributed``; None where there is none.

    JAX is not imported for it: who has not imported it has not initialized it.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return None
    return Part(jax.process_index(), jax.process_count())


def from_environment(environ: Mapping[str, str]) -> Part:
    """The part that the environment of a job says this process is.

    ``mpirun`` inside a SLURM job sets both kinds of variables, and its own are those meant.

    Raises:
        LayoutError: no known variables are set, or they are no numbers.
    """
    for _, index, count in STARTERS:
        if index in environ and count in environ:
            return Part(_number(index, environ[index]), _number(count, environ[count]))
    known = "; ".join(f"{who}: {index}, {count}" for who, index, count in STARTERS)
    raise LayoutError(
        f"auto: no job starter has set its variables ({known}), and jax.distributed is not "
        "initialized here. Start with srun or mpirun, or give numbers."
    )


def _number(name: str, text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise LayoutError(f"{name}: {text!r} is not a number.") from None
