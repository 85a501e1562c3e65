"""Findings: everything of a request that cannot be, said in one report before a byte moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..catalog import Catalog
from ..errors import LayoutError, NotFoundError, nearest, some

_SUGGESTED = 3  # looking for near names costs time in a catalog of 100,000


@dataclass
class Findings:
    """What was found wrong, by kind."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def refuse(self, catalog: Catalog, names: Iterable[str]) -> None:
        """Raise if anything was found; ``names`` are those of the target.

        Raises:
            NotFoundError: names are missing on either side.
            LayoutError: only shapes, dtypes or shardings do not fit.
        """
        parts = []
        if self.missing:
            parts.append(
                f"{len(self.missing)} names of the target are not among the "
                f"{len(catalog.tensors)} tensors of {catalog.root}: {some(self.missing)}."
                + self._suggestions(self.missing, catalog.tensors)
                + self._tied(catalog)
                + " Map names with name_of=, or leave them as they are with strict=False."
            )
        if self.unexpected:
            parts.append(
                f"{len(self.unexpected)} tensors of {catalog.root} are not in the target: "
                f"{some(self.unexpected)}."
                + self._suggestions(self.unexpected, names)
                + " Leave them out with exclude= or strict=False."
            )
        if self.misfits:
            listed = "\n  ".join(self.misfits[:20])
            more = len(self.misfits) - 20
            parts.append(
                f"{len(self.misfits)} tensors do not fit the target:\n  {listed}"
                + (f"\n  and {more} more" if more > 0 else "")
            )
        if parts:
            kind = NotFoundError if self.missing or self.unexpected else LayoutError
            raise kind("\n".join(parts))

    @staticmethod
    def _suggestions(names: list[str], known: Iterable[str]) -> str:
        listed = list(known)
        return "".join(
            f" For {name}:{hint}" for name in names[:_SUGGESTED] if (hint := nearest(name, listed))
        )

    def _tied(self, catalog: Catalog) -> str:
        if not catalog.model.tied_embeddings or not any("head" in n for n in self.missing):
            return ""
        return (
            " The config ties the head to the embedding, which is stored once: let name_of map "
            "both names to it."
        )
