"""Single weight files, ``.safetensors`` and ``.ckpt``, behind one interface.

What a safetensors header keeps in its metadata, a ``.ckpt`` has among its tensors: text,
and which tensors are packed Int4. Here both become metadata, so that either kind can be
written from either. This module knows nothing of ranks.
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
_NOT_TEXT = {"format", "remove_redundancy", "crc_num"}  # said of the file, not kept in it
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What one file holds, in the order of its bytes."""

    entries: tuple[StoredTensor, ...] = field(repr=False)
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_weight_file(folder: Folder, path: str) -> WeightFile:
    """The tensors in the file at ``path``, whose name says its kind, from headers only.

    Raises:
        FormatError: it is damaged, encrypted, or not what its name says.
        NotFoundError: there is no such file.
    """
    if not path.endswith(".ckpt"):
        return _safetensors(safetensors.read_header(folder, path))
    from . import mindspore_ckpt  # noqa: PLC0415 - seldom needed, and not small

    header = mindspore_ckpt.read_header(folder, path)
    int4 = dict.fromkeys(header.int4, INT4)
    kept = {name: text for name, text in header.strings.items() if name not in _NOT_TEXT}
    lost = sorted(header.strings.keys() - kept.keys())
    notes = [
        f"{path}: its text called {name} is left out: that name is the format's own."
        for name in lost
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
    """Whether MindSpore put a checksum into the file, after comparing it with the file's bytes.

    A ``.ckpt`` ends with that of all before. A safetensors file has in its metadata that of
    every name and its bytes, in the order of the alphabet.

    Raises:
        FormatError: the checksum is another one: the file is damaged.
        NotFoundError: there is no such file.
    """
    if path.endswith(".ckpt"):
        from . import mindspore_ckpt  # noqa: PLC0415 - as above

        return mindspore_ckpt.check_crc(folder, path)
    if not safetensors.mentions(folder, path, b'"crc_num"'):  # nearly all: not worth parsing twice
        return False
    header = safetensors.read_header(folder, path)
    told = header.metadata.get("crc_num")
    if told is None or header.metadata.get("format") != "ms":
        return False  # a tensor's name, or another program's number
    crc = 0
    for name, _, _, start, stop in sorted(header.entries):
        crc = zlib.crc32(name.encode(), crc)
        for at in range(start, stop, _BLOCK_BYTES):
            crc = zlib.crc32(folder.read(path, at, min(_BLOCK_BYTES, stop - at)), crc)
    if told != str(crc):
        raise FormatError(
            f"{path}: its checksum says crc32 {quote_name(told)}, but its tensors have {crc}. The "
            "file is damaged; fetch it again."
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


# --- Complete ``.ckpt`` files: a model that MindSpore saved whole, in one file or a few

NAME = "model.ckpt"


def recognise(folder: Folder, files: Mapping[str, File]) -> bool:
    """Whether there are MindSpore weight files at the top; one alone may be encrypted too."""
    kinds = [kind_of(folder, path) for path in _top(files)]
    return any(k in ("weights.ckpt", "AES-GCM", "AES-CBC", "SM4-CBC") for k in kinds)


def read(folder: Folder) -> Catalog:
    """The catalog of the ``.ckpt`` files at the top of ``folder``.

    Raises:
        FormatError: a file is damaged or no weight file, or two hold the same name.
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
                    f"{quote_name(name)} is in both {first} and {path}. Name the file that counts, "
                    "not the folder."
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
