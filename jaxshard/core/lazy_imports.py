"""Lazy imports of a package's public names (PEP 562).

_HOME = {"Mapping": "mapping", …}                # name -> module of the package
__getattr__ = lazy_getattr(__name__, _HOME)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_getattr(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that imports each name of ``home`` on first access."""

    def getattr_once(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{home[name]}", package), name)
        setattr(sys.modules[package], name, value)  # later accesses do not come here
        return value

    return getattr_once
