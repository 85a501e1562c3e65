"""What users rely on stays as it is: names, arguments, flags, files, requests, JSON keys."""

from __future__ import annotations

import json

import contract
import pytest

PROMISED = json.loads(contract.PLACE.read_text())


@pytest.fixture(scope="module")
def found():
    return contract.contract()


@pytest.mark.parametrize("part", sorted(PROMISED))
def test_what_users_rely_on_stays_as_it_is(found, part):
    assert found[part] == PROMISED[part], (
        "deliberate? Run: python tests/support/contract.py --write"
    )


def test_no_part_of_the_contract_is_unknown(found):
    assert sorted(found) == sorted(PROMISED)
    assert len(PROMISED["files"]) >= 11
    assert sum(map(len, PROMISED["flags"].values())) > 60
