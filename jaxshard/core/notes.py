"""Notes: findings that are not errors, and their delivery to the user.

Code that finds something adds a text to the ``notes`` of what it returns (a catalog, a layout,
a report), and logs nothing. The verb that the user called logs them once, at its door: ``open``,
``load``, ``load_rank``, ``convert``, ``plan``, ``verify``, ``save``, ``reshard``, ``merge_lora``,
and the functions of ``mindformers``. The command line prints notes with its answers and calls
what is below the doors, so each is seen once there too.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import lru_cache

from .catalog import Catalog

# It has no handler: where no logging is set up, Python prints its warnings to standard error.
_log = logging.getLogger("jaxshard")


def log_notes(subject: str, notes: Iterable[str], logged: Collection[str] = ()) -> None:
    """Log each of ``notes`` on ``subject`` once, as a warning, but those that were ``logged``."""
    for note in dict.fromkeys(notes):
        if note not in logged:
            _log.warning("%s: %s", subject, note)


@lru_cache(maxsize=1024)
def log_once(subject: str, note: str) -> None:
    """Log a note on ``subject`` once in this process: of steps that are saved alike, say."""
    _log.warning("%s: %s", subject, note)


def with_notes_logged(catalog: Catalog) -> Catalog:
    """``catalog``, once those of its notes are logged that no earlier verb has logged.

    What is made of the result remembers it: a checkpoint that is opened once and loaded for
    each of eight ranks logs its notes once.
    """
    log_notes(catalog.root, catalog.notes, catalog.logged)
    return replace(catalog, logged=catalog.logged.union(catalog.notes))
