"""The registry of checkpoint formats: one object per format, in one list.

A ``Format`` recognises and reads its checkpoints, plans the files of new ones, and lists its
capabilities. Verbs query the object and never compare names, so a new format is one subclass (in
a file of its own) and one line in ``FORMATS``. The modules of the built-in formats are imported
inside the methods, because recognising a folder must import neither NumPy nor JAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..core.catalog import Catalog, File, Tensor
from ..core.layout import Layout, Placement
from ..errors import LayoutError, did_you_mean, format_list
from . import rank_names
from .folder import ITERATION_METADATA, Folder, is_iteration, is_orbax, is_orbax_item

if TYPE_CHECKING:
    from pathlib import Path

    from .output_files import LazyArray, Request, Result


class Format:
    """A checkpoint format. Subclass it, override what the format can do, and register it.

    Attributes:
        name: the value of ``format=`` and ``--format``, and of ``Catalog.format``.
        title: what a checkpoint of the format is called in output.
        file_suffix: the suffix of a single file, which a destination may name; "" if none.
        is_complete: tensors can be whole, in one checkpoint.
        is_by_rank: there can be a file for each rank.
        in_shards: a complete checkpoint may be several files of a limited size.
        as_steps: ``CheckpointManager`` can save steps in it.
        of_shardings: arrays are saved by rank unless the caller passes a strategy.
        of_mindspore: training scalars (``global_step`` …) are kept apart from weights.
        reads_strategy: strategy files define which box each file holds; a suffix selects files.
        steps_in_names: the files of a rank are named by epoch and step, so steps share a folder.
        scalars_in_json: training scalars are kept in JSON, so planning needs their values.
        prefix_if_complete: the files of a complete checkpoint are named with ``prefix`` too.
        has_crc: ``crc=`` can end each file with a checksum.
        own_library: an own library reads and writes the files, a whole tensor at a time. It
            stores dtypes that weight files lack, checks its own checksums, and one process writes.
        own_step_folder: a step's folder is named by the step's number in the whole run, and a
            tracker file names the newest.
        on_own_disks: processes without a shared disk can each write the files of their ranks.
        metadata_file: the file that describes the tensors of a folder; "" if none.
    """

    name = ""
    title = ""
    file_suffix = ""
    is_complete = False
    is_by_rank = False
    in_shards = False
    as_steps = False
    of_shardings = False
    of_mindspore = False
    reads_strategy = False
    steps_in_names = False
    scalars_in_json = False
    prefix_if_complete = False
    has_crc = False
    own_library = False
    own_step_folder = False
    on_own_disks = False
    metadata_file = ""

    def recognise(self, folder: Folder, files: Mapping[str, File]) -> bool:
        """Return whether ``folder``, which lists ``files``, is a checkpoint of this format."""
        return False

    def recognise_inside(self, files: Mapping[str, File]) -> bool:
        """Return whether a folder among ``files`` is one; called if no format is recognised."""
        return False

    def read(
        self, folder: Folder, layout: Layout | None = None, suffix: str | None = None
    ) -> Catalog:
        """Return the catalog of ``folder``, from headers only.

        Args:
            folder: a folder that ``recognise`` accepted.
            layout: the layout of the strategy files, if ``reads_strategy``.
            suffix: which of several files per rank, if ``reads_strategy``.

        Raises:
            FormatError: a file is damaged.
            CoverageError: files contradict each other.
        """
        raise NotImplementedError

    def plan_files(self, source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
        """Plan the files that hold ``tensors`` of ``source`` as ``request`` specifies.

        Raises:
            LayoutError: the layout does not fit the tensors.
        """
        raise NotImplementedError

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise LayoutError if a tensor has a shape that the format cannot store."""

    def write_tree(self, place: Path, tree: object) -> None:
        """Write the arrays of the pytree ``tree`` at ``place``, if ``own_library``.

        Raises:
            StorageError: the library cannot write them.
        """
        raise NotImplementedError

    def write_tensors(self, place: Path, tensors: Mapping[str, LazyArray]) -> None:
        """Write ``tensors`` at ``place``, reading one at a time, if ``own_library``.

        Raises:
            StorageError: the library cannot write them.
        """
        raise NotImplementedError


class RankFolders(Format):
    """Rank folders: ``rank_0/`` …, one safetensors file for each rank."""

    name = "ranks"
    title = "rank files"
    is_by_rank = True
    as_steps = True
    of_shardings = True
    of_mindspore = True
    reads_strategy = True
    steps_in_names = True
    on_own_disks = True

    def recognise(self, folder: Folder, files: Mapping[str, File]) -> bool:
        return any(map(rank_names.is_rank_file, files))

    def read(
        self, folder: Folder, layout: Layout | None = None, suffix: str | None = None
    ) -> Catalog:
        from . import rank_folder  # noqa: PLC0415

        return rank_folder.read(folder, layout, suffix=suffix)

    def plan_files(self, source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
        from . import rank_folder  # noqa: PLC0415

        return rank_folder.plan_files(source, tensors, request)


class Iteration(Format):
    """Checkpoint 2.0 of MindFormers: ``iteration_00000010/`` with ``metadata.json``."""

    name = "iteration"
    title = "a Checkpoint 2.0 folder"
    is_complete = True
    is_by_rank = True
    as_steps = True
    of_shardings = True
    of_mindspore = True
    scalars_in_json = True
    prefix_if_complete = True
    own_step_folder = True
    metadata_file = ITERATION_METADATA

    def recognise(self, folder: Folder, files: Mapping[str, File]) -> bool:
        return is_iteration(files)

    def read(
        self, folder: Folder, layout: Layout | None = None, suffix: str | None = None
    ) -> Catalog:
        from . import iteration  # noqa: PLC0415

        return iteration.read(folder)

    def plan_files(self, source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
        from . import iteration  # noqa: PLC0415

        return iteration.plan_files(source, tensors, request)


class Orbax(Format):
    """Orbax checkpoints, which Orbax's own library reads and writes; it imports JAX."""

    name = "orbax"
    title = "an Orbax checkpoint"
    is_complete = True
    as_steps = True
    own_library = True

    def recognise(self, folder: Folder, files: Mapping[str, File]) -> bool:
        return is_orbax_item(files)

    def recognise_inside(self, files: Mapping[str, File]) -> bool:
        return is_orbax(files)

    def read(
        self, folder: Folder, layout: Layout | None = None, suffix: str | None = None
    ) -> Catalog:
        if "://" in folder.root:
            raise LayoutError(
                f"{folder.root} is an Orbax checkpoint, which cannot be read by byte ranges. Copy "
                "it to a disk first."
            )
        from . import orbax  # noqa: PLC0415 - imports JAX

        return orbax.read(folder, folder.files())

    def plan_files(self, source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
        from ..planning.outputs import arrange  # noqa: PLC0415
        from .output_files import Result, SafetensorsContainer  # noqa: PLC0415

        self.check_shapes({t.name: t.shape for t in tensors})
        placements = dict.fromkeys((t.name for t in tensors), (Placement(()),))
        # one file, because only Orbax knows where it stores a tensor's bytes
        outputs = arrange(tensors, Layout(1, placements), ["orbax item"])
        return Result(self.name, outputs, SafetensorsContainer({}), {})

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        empty = [name for name, shape in shapes.items() if 0 in shape]
        if empty:
            raise LayoutError(
                f"{format_list(empty)} of shape {shapes[empty[0]]}: Orbax stores no arrays without "
                "elements. Leave them out, or write another format."
            )

    def write_tree(self, place: Path, tree: object) -> None:
        from . import orbax  # noqa: PLC0415 - imports JAX

        orbax.write(place, tree)

    def write_tensors(self, place: Path, tensors: Mapping[str, LazyArray]) -> None:
        from .orbax import write_streaming  # noqa: PLC0415 - imports JAX

        write_streaming(place, tensors)


class HuggingFace(Format):
    """Hugging Face folders: safetensors files, an index and ``config.json``."""

    name = "huggingface"
    title = "a Hugging Face checkpoint"
    file_suffix = ".safetensors"
    is_complete = True
    in_shards = True
    as_steps = True

    def recognise(self, folder: Folder, files: Mapping[str, File]) -> bool:
        from . import huggingface  # noqa: PLC0415

        return huggingface.recognise(files)

    def read(
        self, folder: Folder, layout: Layout | None = None, suffix: str | None = None
    ) -> Catalog:
        from . import huggingface  # noqa: PLC0415

        return huggingface.read(folder)

    def plan_files(self, source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
        from . import huggingface  # noqa: PLC0415

        return huggingface.plan_complete(source, tensors, request)


class Ckpt(Format):
    """MindSpore's ``.ckpt``: one complete file, or a file for each rank."""

    name = "ckpt"
    title = "a MindSpore .ckpt"
    file_suffix = ".ckpt"
    is_complete = True
    is_by_rank = True
    of_mindspore = True
    steps_in_names = True
    has_crc = True
    on_own_disks = True

    def recognise(self, folder: Folder, files: Mapping[str, File]) -> bool:
        from . import weight_files  # noqa: PLC0415

        return weight_files.recognise(folder, files)

    def read(
        self, folder: Folder, layout: Layout | None = None, suffix: str | None = None
    ) -> Catalog:
        from . import weight_files  # noqa: PLC0415

        return weight_files.read(folder)

    def plan_files(self, source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
        from . import rank_folder, weight_files  # noqa: PLC0415

        if request.to is None:
            return weight_files.plan_complete(source, tensors, request)
        return rank_folder.plan_files(source, tensors, request, ckpt=True)


class Unified(Format):
    """A folder as ``mindspore.unified_safetensors`` makes it; read as a Hugging Face folder."""

    name = "unified"
    title = "a unified folder"
    is_complete = True
    in_shards = True
    of_mindspore = True

    def plan_files(self, source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
        from . import huggingface  # noqa: PLC0415

        return huggingface.plan_unified(source, tensors, request)


#: Every format by name, in the order of recognition: a rank's files are safetensors too, so rank
#: folders come before Hugging Face folders.
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (RankFolders(), Iteration(), Orbax(), HuggingFace(), Ckpt(), Unified())
}

_DEFAULTS = {True: HuggingFace.name, False: RankFolders.name}


def register(format: Format) -> None:
    """Add ``format``. It is recognised first, because built-in formats claim any safetensors."""
    before = dict(FORMATS)
    FORMATS.clear()
    FORMATS.update({format.name: format, **before})


def find_format(name: str | None, *, is_complete: bool = True) -> Format:
    """Return the format ``name``, or the default for complete checkpoints or files by rank.

    Raises:
        LayoutError: no format has that name.
    """
    name = _DEFAULTS[is_complete] if name is None else name
    if name not in FORMATS:
        raise LayoutError(
            f"format={name!r}: no such format (expected one of {', '.join(FORMATS)})."
            + did_you_mean(name, FORMATS)
        )
    return FORMATS[name]


def format_of(name: str) -> Format:
    """Return the format ``name``; one without capabilities if none has it (arrays in memory)."""
    return FORMATS.get(name, _NONE)


def names_where(capability: str) -> tuple[str, ...]:
    """Return the names of the formats whose attribute ``capability`` is set.

    >>> names_where("in_shards")
    ('huggingface', 'unified')
    """
    return tuple(name for name, format in FORMATS.items() if getattr(format, capability))


_NONE = Format()
