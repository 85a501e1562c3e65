"""Single weight files, ``.safetensors`` and ``.ckpt``, behind one interface.

A ``.ckpt`` stores text, and the names of packed Int4 tensors, among its tensors; safetensors
stores them in the header's metadata. Both become metadata here, so either kind converts to the
other. Also reads complete ``.ckpt`` checkpoints. This module does not depend on ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..core.box import Box
from ..core.catalog import Catalog, File, StoredShard, Tensor
from ..core.layout import Layout, Placement
from ..errors import FormatError, quote_name
from ..planning.outputs import Entry, arrange
from . import huggingface, safetensors
from .folder import Folder, kind_of
from .huggingface import scalar_names
from .output_files import Request, Result
from .safetensors import FileLayout, StoredTensor

INT4 = "Int4"  # MindSpore's safetensors have a metadata key for each such tensor, with this value
_NOT_TEXT = {"format", "remove_redundancy", "crc_num"}  # describe the file itself
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Contents of one file, in byte order."""

    entries: tuple[StoredTensor, ...] = field(repr=False)
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_weight_file(folder: Folder, path: str) -> WeightFile:
    """Read the header of the ``.safetensors`` or ``.ckpt`` file at ``path``.

    Raises:
        FormatError: the file is damaged, encrypted, or of another kind than its name.
        NotFoundError: no such file.
    """
    if not path.endswith(".ckpt"):
        return _safetensors(safetensors.read_header(folder, path))
    from . import mindspore_ckpt  # noqa: PLC0415 - only for .ckpt files

    header = mindspore_ckpt.read_header(folder, path)
    int4 = dict.fromkeys(header.int4, INT4)
    kept = {name: text for name, text in header.strings.items() if name not in _NOT_TEXT}
    lost = sorted(header.strings.keys() - kept.keys())
    notes = [
        f"{path}: the text value {name} is dropped: the format reserves that name." for name in lost
    ]
    return WeightFile(header.entries, {**kept, **int4}, (*header.notes, *notes))


def _safetensors(header: safetensors.Header) -> WeightFile:
    whole: dict[tuple[int, ...], Box] = {}  # thousands of tensors share a shape, and so its box
    entries = []
    for name, kind, shape, start, _ in header.entries:
        box = whole.get(shape) or whole.setdefault(shape, Box.whole(shape))
        entries.append(StoredTensor(name, kind, shape, ((start, box),)))
    return WeightFile(tuple(entries), header.metadata)


def check_crc(folder: Folder, path: str) -> bool:
    """Verify MindSpore's checksum of a file; return whether the file has one.

    A ``.ckpt`` ends with the checksum of all preceding bytes. A safetensors file has in its
    metadata the checksum of every name and tensor, in alphabetical order.

    Raises:
        FormatError: the checksum differs, so the file is damaged.
        NotFoundError: no such file.
    """
    if path.endswith(".ckpt"):
        from . import mindspore_ckpt  # noqa: PLC0415 - as above

        return mindspore_ckpt.check_crc(folder, path)
    if not safetensors.mentions(
        folder, path, b'"crc_num"'
    ):  # true of nearly all files, so the header is not parsed twice
        return False
    header = safetensors.read_header(folder, path)
    expected = header.metadata.get("crc_num")
    if expected is None or header.metadata.get("format") != "ms":
        return False  # a tensor's name, or another program's number
    crc = 0
    for name, _, _, start, stop in sorted(header.entries):
        crc = zlib.crc32(name.encode(), crc)
        for at in range(start, stop, _BLOCK_BYTES):
            crc = zlib.crc32(folder.read(path, at, min(_BLOCK_BYTES, stop - at)), crc)
    if expected != str(crc):
        raise FormatError(
            f"{path}: the tensors have crc32 {crc} (expected {quote_name(expected)}). The file is "
            "damaged; fetch it again."
        )
    return True


@dataclass(frozen=True)
class CkptContainer:
    """MindSpore's ``.ckpt`` files: ``metadata`` holds their text values and Int4 tensors.

    Attributes:
        crc: end each file with a checksum.
    """

    metadata: Mapping[str, str]
    crc: bool = False

    def layout(self, entries: Sequence[Entry]) -> FileLayout:
        """Lay out the file of ``entries``."""
        from . import mindspore_ckpt  # noqa: PLC0415 - only to write .ckpt files

        items = self.metadata.items()
        return mindspore_ckpt.layout_file(
            [(e.tensor.name, e.tensor.dtype, e.shape) for e in entries],
            strings={k: v for k, v in items if k not in _NOT_TEXT and v != INT4},
            int4=[k for k, v in items if v == INT4],
            crc=self.crc,
        )


# --- complete .ckpt checkpoints: a whole model in one file or a few -------------------------------

NAME = "model.ckpt"


def recognise(folder: Folder, files: Mapping[str, File]) -> bool:
    """Return whether ``files`` have MindSpore weight files, perhaps encrypted, at their top."""
    kinds = [kind_of(folder, path) for path in _top(files)]
    return any(k in ("weights.ckpt", "AES-GCM", "AES-CBC", "SM4-CBC") for k in kinds)


def read(folder: Folder) -> Catalog:
    """Read the catalog of the ``.ckpt`` files at the top of ``folder``.

    Raises:
        FormatError: a file is damaged or not a weight file, or two files hold the same name.
    """
    listed = folder.files()
    paths = _top(listed)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    notes: list[str] = []
    for number, path in enumerate(paths):
        file = read_weight_file(folder, path)
        for name, kind, shape, pieces in file.entries:
            if name in tensors:
                first = paths[tensors[name].shards[0].file]
                raise FormatError(
                    f"{quote_name(name)} is in both {first} and {path}. Pass one file instead of "
                    "the folder."
                )
            stored = tuple(StoredShard(number, at, box) for at, box in pieces)
            tensors[name] = Tensor(name, kind, shape, stored)
        metadata |= file.metadata
        notes += file.notes
    model, _ = huggingface.read_model(folder, listed)
    extras, _ = huggingface.carried(listed, paths)
    return Catalog(
        root=folder.root,
        format="ckpt",
        files=tuple(listed[p] for p in paths),
        tensors=tensors,
        model=model,
        metadata=metadata,
        extras=extras,
        scalars=scalar_names(tensors.values()),
        notes=tuple(notes),
    )


def _top(files: Mapping[str, File]) -> list[str]:
    return sorted(p for p in files if "/" not in p and p.endswith(".ckpt"))


def plan_complete(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """Plan one ``.ckpt`` with every tensor: MindSpore has no index for several files."""
    placements = dict.fromkeys((t.name for t in tensors), (Placement(()),))
    outputs = arrange(tensors, Layout(1, placements), [NAME])
    return Result("ckpt", outputs, CkptContainer(source.metadata, request.crc), {})
