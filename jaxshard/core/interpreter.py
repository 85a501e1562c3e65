"""The Python interpreter: lazy imports of public names, pauses of the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def lazy_getattr(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` (PEP 562) that imports names on first access.

    _HOME = {"Mapping": "mapping", …}                # name -> module of the package
    __getattr__ = lazy_getattr(__name__, _HOME)
    """

    def getattr_once(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{home[name]}", package), name)
        setattr(sys.modules[package], name, value)  # later accesses do not come here
        return value

    return getattr_once


@contextmanager
def paused() -> Iterator[None]:
    """Pause collection of cycles; reference counting still frees all other objects.

    The collector scans the live objects again and again as their number grows. None of the
    records of a million tensors is garbage, and scanning them would take half of the time.

    >>> with paused():
    ...     gc.isenabled()
    False
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
