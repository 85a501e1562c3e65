"""Fuzzed safetensors headers: refused, or read as the package reads them."""

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from safetensors_oracle import ENTRY, WatchedFolder, disagreement, filled, packed, read_all

from jaxshard.core.dtypes import BY_NAME
from jaxshard.errors import FormatError
from jaxshard.formats import safetensors as ours
from jaxshard.formats.safetensors import layout_file

NUM_MUTANTS = 50_000


def seeds() -> list[bytes]:
    """Valid files to mutate."""
    kinds = list(BY_NAME.items())
    several = [(n, k, (2, k.unit_elements)) for n, k in kinds]
    return [
        filled(
            layout_file([(f"w.{i}", BY_NAME["F32"], (i, 3)) for i in range(4)], {"format": "pt"})
        ),
        filled(layout_file(several, {})),
        packed({"a": ENTRY, "b": {**ENTRY, "data_offsets": [2, 4]}}, b"1234"),
        packed({"é": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"12"),
    ]


def mutants(count: int) -> Iterator[bytes]:
    rng, originals = random.Random(20), seeds()
    kinds: list[Callable[[random.Random, bytes], bytes]] = [
        _flip_bytes, _cut, _splice, _change_json, _change_json, _change_json, _lie_about_the_size,
    ]  # fmt: skip
    for number in range(count):
        content = rng.choice(originals)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            content = kinds[number % len(kinds)](rng, content)
        yield content


def _flip_bytes(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randint(0, len(content))]


def _splice(rng: random.Random, content: bytes) -> bytes:
    """Repeat, drop or move a stretch of the header, and correct the length before it."""
    size = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + size], content[8 + size :]
    a, b = sorted(rng.randint(0, len(text)) for _ in range(2))
    at = rng.randint(0, len(text))
    text = rng.choice([text[:a] + text[b:], text[:at] + text[a:b] + text[at:]])
    return packed(text, data)


_NASTY = (
    None, True, False, -1, 0, 1, 2, 3, 8, 2**31, 2**32, 2**63, 2**64, 2**64 - 1, 10**40, 0.5, 1e300,
    "", "U8", "F32", "BF16", "F4", "F6_E2M3", "C128", "__metadata__", [], [0], [0, 0], [1, 2], {},
    [2**32, 2**32], [[]], {"dtype": "U8"}, {"a": "b"}, ENTRY, "\x00", "\ud800",
)  # fmt: skip


def _change_json(rng: random.Random, content: bytes) -> bytes:
    """Change one node of the header's tree, and correct the length before it."""
    size = int.from_bytes(content[:8], "little")
    try:
        tree = json.loads(content[8 : 8 + size])
    except ValueError:
        return _flip_bytes(rng, content)
    node, steps = tree, rng.randint(0, 3)
    for _ in range(steps):
        inner = [v for v in _values(node) if isinstance(v, dict | list) and v]
        node = rng.choice(inner) if inner else node
    if isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if rng.random() < 0.2:
            del node[key]
        elif type(node[key]) is int and rng.random() < 0.5:
            node[key] += rng.choice([-1, 1, 8, 64])
        else:
            node[key] = rng.choice(_NASTY)
    return packed(json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode(
        errors="surrogatepass"), content[8 + size :])  # fmt: skip


def _values(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _lie_about_the_size(rng: random.Random, content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    lies = [size + rng.randint(-70, 70), rng.getrandbits(64), rng.getrandbits(24), 0, 1, 10**8]
    lie = max(0, rng.choice(lies))
    return lie.to_bytes(8, "little") + content[8:] if lie < 2**64 else content


def test_fuzzed_headers_are_refused_or_read_as_the_package_reads_them():
    found = [why for m in mutants(NUM_MUTANTS) if (why := disagreement(m))]
    assert found == []


def test_the_fuzz_finds_a_reader_that_does_not_check_for_holes(monkeypatch):
    monkeypatch.setattr(ours, "_check_cover", lambda *args: None)
    assert any(disagreement(m) for m in mutants(NUM_MUTANTS // 50))


def test_fuzzed_headers_never_take_more_memory_than_a_few_times_their_bytes():
    all_mutants = list(mutants(2_000))
    tracemalloc.start()
    try:
        for content in all_mutants:
            with suppress(FormatError):
                read_all(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * max(map(len, all_mutants))


def test_the_folder_that_watches_the_reads_stops_one_past_the_end():
    with pytest.raises(AssertionError):
        WatchedFolder(b"12345678").read("f", 4, 5)
