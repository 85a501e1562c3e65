"""Dtypes: NumPy's and ml_dtypes' widths, and how packed elements are counted."""

from __future__ import annotations

import json
import re
from math import prod

import ml_dtypes
import numpy as np
import pytest
import safetensors

from jaxshard.core.box import Box
from jaxshard.core.dtypes import BY_NAME, BY_NUMPY, dtype, in_units, num_bytes
from jaxshard.errors import FormatError, LayoutError

F4, F6, BF16 = BY_NAME["F4"], BY_NAME["F6_E2M3"], BY_NAME["BF16"]


@pytest.mark.parametrize("kind", [k for k in BY_NAME.values() if k.numpy and k.bits >= 8])
def test_elements_are_as_wide_as_numpy_has_them(kind):
    known = np.dtype(getattr(ml_dtypes, kind.numpy, kind.numpy))
    assert known.itemsize * 8 == kind.bits
    assert BY_NUMPY[known.name] is kind
    assert (kind.unit_elements, kind.unit_bytes) == (1, known.itemsize)


def test_packed_elements_are_counted_in_whole_bytes():
    assert (F4.unit_elements, F4.unit_bytes) == (2, 1)
    assert (F6.unit_elements, F6.unit_bytes) == (4, 3)
    assert ml_dtypes.finfo(ml_dtypes.float4_e2m1fn).bits == F4.bits


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 8), (5, 4, 4)])
def test_bytes_are_elements_times_bits(shape):
    for kind in BY_NAME.values():
        bits = prod(shape) * kind.bits
        if bits % 8:
            with pytest.raises(FormatError, match="do not fill whole bytes"):
                num_bytes(shape, kind)
        else:
            assert num_bytes(shape, kind) == bits // 8


def test_an_unknown_dtype_is_refused_with_those_there_are():
    with pytest.raises(FormatError, match=r"'bf16' is not one of .*BF16"):
        dtype("bf16")


def test_whole_byte_dtypes_are_their_own_units():
    boxes = (Box((0, 1), (2, 3)),)
    assert in_units((2, 3), boxes, BF16) == ((2, 3), boxes)


@pytest.mark.parametrize(
    ("kind", "shape", "box", "units"),
    [
        (F4, (2, 8), Box((1, 2), (2, 6)), ((2, 4), Box((1, 1), (2, 3)))),
        (F6, (2, 8), Box((0, 4), (2, 8)), ((2, 2), Box((0, 1), (2, 2)))),
        (F4, (2, 3), Box((0, 0), (2, 3)), ((3,), Box((0,), (3,)))),
        (F4, (0, 3), Box((0, 0), (0, 3)), ((0,), Box((0,), (0,)))),
    ],
)
def test_boxes_of_packed_dtypes_are_counted_in_units(kind, shape, box, units):
    shape_in_units, (found,) = in_units(shape, (box,), kind)
    assert (shape_in_units, found) == units
    assert found.size * kind.unit_bytes == box.size * kind.bits // 8


def test_a_cut_through_a_byte_is_refused_with_the_way_out():
    with pytest.raises(LayoutError, match=r"packs 2 elements in 1 byte.*Split another dim"):
        in_units((2, 8), (Box((0, 1), (2, 8)),), F4)
    with pytest.raises(LayoutError, match=r"moved but not cut. Leave it whole"):
        in_units((2, 3), (Box((0, 0), (1, 3)),), F4)


#: The dtypes of the safetensors format, and their bits.
FORMAT = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16},
    **{"U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
}


def file_of(name: str, data: bytes) -> bytes:
    """A safetensors file of twelve elements, spelled out by hand."""
    told = {"dtype": name, "shape": [12], "data_offsets": [0, len(data)]}
    header = json.dumps({"t": told}).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_the_dtypes_are_all_of_the_format():
    assert len(FORMAT) == 22
    assert {k.name: k.bits for k in BY_NAME.values()} == FORMAT


@pytest.mark.parametrize("name", FORMAT)
def test_the_safetensors_package_knows_each_and_its_width(name):
    data = bytes(12 * FORMAT[name] // 8)
    ((_, told),) = safetensors.deserialize(file_of(name, data))
    assert (told["dtype"], bytes(told["data"])) == (name, data)
    for wrong in (data + b"\0", data[1:]):
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(file_of(name, wrong))


def test_the_safetensors_package_knows_no_other():
    """It names all that it knows where it meets one that it does not."""
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(file_of("F7", bytes(12)))
    known = set(re.findall(r"`(\w+)`", str(caught.value))) - {"F7"}
    assert known == set(FORMAT)
