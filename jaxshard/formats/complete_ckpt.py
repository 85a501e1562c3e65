"""Complete ``.ckpt`` files: a model that MindSpore saved whole, in one file or a few.

    llama.ckpt                  or a folder of them whose names do not overlap

A folder has no index, so every file counts. This module reads what lies between the
tensors and knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..catalog import Catalog, File, Piece, Tensor
from ..errors import FormatError, shown
from . import huggingface
from .folder import Folder
from .job_numbers import job_numbers
from .mindspore_kinds import kind_of
from .weight_files import read_weight_file

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
                first = paths[tensors[name].pieces[0].file]
                raise FormatError(
                    f"{shown(name)} is in both {first} and {path}. Name the file that counts, not "
                    "the folder."
                )
            stored = tuple(Piece(number, at, box) for at, box in pieces)
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
        hyper=job_numbers(tensors.values()),
        notes=tuple(notes),
    )


def _top(files: Mapping[str, File]) -> list[str]:
    return sorted(p for p in files if "/" not in p and p.endswith(".ckpt"))
