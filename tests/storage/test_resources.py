"""Sizes that callers give, and the budget that follows from them."""

from __future__ import annotations

import pytest

from jaxshard.errors import LayoutError
from jaxshard.storage.resources import budget_for, fit_budget, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("5GB", 5 * 10**9),
        ("4GiB", 4 * 2**30),
        ("500 mb", 500 * 10**6),
        ("1.5kB", 1500),
        ("0.1TB", 10**11),
        ("9007199254740993", 9007199254740993),
        (12, 12),
    ],
)
def test_a_size_is_a_number_with_a_unit(text, num_bytes):
    assert parse_size(text, "host_bytes") == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "5XB", "-5GB", "0", 0, -1, "1e9", "nan", True, "5GB!", "9" * 5000]
)
def test_an_invalid_size_is_refused_with_the_name_of_its_argument(text):
    with pytest.raises(LayoutError, match=r"^host_bytes= \(--host-bytes\): .* is not a size"):
        parse_size(text, "host_bytes")


def test_a_budget_is_the_same_for_a_number_and_for_text():
    assert budget_for("64MiB", 2) == budget_for(64 << 20, 2) == fit_budget(64 << 20, 2)


def test_zero_is_not_the_default():
    for host_bytes, workers in ((0, None), (None, 0)):
        with pytest.raises(LayoutError, match=r"host_bytes|workers"):
            budget_for(host_bytes, workers)
