"""Records of saved steps.

    .jaxshard/1_10.json       the step is whole: its files with sizes and checksums, extras
    .jaxshard/1_10.moving     all its files are on the disk and are being put in place
    .jaxshard/1_10.removed    it is being removed, or was
    .jaxshard/rollback-llama.json   the run of that prefix went back, and has saved nothing since

A record is one line of JSON and one with the checksum of the first, so that a damaged
record is known as such. It is the last thing written when a step is saved, and the first
taken away when it goes. This module makes and reads their bytes only.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from posixpath import normpath
from typing import Any

from ..errors import FormatError, LayoutError
from ..formats.huggingface import TRAINING_SCALARS, scalar_value
from ..formats.rank_names import LAYOUT_FILE, rank_of_strategy_file
from ..storage.checksums import Checksums, FileSums
from .policy import Lineage

FOLDER = ".jaxshard"
WHOLE, MOVING, REMOVED = ".json", ".moving", ".removed"
KEPT_STRATEGY = re.compile(r"strategy-[0-9a-f]{16}")  # folders with strategy files
VERSION = 1
_ROLLBACK = "rollback-"


@dataclass(frozen=True)
class Record:
    """One saved step.

    Attributes:
        global_step: number of the step in the whole run.
        units: files and whole folders that are renamed into place; relative to the directory.
        files: all files with checksums, relative to the directory.
        strategy: the folder with the strategy files, if there are rank files; relative to the
            directory.
        extras: values of the training loop.
        numbers: training scalars by MindFormers' names.
        saved_at: seconds since 1970.
        lineage: position among all saves, and the saves it does not descend from.
        replaces: units that existed before and may be replaced; the commit replaces no others.
    """

    step: StepName
    global_step: int
    format: str
    algorithm: str
    units: tuple[str, ...]
    files: Mapping[str, FileSums] = field(repr=False)
    strategy: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    saved_at: float = 0.0
    lineage: Lineage = Lineage()  # noqa: RUF009 - frozen
    replaces: tuple[str, ...] = ()

    @property
    def checksums(self) -> Checksums:
        """Checksums of all files."""
        return Checksums(self.algorithm, self.files)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.num_bytes for f in self.files.values())

    @property
    def prefix(self) -> str:
        """Prefix of the job, by the names of its files; empty if they contain none."""
        for unit in self.units:
            head, _, path = unit.partition("/")
            if head != CHECKPOINT:
                continue
            file = parse_rank_file(path)
            folder = parse_folder(path)
            return file.prefix if file else folder[0] if folder else ""
        return ""


def strategy_folder(strategy: Mapping[str, bytes]) -> str:
    """Return the folder of strategy files, whose name is a digest of their content.

    >>> strategy_folder({"ckpt_strategy_rank_0.ckpt": b""})
    '.jaxshard/strategy-b2b9623008e5dca5'
    """
    digest = hashlib.sha256()
    for name, data in sorted(strategy.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return f"{FOLDER}/strategy-{digest.hexdigest()[:16]}"


def is_strategy_file(name: str) -> bool:
    """Return True if ``name`` is that of a strategy file.

    >>> [is_strategy_file(f"{start}ckpt_strategy_rank_0.ckpt") for start in ("", "._")]
    [True, False]
    """
    return name == LAYOUT_FILE or rank_of_strategy_file(name) is not None


def kept_strategy(
    held: Mapping[str, bytes], folder: str, num_ranks: int
) -> dict[str, bytes] | None:
    """Return the files of ``held`` whose content ``folder`` is named by; None if they differ.

    ``held`` may contain foreign files, and strategy files of more than ``num_ranks`` ranks.
    """
    ranks = {name: rank_of_strategy_file(name) for name in held}
    raw = {name: held[name] for name, r in ranks.items() if r is not None and r < num_ranks}
    own = {name: held[name] for name in held if name == LAYOUT_FILE}
    return next((f for f in (raw, own) if f and strategy_folder(f) == folder), None)


def check_extras(extras: Mapping[str, Any]) -> None:
    """Refuse extras that JSON would change.

    Raises:
        LayoutError: JSON cannot hold a value, or would change it.
    """
    for key, value in extras.items():
        try:
            same = json.loads(json.dumps({key: value}, allow_nan=False)) == {key: value}
        except (TypeError, ValueError):
            same = False
        if not same:
            raise LayoutError(
                f"extras[{key!r}] = {value!r:.80} cannot be stored as JSON. Pass numbers, text, "
                "lists and dicts with text keys in extras, and arrays in the state."
            )


def to_bytes(record: Record) -> bytes:
    """Return the contents of a record's file."""
    said = {
        "version": VERSION,
        "epoch": record.step.epoch,
        "step": record.step.step,
        "global_step": record.global_step,
        "format": record.format,
        "algorithm": record.algorithm,
        "units": list(record.units),
        "files": {p: [f.num_bytes, list(f.chunks)] for p, f in sorted(record.files.items())},
        "strategy": record.strategy,
        "extras": dict(record.extras),
        "numbers": dict(record.numbers),
        "saved_at": record.saved_at,
        "order": record.lineage.order,
        "left": list(record.lineage.abandoned),
        "replaces": list(record.replaces),
    }
    if record.step.task:
        said["task"] = record.step.task
    return _sealed(said)


def _sealed(said: Mapping[str, Any]) -> bytes:
    line = json.dumps(said, separators=(",", ":")).encode()
    return line + b"\n%08x\n" % zlib.crc32(line)


def _unsealed(data: bytes, path: str) -> Any:
    line, _, tail = data.partition(b"\n")
    if tail != b"%08x\n" % zlib.crc32(line):
        raise FormatError(f"{path} is damaged: it does not match its own checksum.")
    return json.loads(line)


def from_bytes(data: bytes, path: str) -> Record:
    """Parse a record.

    Raises:
        FormatError: ``data`` is damaged, or not a record.
    """
    try:
        return _record(_unsealed(data, path))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is not a record that this jaxshard reads.") from error


@dataclass(frozen=True, slots=True)
class Rollback:
    """Return of a run to an earlier step, recorded until the first save after it.

    Attributes:
        prefix: of the job.
        to: the step that was restored.
        lineage: the line of the next save.
    """

    prefix: str
    to: StepName
    lineage: Lineage

    @property
    def file_name(self) -> str:
        """Its file in ``FOLDER``."""
        return f"{_ROLLBACK}{self.prefix}{WHOLE}"

    def to_bytes(self) -> bytes:
        """Return the contents of its file."""
        to, line = self.to, self.lineage
        return _sealed(
            {
                "version": VERSION,
                "prefix": self.prefix,
                "to": [to.epoch, to.step, to.task],
                "order": line.order,
                "left": list(line.abandoned),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Rollback:
        """Return the rollback stored in ``data``.

        Raises:
            FormatError: it is damaged.
        """
        try:
            said = _unsealed(data, path)
            epoch, step, task = map(_whole, said["to"])
            return cls(str(said["prefix"]), StepName(epoch, step, task), _line(said))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path} is not a rollback that this jaxshard reads.") from error


def is_rollback_file(name: str) -> bool:
    """Return True if ``name`` is that of a rollback's file."""
    return name.startswith(_ROLLBACK) and name.endswith(WHOLE)


def _record(said: Any) -> Record:
    if said["version"] != VERSION:
        raise ValueError(said["version"])
    files = {
        _inside(path): FileSums(
            _whole(num_bytes), tuple((_whole(a), _whole(b), _whole(c)) for a, b, c in chunks)
        )
        for path, (num_bytes, chunks) in said["files"].items()
    }
    for path, sums in files.items():
        sums.check_whole(path)
    return Record(
        step=StepName(_whole(said["epoch"]), _whole(said["step"]), _whole(said.get("task", 0))),
        global_step=_whole(said["global_step"]),
        format=str(said["format"]),
        algorithm=str(said["algorithm"]),
        units=tuple(_inside(unit) for unit in said["units"]),
        files=files,
        strategy=None if said["strategy"] is None else _inside(said["strategy"]),
        extras=dict(said["extras"]),
        numbers={
            name: scalar_value(name, value, "numbers") if name in TRAINING_SCALARS else value
            for name, value in dict(said["numbers"]).items()
        },
        saved_at=float(said["saved_at"]),
        lineage=_line(said),
        replaces=tuple(_inside(unit) for unit in said.get("replaces", said["units"])),
    )


def _line(said: Mapping[str, Any]) -> Lineage:
    left = tuple((_whole(a), _whole(b)) for a, b in said.get("left", ()))
    return Lineage(_whole(said.get("order", 0)), left)


def _inside(path: Any) -> str:
    """Return ``path``, which must stay inside the directory."""
    if not isinstance(path, str) or path.startswith(("/", "..")) or normpath(path) != path:
        raise ValueError(path)
    return path


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(number)
    return number


# --- Names of steps, files and folders

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
    """Epoch and step in it; sorts in the order of training.

    Attributes:
        task: number of the job: MindSpore adds one if files of the prefix exist already.

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
    """Parsed name of a rank's file.

    Attributes:
        task: number of the job: MindSpore adds one if files of the prefix exist already.
        extension: ``"safetensors"``, or ``"ckpt"``, which is what MindFormers writes by default.
    """

    rank: int
    prefix: str
    step: StepName
    task: int = 0
    extension: str = "safetensors"


def step_name(global_step: int, steps_per_epoch: int | None = None) -> StepName:
    """Return the name of the ``global_step``-th step; without epochs all are in the first.

    Raises:
        LayoutError: a number is smaller than 1.

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
    """Parse ``1_10``, or ``_2-1_10`` of a third job; None if it is neither.

    >>> parse_step("_2-1_10")
    StepName(epoch=1, step=10, task=2)
    """
    match = _STEP.fullmatch(text)
    if not match:
        return None
    return StepName(int(match["epoch"]), int(match["step"]), int(match["task"] or 0))


def check_prefix(prefix: str) -> None:
    """Refuse a prefix of hidden files, or of files in other folders.

    Raises:
        LayoutError: the prefix is invalid.
    """
    if not _PREFIX.fullmatch(prefix):
        raise LayoutError(
            f"prefix {prefix!r} cannot start a file name. Use letters, digits, '-' and '_'."
        )


def rank_file(prefix: str, rank: int, step: StepName, kind: str = CHECKPOINT) -> str:
    """Return the path of a rank's file below the folder of its ``kind``.

    >>> rank_file("llama", 3, StepName(1, 10)), rank_file("llama", 3, StepName(1, 10, task=1))
    ('rank_3/llama_rank_3-1_10.safetensors', 'rank_3/llama_rank_3_1-1_10.safetensors')
    """
    task = f"_{step.task}" if step.task else ""
    name = f"{prefix}_rank_{rank}{task}{_KIND[kind]}-{step.epoch}_{step.step}.safetensors"
    return f"rank_{rank}/{name}"


def parse_rank_file(path: str, kind: str = CHECKPOINT) -> RankFile | None:
    """Parse ``path``, relative to the folder of its ``kind``; None if it is another file."""
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
    """Return the contents of a rank's ``meta.json`` whose newest step is ``step``.

    >>> meta_json("llama", 0, StepName(1, 10)).decode()
    '{"last_epoch": 1, "last_step": 10, "last_ckpt_file": "llama_rank_0-1_10.safetensors"}'
    """
    name = rank_file(prefix, rank, step).rsplit("/", 1)[1]
    said = {"last_epoch": step.epoch, "last_step": step.step, "last_ckpt_file": name}
    return json.dumps(said).encode()


def iteration_folder(global_step: int) -> str:
    """Return the name of a step's Checkpoint-2.0 folder.

    >>> iteration_folder(10)
    'iteration_00000010'
    """
    return f"iteration_{global_step:08d}"


def parse_iteration(name: str) -> int | None:
    """Return the global step of such a folder, or None."""
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


def parse_step_argument(requested: object) -> StepName | int | None:
    """Parse the step of a caller: a global step, ``"1_10"``, a file's or a folder's name.

    Raises:
        LayoutError: it is not a step.

    >>> parse_step_argument("llama_rank_0_2-1_10")
    StepName(epoch=1, step=10, task=2)
    >>> parse_step_argument("iteration_00000010"), parse_step_argument(7)
    (10, 7)
    """
    if requested is None or isinstance(requested, StepName):
        return requested
    if not isinstance(requested, bool | str):
        with suppress(TypeError):
            return operator.index(requested)  # type: ignore[arg-type]  # NumPy's and JAX's too
    if isinstance(requested, str):
        text = requested.rsplit("/", 1)[-1].removesuffix(".safetensors").removesuffix(".ckpt")
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
        f"step={requested!r} is not a step. Pass a number, '1_10', or the name of a file or folder."
    )
