"""Problems report all mismatches between a source and a target in one error."""

from __future__ import annotations

import pytest

from jaxshard.errors import LayoutError, NotFoundError, Problems


def test_all_problems_are_in_one_error():
    problems = Problems("src/", ["a.wight"], ["b"], ["c: shape (2,), expected (3,)"])
    with pytest.raises(NotFoundError) as caught:
        problems.check(["a.weight", "b"], ["a.wight"], if_missing="Rename it.")
    text = str(caught.value)
    assert "1 names of the target are not among the 2 tensors of src/: a.wight." in text
    assert "a.weight" in text
    assert "Rename it." in text
    assert "1 tensors of src/ are not in the target: b." in text
    assert "1 tensors do not fit the target:\n  c: shape (2,), expected (3,)" in text


def test_misfits_alone_are_a_layout_error_with_a_bounded_list():
    with pytest.raises(LayoutError, match=r"(?s)30 tensors do not fit.*and 10 more"):
        Problems("src/", misfits=[f"t{n}" for n in range(30)]).check([], [])


def test_without_problems_nothing_is_raised():
    Problems("src/").check(["a"], ["a"])
