"""Machines that are not there: names, a short form and JSON."""

from __future__ import annotations

import doctest
import json

import pytest

from qnext.config import ModelConfig, hybrid_pattern, preset
from qnext.errors import UsageError
from qnext.planning import count_parameters, machines
from qnext.planning.accelerators import ACCELERATORS, Cluster
from qnext.planning.expert_memory import ExpertSizes
from qnext.planning.machines import ARITHMETIC_SHARE, MEMORY_SHARE, NAMED, SYSTEM_BYTES, planned_machine
from qnext.planning.step_load import Peaks, StoredSizes, bound_seconds, decode_load


def test_forms_of_one_machine_are_equal() -> None:
    short = planned_machine("24GiB,30GB/s,1.5GB/s,2Top/s")
    values = {"memory_bytes": 24 << 30, "memory_rate": 30e9, "disk_rate": 1.5e9, "arithmetic": 2e12}
    assert planned_machine(json.dumps(values)) == short == planned_machine("24 gib, 30 GB/s, 1.5 GB/s, 2 Top/s")
    assert short.free_bytes == (24 << 30) - SYSTEM_BYTES
    assert short.rates == (30e9 * MEMORY_SHARE, 1.5e9, pytest.approx(2e12 * ARITHMETIC_SHARE))
    assumed = planned_machine("24GB,30GB/s,1.5GB/s")
    assert assumed.free_bytes == 24_000_000_000 - SYSTEM_BYTES
    assert assumed.assumed[0] == "1.35 Top/s on int8" and len(short.assumed) == 1


@pytest.mark.parametrize("name", NAMED)
def test_named_machines_say_where_their_peaks_come_from(name: str) -> None:
    known, found = NAMED[name], planned_machine(name)
    assert known.source in found.assumed and ".com" in known.source
    assert f"DDR5-{known.megatransfers}, {known.channels} channels, {known.cores} " in known.source
    assert f"{known.gigahertz} GHz" in known.source and f"{known.disk_rate // 10**9} GB/s" in known.source
    assert 40e9 < found.rates.memory < 300e9 < found.rates.arithmetic


def test_published_bandwidth() -> None:
    published = {"ryzen-9950x": 89.6e9, "core-i9-14900k": 89.6e9, "xeon-8480": 307.2e9, "epyc-9654": 460.8e9}
    assert {name: planned_machine(name).rates.memory / MEMORY_SHARE for name in NAMED} == pytest.approx(published)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ryzen", "is neither a name"),
        ("24GiB,30GB/s", "is neither"),
        ("24GiB,30,1.5", "is neither"),
        ("[" * 100_000, "is neither"),
        ("[1]", "needs arithmetic, disk_rate, memory_bytes"),
        ('{"memory_bytes": 1}', "needs"),
        ('{"memory_bytes": 1, "memory_rate": 1, "disk_rate": 1, "cores": 2}', "needs"),
        ('{"memory_bytes": true, "memory_rate": 1, "disk_rate": 1}', "positive numbers"),
        ('{"memory_bytes": "24G", "memory_rate": 1, "disk_rate": 1}', "positive numbers"),
        ("24GiB,0GB/s,1GB/s", "positive numbers"),
    ],
)
def test_what_is_no_machine_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        planned_machine(text)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_gpus_say_where_their_peaks_come_from(name: str) -> None:
    device, found = ACCELERATORS[name], planned_machine(name, num_devices=8)
    assert found.cluster == Cluster(name, device, 8) and device.source in found.assumed[0]
    assert "nvidia.com" in device.source and f"{device.memory_bytes >> 30} GB" in device.source
    assert f"{device.watts:,} W" in device.source
    assert found.free_bytes == int(0.9 * 8 * device.memory_bytes)
    assert found.rates.memory == 8 * device.bandwidth and found.rates.disk == 0
    assert device.peak("int4") == device.bf16 <= device.peak("fp8")
    assert 50 < device.bf16 / device.bandwidth < 450, "operations of a byte"


def test_only_gpus_are_many() -> None:
    with pytest.raises(UsageError, match="is none of the GPUs"):
        planned_machine("epyc-9654", num_devices=2)


def _published(name: str) -> tuple[ModelConfig, Cluster]:
    """Two models in FP8 whose speed on GPUs is published: 80B-A3B on one H200, Qwen3.5-397B-A17B on eight H100."""
    if name == "80b":
        return preset("80b-a3b"), Cluster("h200", ACCELERATORS["h200"], 1)
    wide = preset("80b-a3b").with_(
        vocab_size=248_320,
        hidden_size=4096,
        layer_types=hybrid_pattern(60, interval=4),
        num_attention_heads=32,
        linear_num_value_heads=64,
        moe_intermediate_size=1024,
        shared_expert_intermediate_size=1024,
    )
    return wide, Cluster("h100", ACCELERATORS["h100"], 8)


@pytest.mark.parametrize(("name", "batch", "rate"), [("80b", 1, 211), ("397b", 1, 165.7), ("397b", 256, 10_500)])
def test_published_speeds(name: str, batch: int, rate: float) -> None:
    """Time of a layer and bandwidth together explain all three: within a tenth."""
    config, cluster = _published(name)
    counts = count_parameters(config)
    experts = ExpertSizes(config.num_hidden_layers, 512, 3 * config.hidden_size * config.moe_intermediate_size, 0)
    dense = counts.trunk - counts.experts - counts.embedding + counts.head + counts.router
    load = decode_load(config, StoredSizes(dense, experts, can_stream=False), context=1024, batch=batch)
    assert batch / cluster.speed().decode_seconds(load) == pytest.approx(rate, rel=0.1)


def test_bounds_of_the_released_model() -> None:
    """One H200, FP8: about 1,170 tokens/s alone, 4.6k of 64 sequences, 10.4k of 256 with states in fp32."""
    config, cluster = _published("80b")
    counts = count_parameters(config)
    experts = ExpertSizes(48, 512, 3 * 2048 * 512, 0)
    dense = counts.trunk - counts.experts - counts.embedding + counts.head + counts.router
    sizes, peaks = StoredSizes(dense, experts, can_stream=False), Peaks(cluster.bandwidth, cluster.operations("fp8"))
    loads = {batch: decode_load(config, sizes, context=0, batch=batch) for batch in (1, 64, 256)}
    found = {batch: batch / bound_seconds(load, peaks) for batch, load in loads.items()}
    assert found == pytest.approx({1: 1170, 64: 4600, 256: 10_400}, rel=0.03)


def test_examples() -> None:
    assert doctest.testmod(machines) == (0, 1)
