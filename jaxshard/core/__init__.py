"""Core values: boxes, dtypes, strategies, layouts and catalogs. They open no file and no device.

``lazy_getattr`` is here because ``import jaxshard`` needs it alone: it imports no other module.
"""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False  # as in typing, which would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
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
