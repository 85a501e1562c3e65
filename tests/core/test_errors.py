"""Errors: each is also a builtin, has its exit status, and prints as it was written."""

from __future__ import annotations

import pickle

import pytest

from jaxshard import errors


@pytest.mark.parametrize(
    ("kind", "builtin", "status"),
    [
        (errors.FormatError, ValueError, 3),
        (errors.CoverageError, ValueError, 3),
        (errors.LayoutError, ValueError, 2),
        (errors.NotFoundError, KeyError, 2),
        (errors.StorageError, OSError, 4),
    ],
)
def test_each_error_is_also_a_builtin(kind, builtin, status):
    error = kind('lm_head.weight: "quoted"')
    assert isinstance(error, builtin)
    assert isinstance(error, errors.JaxshardError)
    assert error.exit_status == status
    assert str(error) == 'lm_head.weight: "quoted"'  # KeyError's own would be quoted once more
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (list("abcde"), "a, b, c, d, e"),
        (list("abcdef"), "a, b, c, d, e and 1 more"),
    ],
)
def test_some_names_are_a_few_and_the_number_of_the_rest(names, text):
    assert errors.format_list(names) == text
    assert errors.format_list(iter(names)) == text


def test_the_nearest_name_is_offered_if_it_is_near():
    assert errors.did_you_mean("model.nrom.weight", ["model.norm.weight", "lm_head"]) == (
        " Did you mean model.norm.weight?"
    )
    assert errors.did_you_mean("xyz", ["model.norm.weight"]) == ""
