"""Merging: a catalog whose weights have their adapters added, block by block, when read.

    W' = W + scaling · (B @ A)      in float32, rounded once to the dtype of W

Nothing is computed here. The result is an ordinary catalog: converting it writes the merged
model with a few blocks in memory, loading it adds the product to each shard on its way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..catalog import Catalog, File, Piece, Tensor
from ..elements import is_plain_float
from ..errors import LayoutError, NotFoundError, nearest
from ..mapping.geometry import with_step
from ..views import AddProduct, Affine
from .adapters import Adapter, base_name, find_adapters, is_adapter
from .saved import check_adapted, saved_beside
from .settings import OWN_CONFIG, PEFT_CONFIG, Settings


@dataclass(frozen=True)
class Merged:
    """A merged catalog, and what was done to it."""

    catalog: Catalog
    num_adapters: int
    replaced: tuple[str, ...] = ()


def merged(
    base: Catalog,
    settings: Settings,
    adapter: Catalog | None = None,
    *,
    sign: int = 1,
    reproducible: bool = False,
) -> Merged:
    """``base`` with the adapters of ``adapter``, or with those among its own tensors, added.

    With ``sign`` -1 they are subtracted. ``reproducible`` is explained in ``views``.

    Raises:
        NotFoundError: there are no adapters, a base weight or half a pair is missing, or alpha.
        LayoutError: shapes that do not fit, or a weight of a dtype that nothing is added to.
    """
    source = adapter if adapter is not None else base
    found = find_adapters(source.tensors, source.root)
    if not found.adapters:
        raise NotFoundError(
            f"{source.root} holds no adapters: no name of its {len(source.tensors)} tensors ends "
            "as lora_A.weight, lora_a, mindpet_delta_lora_a or lora_embedding_A do."
        )
    kept = {n: t for n, t in base.tensors.items() if not is_adapter(n)}
    if adapter is not None and len(kept) < len(base.tensors):
        _refuse_two(base, adapter)
    files, shift = _with_files(base, adapter)
    notes: list[str] = []
    replaced: dict[str, Tensor] = {}
    if adapter is not None:
        others = {n: t for n, t in found.others.items() if n not in source.hyper}
        replaced = saved_beside(others, kept, base, settings, notes)
        kept |= {n: _shifted(replace(t, name=n), shift) for n, t in replaced.items()}
    for pair in found.adapters:
        check_adapted(pair.weight, base, notes)
        moved = replace(pair, a=_shifted(pair.a, shift), b=_shifted(pair.b, shift))
        name = _weight_of(pair, kept, base)
        swapped = _is_swapped(kept[name], pair, settings, notes)
        kept[name] = _added(
            kept[name], moved, sign * settings.scaling_of(pair), swapped, reproducible
        )
    beside = adapter.notes if adapter is not None else ()
    catalog = replace(
        base,
        tensors=kept,
        files=files,
        extras=tuple(e for e in base.extras if Path(e).name not in (PEFT_CONFIG, OWN_CONFIG)),
        notes=(*base.notes, *beside, *_notes(found.dropped, settings), *dict.fromkeys(notes)),
        logged=base.logged if adapter is None else base.logged | adapter.logged,
        has_merged_adapters=True,
    )
    return Merged(catalog, len(found.adapters), tuple(sorted(replaced)))


def _refuse_two(base: Catalog, adapter: Catalog) -> None:
    """Refuse to choose between adapters inside the base and those beside it."""
    own = [n for n in base.tensors if is_adapter(n)]
    raise LayoutError(
        f"{base.root} holds {len(own)} tensors of adapters itself ({own[0]} …), and {adapter.root} "
        "is given too. Merge its own first, without adapter=, or leave them out when converting it "
        '(exclude="lora", --exclude lora).'
    )


def _added(
    weight: Tensor, pair: Adapter, scaling: float, swapped: bool, reproducible: bool
) -> Tensor:
    if not is_plain_float(weight.dtype):
        raise LayoutError(
            f"{weight.name} is {weight.dtype}; adapters are added to F16, BF16, F32 or F64. "
            'FP8 with factors gets its true values by converting with names="auto" (--names auto) '
            "first."
        )

    def step(at: tuple[Affine, Affine]) -> AddProduct:
        rows, columns = reversed(at) if swapped else at
        return AddProduct(pair.a, pair.b, scaling, (rows, columns), reproducible)

    return with_step(weight, step)


def _is_swapped(weight: Tensor, pair: Adapter, settings: Settings, notes: list[str]) -> bool:
    """Whether the weight is (in, out), so that the product is added transposed."""
    plain = (pair.b.shape[0], pair.a.shape[1])
    fits = [weight.shape == plain, weight.shape == plain[::-1]]
    made = plain[::-1] if pair.is_embedding else plain
    if not any(fits) or (pair.is_embedding and not fits[1]):
        raise LayoutError(
            f"{weight.name}: shape {weight.shape} does not fit B @ A, which is {made[0]} x "
            f"{made[1]} ({pair.b.name} {pair.b.shape}, {pair.a.name} {pair.a.shape}). The adapter "
            "is of another model, or lies in parts: give its strategy files."
        )
    if pair.is_embedding:
        return True
    if all(fits):
        if settings.fan_in_fan_out is None:
            notes.append(
                "Square weights are taken as (out, in); give fan_in_fan_out=True "
                "(--fan-in-fan-out) if they are stored as (in, out)."
            )
        return bool(settings.fan_in_fan_out)
    return fits[1]


def _weight_of(pair: Adapter, kept: Mapping[str, Tensor], base: Catalog) -> str:
    name = base_name(pair.weight, kept)
    if name is None:
        raise NotFoundError(
            f"{pair.a.name} adapts {pair.weight}, and {base.root} has no such tensor among its "
            f"{len(kept)}.{nearest(pair.weight, kept)} If these are adapters alone, give the base "
            "model as the source and them as adapter=."
        )
    return name


def _with_files(base: Catalog, adapter: Catalog | None) -> tuple[tuple[File, ...], int]:
    """The files of both, and how much later the adapter's are numbered."""
    if adapter is None:
        return base.files, 0
    root = os.path.abspath(adapter.root)
    more = tuple(replace(f, path=os.path.join(root, f.path)) for f in adapter.files)
    return (*base.files, *more), len(base.files)


def _shifted(tensor: Tensor, by: int) -> Tensor:
    def piece(p: Piece) -> Piece:
        if p.view is not None and (p.view.operands or p.file < 0):
            raise LayoutError(f"{tensor.name}: an adapter is merged as it is stored, not mapped.")
        return replace(p, file=p.file + by)

    return replace(tensor, pieces=tuple(map(piece, tensor.pieces))) if by else tensor


def _notes(dropped: int, settings: Settings) -> list[str]:
    told = settings.where and not settings.given
    notes = [f"Alpha is as {settings.where} says."] if told else []
    if dropped:
        notes.append(f"{dropped} optimizer states of adapters are left out.")
    return notes
