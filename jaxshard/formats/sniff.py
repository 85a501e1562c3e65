"""Detection of file kinds by their first bytes.

MindSpore calls weights and strategies alike ``.ckpt``, PyTorch does too, and an
encrypted file has no other sign than its first four bytes. People mix them up; so a
format that meets the wrong one can say which it is. This module reads 16 bytes.
"""

from __future__ import annotations

from typing import Literal

from ..errors import NotFoundError
from .reader import Folder

Kind = Literal[
    "weights.ckpt",
    "strategy.ckpt",
    "strategy.json",
    "AES-GCM",
    "AES-CBC",
    "SM4-CBC",
    "safetensors",
    "torch",
    "empty",
    "unknown",
]

_ENCRYPTED: dict[bytes, Kind] = {  # the first four bytes, little-endian 0x7F3A5ED8 and on
    bytes.fromhex("d85e3a7f"): "AES-GCM",
    bytes.fromhex("d95e3a7f"): "AES-CBC",
    bytes.fromhex("da5e3a7f"): "SM4-CBC",
}
#: The kinds that hold weights.
WEIGHTS: frozenset[Kind] = frozenset(
    {"weights.ckpt", "safetensors", "torch", "AES-GCM", "AES-CBC", "SM4-CBC"}
)
_TOLD: dict[Kind, str] = {
    "weights.ckpt": "a MindSpore weight checkpoint",
    "strategy.ckpt": "a MindSpore strategy file",
    "strategy.json": "JSON",
    "safetensors": "a safetensors file",
    "torch": "a PyTorch checkpoint",
    "empty": "empty",
    "unknown": "in no format known here",
}


def kind_of(folder: Folder, path: str) -> Kind:
    """What the file at ``path`` seems to be.

    Raises:
        NotFoundError: there is no such file.
    """
    file = folder.files().get(path)
    if file is None:
        raise NotFoundError(f"{folder.root} has no file {path}.")
    head = folder.read(path, 0, min(16, file.num_bytes))
    if path.endswith(".json") and head.lstrip()[:1] == b"{":
        return "strategy.json"
    return recognise(head)


def recognise(head: bytes) -> Kind:
    r"""What a file beginning with the 16 bytes ``head`` seems to be.

    >>> recognise(b"\n\x10\n\x03f32"), recognise(b"\x08\x02\x12<")
    ('weights.ckpt', 'strategy.ckpt')
    """
    if not head:
        return "empty"
    if head[:4] in _ENCRYPTED:
        return _ENCRYPTED[head[:4]]
    if head[8:9] == b"{" and head[4:8] == bytes(4):  # a header shorter than 4 GiB
        return "safetensors"
    if head[:2] == b"PK" or head[:1] == b"\x80":  # a zip, or a pickle
        return "torch"
    if head[:1] == b"{":
        return "strategy.json"
    first = head[0]  # the key of the first field: bytes for a value, a number for a strategy
    return "weights.ckpt" if first == 0x0A else "strategy.ckpt" if first == 0x08 else "unknown"


def told(kind: Kind) -> str:
    """``kind`` as a noun in a sentence: "… is *a MindSpore strategy file*".

    >>> told("AES-GCM")
    'a checkpoint encrypted with AES-GCM'
    """
    return _TOLD.get(kind) or f"a checkpoint encrypted with {kind}"
