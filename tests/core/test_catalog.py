"""Catalogs: asked by name."""

from __future__ import annotations

import pytest

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.errors import NotFoundError


def catalog() -> Catalog:
    pieces = (StoredShard(0, 64, Box((0, 0), (4, 8))), StoredShard(1, 64, Box((0, 0), (4, 8))))
    tensors = {"norm.weight": Tensor("norm.weight", BY_NAME["BF16"], (4, 8), pieces)}
    return Catalog("llama", "ranks", (File("a", 128), File("b", 128)), tensors)


def test_a_tensor_is_found_by_its_name():
    assert catalog()["norm.weight"].shape == (4, 8)


def test_a_name_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(NotFoundError, match=r"among the 1 of llama. Did you mean norm.weight\?"):
        catalog()["nrom.weight"]


def test_replicas_are_counted_once():
    assert catalog()["norm.weight"].num_bytes == catalog().num_bytes == 64


def test_a_catalog_is_short_when_printed():
    assert len(repr(catalog())) < 400
