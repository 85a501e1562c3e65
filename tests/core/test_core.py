"""Lazy attributes of a package, and pauses of the garbage collector."""

from __future__ import annotations

import gc

import pytest

import jaxshard
from jaxshard.core import lazy_getattr
from jaxshard.core.runtime import paused


def test_a_name_is_imported_on_first_access_and_kept(monkeypatch):
    getattr_once = lazy_getattr("jaxshard", {"Box": "core.box"})
    monkeypatch.delitem(vars(jaxshard), "Box", raising=False)
    box = getattr_once("Box")
    assert vars(jaxshard)["Box"] is box
    assert box.__module__ == "jaxshard.core.box"
    monkeypatch.delitem(vars(jaxshard), "Box")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxshard' has no attribute 'Box'"):
        lazy_getattr("jaxshard", {})("Box")


@pytest.mark.parametrize("was_enabled", [True, False])
def test_collection_is_paused_and_then_as_before_even_after_an_error(was_enabled):
    @paused()
    def fail():
        raise ValueError(f"enabled: {gc.isenabled()}")

    try:
        if not was_enabled:
            gc.disable()
        with pytest.raises(ValueError, match="enabled: False"):
            fail()
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
