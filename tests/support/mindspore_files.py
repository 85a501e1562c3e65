"""What outsiders see in weight files, and what MindSpore's own reader demands of them.

Nothing here shares code with jaxshard: files are read by the safetensors package, and by a
few lines that know protobuf.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
from golden_files import manifest

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape, bytes

_DTYPES = {
    **{"Int8": "I8", "UInt8": "U8", "Int16": "I16", "UInt16": "U16", "Int32": "I32"},
    **{"UInt32": "U32", "Int64": "I64", "UInt64": "U64", "Float16": "F16", "Float32": "F32"},
    **{"Float64": "F64", "Bool": "BOOL", "BFloat16": "BF16"},
}
ITEM_BYTES = {"I8": 1, "U8": 1, "BOOL": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4}


def weights(path: Path) -> Tensors:
    """The tensors of a ``.safetensors`` or ``.ckpt`` file."""
    if path.suffix == ".ckpt":
        return _ckpt(path.read_bytes())
    return {
        name: (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
        for name, t in safetensors.deserialize(path.read_bytes())
    }


def folder_weights(folder: Path) -> Tensors:
    """The tensors of all weight files at the top of ``folder``."""
    found: Tensors = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".ckpt"):
            found |= weights(path)
    return found


def rank_weights_of(folder: Path) -> dict[int, Tensors]:
    """What the one file of each rank folder holds."""
    found = {}
    for rank in folder.glob("rank_*"):
        (path,) = rank.iterdir()
        found[int(rank.name.removeprefix("rank_"))] = weights(path)
    return found


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2:
            yield key >> 3, data[at : at + value]
            at += value
        else:
            yield key >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _ckpt(data: bytes) -> Tensors:
    if data[-17:-10] == b"crc_num":
        data = data[:-17]
    found: Tensors = {}
    for _, value in _fields(memoryview(data)):
        told = dict(_fields(value))
        dims, kind, content = [], "", b""
        for number, one in _fields(told[2]):
            if number == 1:
                dims.append(one)
            elif number == 2:
                kind = bytes(one).decode()
            else:
                content = bytes(one)
        if kind == "str":
            continue
        name = bytes(told[1]).decode()
        before = found[name][2] if name in found else b""
        shape = () if dims == [0] else tuple(dims)
        found[name] = (_DTYPES[kind], shape, before + content)
    return found


def check_mindspore_reads(path: Path) -> Mapping[str, str]:
    """Refuse a safetensors file as MindSpore's own header parser would; its metadata."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    at = 0
    for name, told in header.items():  # in the order of the header, and of nothing else
        start, stop = told["data_offsets"]
        assert start == at, f"{name} is not where the tensor before it ends"
        at = stop
    assert 8 + length + at == len(data), "bytes are left at the end"
    return metadata


def truth(name: str, *, states: bool = True) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """The manifest's dtype, shape and hash of every tensor; without optimizer states if asked."""
    told = manifest(name)
    return {
        n: (t["dtype"], tuple(t["shape"]), t["sha256"])
        for n, t in {**told["tensors"], **told["hyper"]}.items()
        if states or not n.startswith("adam_")
    }


def hashed(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """``tensors`` with hashes for bytes, as the truth has them."""
    return {n: (d, s, hashlib.sha256(b).hexdigest()) for n, (d, s, b) in tensors.items()}
