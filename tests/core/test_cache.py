"""Recent: what was asked for last is kept, within its weight."""

from __future__ import annotations

from jaxshard.core.cache import Recent


def asked(recent: Recent[str, str], keys: str, weight: int = 1) -> str:
    """The keys that had to be made when all of ``keys`` were asked for in turn."""
    made: list[str] = []

    def make(key: str) -> str:
        made.append(key)
        return key.upper()

    for key in keys:
        assert recent.get(key, weight, lambda key=key: make(key)) == key.upper()
    return "".join(made)


def test_what_is_kept_is_not_made_again():
    assert asked(Recent(3), "abcabcaabbcc") == "abc"


def test_the_least_lately_asked_for_goes_first():
    recent = Recent[str, str](3)
    assert asked(recent, "abcad") == "abcd"
    assert asked(recent, "acd") == ""
    assert asked(recent, "b") == "b"


def test_the_weight_is_never_above_the_most_but_for_one_alone():
    recent = Recent[str, str](10)
    for weight in (4, 4, 4, 11, 3):
        asked(recent, chr(ord("a") + weight) + str(weight), weight)
        assert recent.weight <= max(10, weight)
    assert recent.weight == 6
