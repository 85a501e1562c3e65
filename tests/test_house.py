"""The measures of ``tools/house.py`` stay within limits, which are raised only for new concepts.

The files were 135 before the tables of model families, what is derived from them, and uploads:
11 modules more, and 3 less.
"""

from __future__ import annotations

import ast

import house
import pytest

LIMITS = {
    "files": 143,  # with the tables of model families
    "modules with one importer": 25,
    "packages and modules at the top": 20,
    "modules at the root": 2,
    "circles": 0,
    "file names in two packages": 0,
    "class names in two modules": 0,
    "public functions with **Any": 0,
    "public functions with Any": 87,
    "lists of formats": 0,
    "comparisons with a format's name": 1,
    "words of the dialect": 9,
    "modules without tests of their name": 13,
}


@pytest.fixture(scope="module")
def measures():
    return house.measures()


@pytest.mark.parametrize("measure", LIMITS)
def test_a_measure_is_within_its_limit(measures, measure):
    found = measures[measure]
    assert len(found) <= LIMITS[measure], "\n".join(found)


BAD = '''
"""Whoever reads this is told."""
from . import twin
class Catalog: ...
FORMATS = ("ckpt", "orbax", "unified")
def load(path, **how: Any): return path == "ckpt"
'''


def test_a_fault_of_any_kind_is_noticed(monkeypatch, measures):
    bad = {"formats/box": BAD, "formats/twin": "from . import box", "core/twin": BAD, "root": BAD}
    added = {
        name.replace("/", "."): (house.PACKAGE / f"{name}.py", text, ast.parse(text))
        for name, text in bad.items()
    }
    known = house.modules() | added
    monkeypatch.setattr(house, "modules", lambda: known)
    house.graph.cache_clear()
    worse = house.measures()
    house.graph.cache_clear()
    assert [name for name in worse if len(worse[name]) <= len(measures[name])] == []
