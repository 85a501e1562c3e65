"""The memory budget of a load: how it is divided, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.errors import LayoutError
from jaxshard.loader import memory_budget
from jaxshard.loader.memory_budget import MemoryNeed, available_bytes, check_memory, share_out
from jaxshard.storage.resources import LEAST_BYTES

sizes = st.integers(0, 1 << 34)


@given(kept=sizes, largest=sizes, workers=st.integers(1, 64), host_bytes=st.integers(1, 1 << 35))
def test_blocks_and_transfers_stay_within_the_budget(kept, largest, workers, host_bytes):
    need = MemoryNeed(kept, largest, 4 * largest)
    try:
        budget, in_flight = share_out(need, host_bytes, workers)
    except LayoutError:
        assert host_bytes < largest + LEAST_BYTES
        return
    assert budget.host_bytes + (in_flight or 0) <= max(host_bytes, LEAST_BYTES)
    assert 1 <= budget.workers <= workers
    assert (in_flight is None) == (not largest)
    assert in_flight is None or in_flight >= largest


def test_a_refusal_names_a_budget_that_works():
    need = MemoryNeed(0, 1 << 20, 1 << 22)
    with pytest.raises(LayoutError, match=f"Pass host_bytes={(1 << 20) + LEAST_BYTES} or more"):
        share_out(need, 1 << 20, 2)
    share_out(need, (1 << 20) + LEAST_BYTES, 2)


def test_more_than_the_available_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory_budget, "available_bytes", lambda: 1 << 40)
    check_memory(MemoryNeed(1 << 39, 0, 0), 1 << 20)
    with pytest.raises(LayoutError, match=r"arrays 2199023255552.*1099511627776 are available"):
        check_memory(MemoryNeed(1 << 41, 0, 0), 1 << 20)


def test_the_system_has_a_figure_here():
    found = available_bytes()
    assert found is None or found > 1 << 20
