"""Lazy imports of a package's public names (PEP 562).

_HOME = {"Mapping": "mapping", …}                # name -> module of the package
__getattr__ = fetching(__name__, _HOME)          # PEP 562
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def fetching(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``: what is fetched once is found there from then on."""

    def fetch(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{home[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return fetch
