"""Machines that are not there: names, a short form and JSON."""

from __future__ import annotations

import doctest
import json

import pytest

from qnext.errors import UsageError
from qnext.planning import machines
from qnext.planning.machines import ARITHMETIC_SHARE, MEMORY_SHARE, NAMED, SYSTEM_BYTES, planned_machine


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


def test_examples() -> None:
    assert doctest.testmod(machines) == (0, 1)
