"""Arrays that are on devices are mapped there: shared dims stay shared, and the host sees none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import array as jax_array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mapping_random import Sizes, config_of, random_model, write_model

from jaxshard.api import gather, reshard
from jaxshard.conversion.open import open_checkpoint
from jaxshard.errors import LayoutError
from jaxshard.loader import load
from jaxshard.mapping import Mapping, Rename, Stack, Transpose, find_mapping

SIZES = Sizes(layers=3)
SOURCE = random_model("llama", SIZES)


class HostReads:
    """Counts the bytes that JAX brings to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_bytes = 0
        read = jax_array.ArrayImpl._value.fget

        def _value(array: Any) -> Any:
            self.num_bytes += array.nbytes
            return read(array)

        monkeypatch.setattr(jax_array.ArrayImpl, "_value", property(_value))


@pytest.fixture
def host_reads(monkeypatch: pytest.MonkeyPatch) -> HostReads:
    return HostReads(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "hf", config_of("llama", SIZES), SOURCE)


@pytest.mark.parametrize("form", ["mindformers-concat", "mcore-fused", "nnx-scan", "maxtext"])
def test_arrays_mapped_on_devices_are_sharded_like_loaded_ones(folder, form, host_reads) -> None:
    mapping = find_mapping(f"hf:{form}", open_checkpoint(folder))
    arrays = load(folder, "dp2mp2")
    loaded = load(folder, "dp2mp2", names=mapping)
    host_reads.num_bytes = 0
    with (
        jax.transfer_guard_device_to_host("disallow"),
        jax.transfer_guard_host_to_device("disallow"),
    ):
        made = jax.block_until_ready(mapping.apply_arrays(arrays))
        back = jax.block_until_ready(mapping.inverse().apply_arrays(made))
    assert host_reads.num_bytes == 0
    for name, x in loaded.items():
        assert made[name].sharding.is_equivalent_to(x.sharding, x.ndim), name
        np.testing.assert_array_equal(np.asarray(made[name]), np.asarray(x))
    for name, x in arrays.items():
        assert back[name].sharding.is_equivalent_to(x.sharding, x.ndim), name
        np.testing.assert_array_equal(np.asarray(back[name]), SOURCE[name])
    shared = [x for x in made.values() if x.addressable_shards[0].data.size < x.size]
    assert len(shared) >= len(made) // 2
    assert host_reads.num_bytes > 0  # the comparisons were seen


def test_stages_are_not_stacked_by_one_program_but_may_be_after_resharding(folder) -> None:
    mapping = find_mapping("hf:nnx-scan", open_checkpoint(folder))
    arrays = load(folder, "dp1mp2pp3")
    with pytest.raises(LayoutError, match=r"its sources are on different devices \(.* on 0, 1, .*"):
        mapping.apply_arrays(arrays)
    made = mapping.apply_arrays(reshard(arrays, "dp3mp2"))
    for name, x in mapping.apply_arrays(SOURCE).items():
        np.testing.assert_array_equal(np.asarray(made[name]), x)


def test_stages_that_stay_apart_are_mapped_where_they_are(folder) -> None:
    mapping = find_mapping("hf:mcore-fused", open_checkpoint(folder))
    made = mapping.apply_arrays(load(folder, "dp1mp2pp3"))
    for name, x in load(folder, "dp1mp2pp3", names=mapping).items():
        assert made[name].sharding.is_equivalent_to(x.sharding, x.ndim), name
        np.testing.assert_array_equal(np.asarray(made[name]), np.asarray(x))


def test_rows_become_columns_and_what_is_on_one_device_stays_there() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("mp",))
    rows = NamedSharding(mesh, PartitionSpec("mp"))
    x = jax.device_put(np.arange(24.0).reshape(8, 3), rows)
    stacked = Mapping((Transpose(("a",)), Rename((("a", "l.0"),)), Stack("l.{layer}", "w")))
    made = stacked.apply_arrays({"a": x})["w"]
    assert made.sharding.spec == PartitionSpec(None, None, "mp")
    np.testing.assert_array_equal(np.asarray(made)[0], np.asarray(x).T)
    alone = jax.device_put(np.arange(6.0).reshape(2, 3), jax.devices()[1])
    (turned,) = Mapping((Transpose(("a",)),)).apply_arrays({"a": alone}).values()
    assert turned.devices() == {jax.devices()[1]}


def test_layers_and_experts_of_several_ranks_are_stacked_along_axes_of_their_own(tmp_path) -> None:
    sizes = Sizes(layers=4, dense=0)
    folder = write_model(
        tmp_path / "model", config_of("qwen3_moe", sizes), random_model("qwen3_moe", sizes)
    )
    whole = load(folder, jax.devices()[0], names="hf:nnx-scan")
    cut = load(folder, "dp2ep2pp2", names="hf:nnx-scan")
    (name,) = [n for n in cut if n.endswith("experts.down_proj.kernel")]
    assert cut[name].sharding.spec[:2] == ("pp_outer", "pp")
    for n, x in whole.items():
        np.testing.assert_array_equal(np.asarray(gather(cut[n], host=True)), np.asarray(x))


@pytest.mark.parametrize("form", ["mcore-fused", "mindformers-concat"])
def test_fused_rows_are_not_cut_within_a_kv_head_though_a_rule_would(folder, form) -> None:
    assert load(folder, "mp2", names=f"hf:{form}")
    said = r"qkv.weight: dim 0 .* is 2 groups of .*kv heads.*, which mp=4 does not divide"
    with pytest.raises(LayoutError, match=said):
        load(folder, "mp4", names=f"hf:{form}")
    with pytest.raises(LayoutError, match=said):
        load(folder, jax.make_mesh((2, 4), ("dp", "mp")), names=f"hf:{form}")
