"""Strategy files and weight files from strangers: refused, or read consistently; never a crash."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from math import prod

import pytest
from counting_folder import CountingFolder
from golden_files import LAYOUTS, golden

from jaxshard.core.box import Box
from jaxshard.core.dtypes import dtype, num_bytes
from jaxshard.core.layout import Layout
from jaxshard.errors import CoverageError, FormatError, LayoutError
from jaxshard.formats import mindspore_ckpt as ckpt
from jaxshard.formats import strategy_codec as messages
from jaxshard.formats import strategy_files as sf
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.strategy_codec import Operator, ParamLayout, StrategyFile

W = ParamLayout((2,), ((0, -1),))
N = ParamLayout((2,), ((-1,),))
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x12, 0x1A]
KEYS = {0x08, 0x0A, 0x12, 0x1A}


def mutations(
    seeds: list[bytes], count: int, rng: random.Random, *, at_keys: bool = False
) -> Iterator[bytes]:
    """``seeds`` with bytes changed, dropped, doubled, grown or cut off; near keys if asked.

    Most bytes of a weight file are weights, where a change means nothing.
    """
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            keys = [i for i, byte in enumerate(data) if byte in KEYS] if at_keys else []
            at = (
                max(0, rng.choice(keys) + rng.randrange(-1, 4))
                if keys
                else rng.randrange(len(data) + 1)
            )
            what = rng.randrange(6)
            if what == 0:
                data[at : at + 1] = bytes([rng.choice(EXTREMES)])
            elif what == 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            elif what == 2:
                del data[at : at + rng.randrange(1, 9)]
            elif what == 3:
                data[at:at] = data[at : at + rng.randrange(1, 60)]
            elif what == 4:
                data[at:at] = b"\xff" * rng.randrange(1, 11) + b"\x01"
            else:
                del data[at:]
        yield bytes(data)


def small_strategies() -> list[bytes]:
    """Golden files cut to a few parameters of each kind, so that many can be tried."""
    seeds = []
    for name in LAYOUTS:
        data = golden(name, "merged_strategy.ckpt").read_bytes()
        file = sf.read_file(MemoryFolder({"f": data}), "f")
        stages = {}
        for stage, params in file.stages.items():
            kinds = {param: n for n, param in params.items()}
            stages[stage] = {n: param for param, n in kinds.items()}
        operators = tuple(Operator("op", s, ((1, 2), (2,))) for s in stages)
        seeds.append(messages.to_bytes(StrategyFile("f", stages, operators, True, 1)))
        first = {0: stages[0]}
        seeds.append(messages.to_bytes(StrategyFile("f", first, operators[:1], False, 2)))
    return seeds


def test_mutated_strategy_files_are_refused_or_read_consistently() -> None:
    rng, outcomes, longest = random.Random(20), {"read": 0, "refused": 0}, 0
    for data in mutations(small_strategies(), 20_000, rng):
        try:
            strategies = sf.read(MemoryFolder({"f": data}))
            layout = sf.layout(strategies)
        except (FormatError, LayoutError, CoverageError) as error:
            outcomes["refused"] += 1
            longest = max(longest, len(str(error)))
            continue
        outcomes["read"] += 1
        if strategies.num_ranks > 64:
            continue
        again = sf.read(MemoryFolder({"f": sf.merged_file(strategies)}))
        assert {s: v.params for s, v in again.stages.items()} == {
            s: v.params for s, v in strategies.stages.items()
        }
        check_boxes(layout)
    assert min(outcomes.values()) > 1000, outcomes
    assert longest < 3000


def json_strategies() -> list[bytes]:
    """The same golden files as JSON, where JSON can say it, and a small one."""
    seeds = [sf.json_file(sf.Strategies({0: sf.Stage(0, "x", {"w": W, "n": N})}))] * 3
    for data in small_strategies():
        with suppress(LayoutError):
            seeds.append(sf.json_file(sf.read(MemoryFolder({"f": data}))))
    return seeds


def test_mutated_json_strategies_are_refused_or_read_consistently() -> None:
    """What is read has boxes, and no number in the file makes us read or allocate more."""
    outcomes, longest, folder = {"read": 0, "refused": 0}, 0, None
    tracemalloc.start()
    try:
        for data in mutations(json_strategies(), 10_000, random.Random(3)):
            folder = CountingFolder({"f.json": data})
            try:
                layout = sf.layout(sf.read(folder))
            except (FormatError, LayoutError, CoverageError) as error:
                outcomes["refused"] += 1
                longest = max(longest, len(str(error)))
            else:
                outcomes["read"] += 1
                check_boxes(layout)
            assert folder.num_bytes <= len(data) + 100
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > 500, outcomes
    assert longest < 3000
    assert peak < 30_000_000


def check_boxes(layout: Layout) -> None:
    """Every rank's box is of its own shape and the shards together are the tensor."""
    for placements in set(layout.placements.values()):
        for p in placements:
            shape = tuple(p.ways(d) for d in range(len(p.spec)))
            last = p.box(shape, p.ranks.stop - 1)
            assert Box.whole(shape).contains(last)
            if p.num_ranks <= 64:
                assert p.boxes(shape)[-1] == last
                assert sum(s.box.size for s in p.shards(shape)) == prod(shape)


def test_deeply_nested_json_is_refused() -> None:
    for text in (
        b"[" * 100_000,
        b'{"parallel_strategy_item":' + b'{"a":' * 900 + b"1" + b"}" * 901,
    ):
        with pytest.raises(FormatError):
            sf.read(MemoryFolder({"f.json": text}))


def weight_files() -> list[bytes]:
    out = [
        golden("ckpt_formats", f"{n}.ckpt").read_bytes()
        for n in ("all_dtypes", "with_str", "chunked", "chunked_async", "crc")
    ]
    small = ckpt.layout_file(
        [("w", dtype("F32"), (3, 5)), ("s", dtype("I64"), ()), ("e", dtype("U8"), (2, 0))],
        strings={"t": "x"},
        chunk_bytes=8,
    )
    data = bytearray(small.num_bytes)
    for at, part in small.segments:
        data[at : at + len(part)] = part
    return [*out, *[bytes(data)] * 3]


def test_mutated_weight_files_are_refused_or_read_consistently() -> None:
    outcomes = {"read": 0, "refused": 0}
    for data in mutations(weight_files(), 15_000, random.Random(7), at_keys=True):
        folder = CountingFolder({"f": data})
        try:
            header = ckpt.read_header(folder, "f")
            outcomes["read"] += 1
            for entry in header.entries:
                sizes = [num_bytes(box.shape, entry.dtype) for _, box in entry.pieces]
                assert sum(sizes) == num_bytes(entry.shape, entry.dtype)
                for (offset, box), size in zip(entry.pieces, sizes, strict=True):
                    assert 0 <= offset <= offset + size <= len(data)
                    assert Box.whole(entry.shape).contains(box)
        except FormatError:
            outcomes["refused"] += 1
        assert folder.num_bytes <= 4 * len(data) + 100  # no length in the file makes us read more
    assert min(outcomes.values()) > 500, outcomes


def header_or_error(data: bytes) -> ckpt.CkptHeader | str:
    try:
        return ckpt.read_header(MemoryFolder({"f": data}), "f")
    except FormatError as error:
        return str(error)


def test_what_is_read_at_once_is_what_is_read_field_by_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values as MindSpore writes them are read in a shorter way, which must lead to the same."""
    tried = [*weight_files(), *mutations(weight_files(), 3_000, random.Random(5), at_keys=True)]
    usual, taken = ckpt._usual, []
    monkeypatch.setattr(ckpt, "_usual", lambda *a: taken.append(usual(*a)) or taken[-1])
    at_once = [header_or_error(data) for data in tried]
    assert sum(value is not None for value in taken) > len(taken) // 2
    monkeypatch.setattr(ckpt, "_usual", lambda *a: None)
    for data, found in zip(tried, at_once, strict=True):
        assert header_or_error(data) == found
