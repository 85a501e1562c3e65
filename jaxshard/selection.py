"""Selection: which tensors of a checkpoint a conversion takes.

Accumulated gradients are worthless once a job has stopped, and nobody asks for them, so
they are left out unless kept on purpose; that, and anything else left out that a person
may not expect, is said in a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .catalog import Catalog, Tensor
from .errors import LayoutError, NotFoundError, nearest, some

ACCUMULATED = "accu_grads."


def select(
    catalog: Catalog,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    drop_prefixes: Iterable[str] = (),
    *,
    keep_accu_grads: bool = True,
) -> tuple[list[Tensor], tuple[str, ...]]:
    """The tensors of ``catalog`` that the expressions and prefixes leave, and notes.

    Raises:
        NotFoundError: an expression of ``include`` matches nothing, or nothing is left.
        LayoutError: not a regular expression.
    """
    wanted, unwanted = _patterns(include), _patterns(exclude)
    prefixes = (drop_prefixes,) if isinstance(drop_prefixes, str) else tuple(drop_prefixes)
    names = list(catalog.tensors)
    for pattern in wanted:
        if not any(map(pattern.search, names)):
            raise NotFoundError(
                f"--include {pattern.pattern} matches none of the {len(names)} tensors of "
                f"{catalog.root}.{nearest(pattern.pattern, names)}"
            )
    left = [
        t
        for t in catalog.tensors.values()
        if (not wanted or any(p.search(t.name) for p in wanted))
        and not any(p.search(t.name) for p in unwanted)
        and not t.name.startswith(prefixes or ("\0",))
    ]
    notes = [
        f"no tensor begins with {prefix}: --drop-prefix {prefix} drops nothing."
        for prefix in prefixes
        if not any(n.startswith(prefix) for n in names)
    ]
    gradients = [t.name for t in left if t.name.startswith(ACCUMULATED)]
    if gradients and not keep_accu_grads and not wanted:
        left = [t for t in left if not t.name.startswith(ACCUMULATED)]
        notes.append(
            f"{len(gradients)} accumulated gradients ({some(gradients, 2)}) are left out; they are "
            "kept with --keep-accu-grads."
        )
    if not left:
        raise NotFoundError(f"no tensor of {catalog.root} is left: all of them are excluded.")
    return left, tuple(notes)


def _patterns(expressions: Iterable[str]) -> list[re.Pattern[str]]:
    if isinstance(expressions, str):
        expressions = [expressions]
    found = []
    for text in expressions:
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise LayoutError(f"{text!r} is not a regular expression: {error}.") from None
    return found
