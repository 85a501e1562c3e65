"""Names of steps, files and folders, as MindFormers writes them.

    output/checkpoint/rank_0/llama_rank_0-1_10.safetensors      epoch 1, step 10 in it
    output/checkpoint/rank_0/llama_rank_0_1-1_10.safetensors    the same of a second job
    output/checkpoint/rank_0/meta.json                          the newest of this rank
    output/checkpoint_network/rank_0/llama_rank_0-network-1_10.safetensors
    output/checkpoint_trainable/rank_0/llama_rank_0-trainable_params-1_10.safetensors
    output/strategy/ckpt_strategy_rank_0.ckpt
    output/checkpoint/iteration_00000010/                       a Checkpoint-2.0 folder
    output/checkpoint/llama-1_10/                               a complete or an Orbax folder
    output/checkpoint/llama-_1-1_10/                            the same of a second job

Steps count from 1 within their epoch. MindFormers writes ``.ckpt`` unless told otherwise; such
names are read, and not made. This module makes and reads names only.
"""

from __future__ import annotations

import json
import operator
import re
from contextlib import suppress
from dataclasses import dataclass, replace

from ..errors import LayoutError

CHECKPOINT, NETWORK, TRAINABLE = "checkpoint", "checkpoint_network", "checkpoint_trainable"
STRATEGY = "strategy"
META = "meta.json"
TRACKER = "latest_checkpointed_iteration.txt"

_KIND = {CHECKPOINT: "", NETWORK: "-network", TRAINABLE: "-trainable_params"}
_STEP = re.compile(r"(?:_(?P<task>\d{1,9})-)?(?P<epoch>\d{1,18})_(?P<step>\d{1,18})")
_STEM = re.compile(
    r".+?_rank_\d{1,7}(?:_(?P<task>\d{1,9}))?(?:-[a-z_]+)?-(?P<step>\d{1,18}_\d{1,18})"
)
_FILE = re.compile(
    r"rank_(?P<folder>\d{1,7})/(?P<prefix>.+?)_rank_(?P<rank>\d{1,7})(?P<task>_\d{1,9})?"
    r"(?P<kind>-network|-trainable_params)?-(?P<step>\d{1,18}_\d{1,18})"
    r"\.(?P<extension>safetensors|ckpt)"
)
_ITERATION = re.compile(r"iteration_(\d{8,18})")
_FOLDER = re.compile(r"(?P<prefix>.+?)-(?P<step>(?:_\d{1,9}-)?\d{1,18}_\d{1,18})")
_PREFIX = re.compile(r"[^/\0.][^/\0]*")


@dataclass(frozen=True, slots=True, order=True)
class StepName:
    """An epoch and a step in it; they sort in the order of training.

    Attributes:
        task: which of several jobs of one prefix saved it: MindSpore adds a number where files
            of that prefix are there already.

    >>> str(StepName(1, 10)), StepName(1, 10) < StepName(1, 10, task=2) < StepName(2, 1)
    ('1_10', True)
    >>> str(StepName(1, 10, task=2))
    '_2-1_10'
    """

    epoch: int
    step: int
    task: int = 0

    def __str__(self) -> str:
        plain = f"{self.epoch}_{self.step}"
        return f"_{self.task}-{plain}" if self.task else plain


@dataclass(frozen=True, slots=True)
class RankFile:
    """What the name of a rank's file says.

    Attributes:
        task: which of several jobs of one prefix saved it: MindSpore adds a number where files
            of that prefix are there already.
        extension: ``"safetensors"``, or ``"ckpt"``, which is what MindFormers writes by default.
    """

    rank: int
    prefix: str
    step: StepName
    task: int = 0
    extension: str = "safetensors"


def step_name(global_step: int, steps_per_epoch: int | None = None) -> StepName:
    """The name of the ``global_step``-th step of a run; without epochs all are in the first.

    Raises:
        LayoutError: no such step.

    >>> [str(step_name(number, steps_per_epoch=10)) for number in (10, 11)]
    ['1_10', '2_1']
    """
    if global_step < 1 or (steps_per_epoch is not None and steps_per_epoch < 1):
        raise LayoutError(
            f"step {global_step} of epochs of {steps_per_epoch} steps: both count from 1."
        )
    if steps_per_epoch is None:
        return StepName(1, global_step)
    epoch, step = divmod(global_step - 1, steps_per_epoch)
    return StepName(epoch + 1, step + 1)


def parse_step(text: str) -> StepName | None:
    """The step written ``1_10``, or ``_2-1_10`` of a third job, or None.

    >>> parse_step("_2-1_10")
    StepName(epoch=1, step=10, task=2)
    """
    match = _STEP.fullmatch(text)
    if not match:
        return None
    return StepName(int(match["epoch"]), int(match["step"]), int(match["task"] or 0))


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that would name files elsewhere, or hidden ones.

    Raises:
        LayoutError: such a prefix.
    """
    if not _PREFIX.fullmatch(prefix):
        raise LayoutError(
            f"prefix {prefix!r} cannot begin a file's name. Use letters, digits, '-' and '_'."
        )


def rank_file(prefix: str, rank: int, step: StepName, kind: str = CHECKPOINT) -> str:
    """Where a rank's file lies below the folder of its ``kind``.

    >>> rank_file("llama", 3, StepName(1, 10)), rank_file("llama", 3, StepName(1, 10, task=1))
    ('rank_3/llama_rank_3-1_10.safetensors', 'rank_3/llama_rank_3_1-1_10.safetensors')
    """
    task = f"_{step.task}" if step.task else ""
    name = f"{prefix}_rank_{rank}{task}{_KIND[kind]}-{step.epoch}_{step.step}.safetensors"
    return f"rank_{rank}/{name}"


def parse_rank_file(path: str, kind: str = CHECKPOINT) -> RankFile | None:
    """What ``path``, relative to the folder of its ``kind``, says; None if it is no such file."""
    match = _FILE.fullmatch(path)
    if not match or match["folder"] != match["rank"] or (match["kind"] or "") != _KIND[kind]:
        return None
    step = parse_step(match["step"])
    task = int((match["task"] or "_0")[1:])
    return (
        RankFile(int(match["rank"]), match["prefix"], step, task, match["extension"])
        if step
        else None
    )


def meta_json(prefix: str, rank: int, step: StepName) -> bytes:
    """The contents of a rank's ``meta.json`` once ``step`` is its newest.

    >>> meta_json("llama", 0, StepName(1, 10)).decode()
    '{"last_epoch": 1, "last_step": 10, "last_ckpt_file": "llama_rank_0-1_10.safetensors"}'
    """
    name = rank_file(prefix, rank, step).rsplit("/", 1)[1]
    said = {"last_epoch": step.epoch, "last_step": step.step, "last_ckpt_file": name}
    return json.dumps(said).encode()


def iteration_folder(global_step: int) -> str:
    """The folder of a step in the Checkpoint-2.0 format.

    >>> iteration_folder(10)
    'iteration_00000010'
    """
    return f"iteration_{global_step:08d}"


def parse_iteration(name: str) -> int | None:
    """The global step of such a folder, or None."""
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else None


def step_folder(prefix: str, step: StepName) -> str:
    """Return the name of the folder that holds a whole step.

    >>> step_folder("llama", StepName(1, 10)), step_folder("llama", StepName(1, 10, task=2))
    ('llama-1_10', 'llama-_2-1_10')
    """
    return f"{prefix}-{step}"


def parse_folder(name: str) -> tuple[str, StepName] | None:
    """Return the prefix and the step of such a folder, or None.

    >>> parse_folder("llama-_2-1_10")
    ('llama', StepName(epoch=1, step=10, task=2))
    """
    match = _FOLDER.fullmatch(name)
    step = parse_step(match["step"]) if match else None
    return (match["prefix"], step) if match and step else None


def parse_wish(wish: object) -> StepName | int | None:
    """The step that a caller names: a global step, ``"1_10"``, a file's or a folder's name.

    Raises:
        LayoutError: it names no step.

    >>> parse_wish("llama_rank_0_2-1_10"), parse_wish("iteration_00000010"), parse_wish(7)
    (StepName(epoch=1, step=10, task=2), 10, 7)
    """
    if wish is None or isinstance(wish, StepName):
        return wish
    if not isinstance(wish, bool | str):
        with suppress(TypeError):
            return operator.index(wish)  # type: ignore[arg-type]  # NumPy's and JAX's too
    if isinstance(wish, str):
        text = wish.rsplit("/", 1)[-1].removesuffix(".safetensors").removesuffix(".ckpt")
        iteration = parse_iteration(text)
        found = iteration if iteration is not None else parse_step(text)
        if found is not None:
            return found
        if stem := _STEM.fullmatch(text):
            step = parse_step(stem["step"])
            return step and replace(step, task=int(stem["task"] or 0))
        if folder := parse_folder(text):
            return folder[1]
        if text.isdecimal():
            return int(text)
    raise LayoutError(
        f"{wish!r} names no step. Give a number, '1_10', or the name of a file or folder."
    )
