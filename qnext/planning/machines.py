"""Machines that a model may be planned for without being there: published peaks, and what is reached of them. No torch.

A peak follows from published figures: memory transfers 8 bytes a channel; a core does so many operations on int8 a
cycle, at its base clock.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from qnext.errors import UsageError
from qnext.planning.accelerators import ACCELERATORS, LAYER_SECONDS, PROMPT_SHARE, USABLE_SHARE, Cluster
from qnext.planning.expert_speed import MachineRates

# What kernels reach of the peaks: of memory 0.46 (Sapphire Rapids) to 0.84 (Zen 5) of what a plain loop reads, of
# arithmetic 0.23 and 0.34 to 0.42 of a plain loop on int8. Of a disk all: its figure is taken for reads of 2 MB.
MEMORY_SHARE = 0.5
ARITHMETIC_SHARE = 0.3
SYSTEM_BYTES = 2 << 30  # of the memory, for the system and other programs
OPERATIONS_OF_BYTE = 45  # int8 operations for each byte that memory reads, where nothing is said: 41 and 48 measured
_GB = 1_000_000_000


class NamedMachine(NamedTuple):
    """Memory channels and their transfers in a second; cores, base clock, operations on int8 in a cycle."""

    memory_bytes: int
    channels: int
    megatransfers: int
    cores: int
    gigahertz: float
    operations: int
    disk_rate: int
    source: str


NAMED = {
    "ryzen-9950x": NamedMachine(
        *(64 << 30, 2, 5600, 16, 4.3, 256, 7 * _GB),
        source="amd.com, Ryzen 9 9950X: DDR5-5600, 2 channels, 16 cores, 4.3 GHz; PCIe 4.0 disk of 7 GB/s",
    ),
    "core-i9-14900k": NamedMachine(
        *(64 << 30, 2, 5600, 8, 3.2, 128, 7 * _GB),
        source="intel.com, Core i9-14900K: DDR5-5600, 2 channels, 8 P-cores, 3.2 GHz; PCIe 4.0 disk of 7 GB/s",
    ),
    "xeon-8480": NamedMachine(
        *(256 << 30, 8, 4800, 56, 2.0, 256, 3 * _GB),
        source="intel.com, Xeon Platinum 8480+: DDR5-4800, 8 channels, 56 cores, 2.0 GHz; disk of 3 GB/s",
    ),
    "epyc-9654": NamedMachine(
        *(384 << 30, 12, 4800, 96, 2.4, 128, 3 * _GB),
        source="amd.com, EPYC 9654: DDR5-4800, 12 channels, 96 cores, 2.4 GHz; disk of 3 GB/s",
    ),
}
FORMS = (
    f"a name ({', '.join((*NAMED, *ACCELERATORS))}), 24GiB,30GB/s,1.5GB/s[,1.4Top/s] (memory, its speed, disk, int8), "
    "or JSON"
)
_KEYS = {"memory_bytes", "memory_rate", "disk_rate", "arithmetic"}
_SHORT = re.compile(
    r"(?P<size>[\d.]+)\s*(?P<unit>[GT])(?P<is_binary>i?)B,(?P<memory>[\d.]+)GB/s,(?P<disk>[\d.]+)GB/s"
    r"(?:,(?P<arithmetic>[\d.]+)Top/s)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PlannedMachine:
    """Free memory, and what kernels and disk reach. `assumed` says what was chosen where nothing was given. A `cluster`
    of GPUs has no disk: all weights are in its memory. Of other machines `bandwidth` and `arithmetic` are the peaks."""

    free_bytes: int
    rates: MachineRates
    assumed: tuple[str, ...] = ()
    cluster: Cluster | None = None
    bandwidth: float = 0.0
    arithmetic: float = 0.0


def planned_machine(text: str, *, num_devices: int = 1) -> PlannedMachine:
    """The machine of a name, a short form or a JSON object; see FORMS. Raises UsageError for what is none, and for more
    than one device of what is no GPU.

    >>> planned_machine("24GiB,30GB/s,1.5GB/s,2Top/s").rates
    MachineRates(memory=15000000000.0, disk=1500000000.0, arithmetic=600000000000.0)
    """
    if text in ACCELERATORS:
        return _gpus(Cluster(text, ACCELERATORS[text], num_devices))
    if num_devices != 1:
        raise UsageError(f"--gpus and --nodes: {text[:80]} is none of the GPUs {', '.join(ACCELERATORS)}")
    if text in NAMED:
        known = NAMED[text]
        memory = known.channels * known.megatransfers * 8e6
        arithmetic = known.cores * known.gigahertz * 1e9 * known.operations
        return _reached(known.memory_bytes, memory, known.disk_rate, arithmetic, known.source)
    values: dict[str, Any] = {}
    if found := _SHORT.fullmatch(text.replace(" ", "")):
        base = 1024 if found["is_binary"] else 1000
        values["memory_bytes"] = float(found["size"]) * base ** (3 if found["unit"] in "gG" else 4)
        values |= {"memory_rate": float(found["memory"]) * 1e9, "disk_rate": float(found["disk"]) * 1e9}
        values |= {} if found["arithmetic"] is None else {"arithmetic": float(found["arithmetic"]) * 1e12}
    else:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(f"--machine {text[:80]!r}: is neither {FORMS}") from None
    keys = set(values) if isinstance(values, dict) else set()
    if keys - _KEYS or not keys >= _KEYS - {"arithmetic"}:
        raise UsageError(f"--machine: needs {', '.join(sorted(_KEYS))}, of which arithmetic may be left out")
    if not all(type(value) in (int, float) and 0 < value < 1e18 for value in values.values()):
        raise UsageError("--machine: memory and rates must be positive numbers")
    memory = values["memory_rate"]
    arithmetic = values.get("arithmetic", OPERATIONS_OF_BYTE * memory)
    assumed = "" if "arithmetic" in values else f"{arithmetic / 1e12:.2f} Top/s on int8"
    return _reached(int(values["memory_bytes"]), memory, values["disk_rate"], arithmetic, assumed)


def _reached(memory_bytes: int, memory: float, disk: float, arithmetic: float, assumed: str) -> PlannedMachine:
    rates = MachineRates(MEMORY_SHARE * memory, float(disk), ARITHMETIC_SHARE * arithmetic)
    shares = f"{MEMORY_SHARE:.0%} of the memory's speed and {ARITHMETIC_SHARE:.0%} of the arithmetic are reached"
    told = (*([assumed] if assumed else []), shares)
    return PlannedMachine(max(0, memory_bytes - SYSTEM_BYTES), rates, told, None, memory, arithmetic)


def _gpus(cluster: Cluster) -> PlannedMachine:
    shares = (
        f"{USABLE_SHARE:.0%} of the memory is free, a layer takes {LAYER_SECONDS * 1e6:.0f} microseconds beside what "
        f"it reads, prompts reach {PROMPT_SHARE:.0%} of the peak in bf16"
    )
    told = f"{cluster.num_devices} x {cluster.device.source}"
    rates = MachineRates(cluster.bandwidth, 0.0, PROMPT_SHARE * cluster.operations("bf16"))
    return PlannedMachine(cluster.usable_bytes, rates, (told, shares), cluster)
