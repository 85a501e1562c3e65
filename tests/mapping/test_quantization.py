"""Quantized checkpoints become the values that the libraries that wrote them compute."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from mapping_random import Sizes, config_of
from mapping_worlds import Memory

from jaxshard.core.catalog import Model
from jaxshard.errors import FormatError
from jaxshard.mapping import Dequantize, dequantized

QUANTIZED = {
    "a.weight": np.ones((2, 2), ml_dtypes.float8_e4m3fn),
    "a.weight_scale_inv": np.ones((1, 1), np.float32),
}


def model_of(**config: object) -> Model:
    return Model("deepseek_v3", None, False, {**config_of("deepseek_v3", Sizes()), **config})


@pytest.mark.parametrize(
    ("quantization", "block"),
    [
        ("fp8", (128, 128)),
        (None, (128, 128)),
        ({}, (128, 128)),
        ({"weight_block_size": [4, 2]}, (4, 2)),
        ({"weight_block_size": 5}, None),
        ({"weight_block_size": [0, 0]}, None),
        ({"weight_block_size": [4]}, None),
        ({"weight_block_size": [4, "2"]}, None),
        ({"weight_block_size": [True, 2]}, None),
    ],
)
def test_blocks_of_factors_follow_the_config_or_are_refused(quantization, block) -> None:
    catalog = Memory(QUANTIZED).catalog
    object.__setattr__(catalog, "model", model_of(quantization_config=quantization))
    if block is None:
        with pytest.raises(FormatError, match=r"weight_block_size is .*, expected two numbers"):
            dequantized(catalog)
    else:
        found = dequantized(catalog)
        assert found is not None
        assert found.ops == (Dequantize(block=block),)


@pytest.mark.parametrize("word", ["int8", "float8_e4m3fn", 7, None, "nonsense"])
def test_a_dtype_that_is_no_float_is_not_what_weights_become(word) -> None:
    catalog = Memory(QUANTIZED).catalog
    object.__setattr__(catalog, "model", model_of(dtype=word, torch_dtype="float16"))
    found = dequantized(catalog)
    assert found is not None
    assert found.ops[0].dtype == "F16"
