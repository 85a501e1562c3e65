"""The fetch stage: what is requested, how much is held, and that it ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, StoredShard
from jaxshard.errors import StorageError
from jaxshard.storage import fetch
from jaxshard.storage.fetch import RemoteFiles, groups_of, planned
from jaxshard.storage.io import GAP_BYTES

SIZE = 64 << 20
WINDOW = 16 << 20


class Folder:
    """A remote folder of one file, whose bytes are their offsets modulo 251."""

    def __init__(self):
        self.requests = []
        self.fails_at = None

    @property
    def num_requests(self):
        return len(self.requests)

    def get(self, file, start, stop):
        self.requests.append((file.path, start, stop))
        if self.fails_at is not None and start <= self.fails_at < stop:
            raise StorageError("the store refuses")
        return memoryview((np.arange(start, stop) % 251).astype(np.uint8))

    def close(self):
        pass


@pytest.fixture
def files(monkeypatch):
    folder = Folder()
    monkeypatch.setattr(fetch, "RemoteFolder", lambda root, files: folder)
    catalog = Catalog("s3://b/m", "huggingface", (File("a", SIZE), File("b", SIZE)), {})
    files = RemoteFiles(catalog)
    files.folder = folder
    yield files
    files.close()


def _piece(file=0):
    return StoredShard(file, 0, Box.whole(()))


batches = st.lists(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, SIZE - (2 << 20)), st.integers(1, 2 << 20)),
        min_size=0,
        max_size=4,
    ).map(lambda spans: sorted((f, a, a + n) for f, a, n in spans)),
    max_size=20,
)


@given(batches)
def test_every_span_is_in_the_request_of_its_group(batches):
    groups = list(groups_of(batches))
    assert sum(group.num_batches for group in groups) == len(batches)
    at = iter(batches)
    for group in groups:
        for spans in (next(at) for _ in range(group.num_batches)):
            for file, start, stop in spans:
                assert any(f == file and a <= start and stop <= b for f, a, b in group.spans)


def test_neighbours_share_a_request_and_gaps_beyond_a_mebibyte_do_not():
    near = [[(0, 0, 100)], [(0, 200, 300)]]
    far = [[(0, 0, 100)], [(0, 101 + GAP_BYTES, 102 + GAP_BYTES)]]
    assert planned(near) == (1, 300)
    assert planned(far) == (2, 101)


def test_bytes_are_lent_until_their_batch_is_done(files):
    batches = [[(0, i << 20, (i + 1) << 20)] for i in range(64)]
    for number, release in enumerate(files.fetched(batches, WINDOW)):
        view = files.lend(_piece(), number << 20, 1 << 20)
        assert view is not None
        assert view[5] == ((number << 20) + 5) % 251
        release()
    assert files.lend(_piece(), 0, 1) is None
    assert (len(files.folder.requests), SIZE) == planned(batches)


def test_no_more_than_the_window_is_held(files):
    batches = [[(0, i << 20, (i + 1) << 20)] for i in range(64)]
    for release in files.fetched(batches, WINDOW):
        release()
    assert files.most_held_bytes <= WINDOW


def test_a_read_that_was_not_planned_is_a_request_of_its_own(files):
    buffer = bytearray(10)
    files.read(_piece(1), 1000, memoryview(buffer))
    assert buffer[0] == 1000 % 251
    assert files.folder.requests == [("b", 1000, 1010)]


def test_the_error_of_a_request_is_raised_in_its_turn(files):
    files.folder.fails_at = 20 << 20
    batches = [[(0, i << 20, (i + 1) << 20)] for i in range(64)]
    done = []

    def run():
        for release in files.fetched(batches, WINDOW):
            release()
            done.append(release)

    with pytest.raises(StorageError, match="refuses"):
        run()
    assert len(done) == 20
