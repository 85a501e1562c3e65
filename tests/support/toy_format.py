"""A seventh format in one file: ``weights.toy``, a line of JSON and then the tensors' bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.core.layout import Layout, Placement
from jaxshard.formats.output_files import Result
from jaxshard.formats.registry import Format
from jaxshard.planning.outputs import arrange

FILE = "weights.toy"
_HEADER_BYTES = 4096  # padded with spaces, so that every offset is known before the header


@dataclass(frozen=True)
class _FileLayout:
    segments: tuple[tuple[int, bytes], ...]
    offsets: dict[str, int]
    num_bytes: int

    def spans(self, name, offset, length):
        return ((self.offsets[name] + offset, length),)


@dataclass(frozen=True)
class _Container:
    crc: bool = False

    def layout(self, entries):
        at, offsets, listed = _HEADER_BYTES, {}, []
        for entry in entries:
            name = entry.tensor.name
            offsets[name] = at
            listed.append([name, entry.tensor.dtype.name, entry.shape, at])
            at += entry.num_bytes
        header = json.dumps({"toy": listed}).encode().ljust(_HEADER_BYTES)
        assert len(header) == _HEADER_BYTES
        return _FileLayout(((0, header),), offsets, at)


class Toy(Format):
    """One complete file."""

    name = "toy"
    title = "a toy"
    file_suffix = ".toy"
    is_complete = True

    def recognise(self, folder, files):
        return any("/" not in path and path.endswith(self.file_suffix) for path in files)

    def read(self, folder, layout=None, suffix=None):
        (path,) = (p for p in folder.files() if p.endswith(self.file_suffix))
        tensors = {
            name: Tensor(
                name,
                BY_NAME[dtype],
                tuple(shape),
                (StoredShard(0, at, Box.whole(tuple(shape))),),
            )
            for name, dtype, shape, at in json.loads(folder.read(path, 0, _HEADER_BYTES))["toy"]
        }
        return Catalog(folder.root, self.name, (folder.files()[path],), tensors)

    def plan_files(self, source, tensors, request):
        layout = Layout(1, dict.fromkeys((t.name for t in tensors), (Placement(()),)))
        return Result(self.name, arrange(tensors, layout, [FILE]), _Container(), {})
