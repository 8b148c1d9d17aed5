"""GPUs with their published peaks, alone and many together. No torch.

Dense rates, without structured sparsity, with sums in fp32. A GPU that is not listed is planned as a machine of its
own figures (machines.py).
"""

from __future__ import annotations

from typing import NamedTuple

from qnext.planning.speed_model import SpeedModel, from_peaks

_TERA = 1e12
# Seconds of a layer beside what it reads: launches, and what GPUs tell each other. 80B in FP8 on one H200 at batch 1:
# 211 tokens/s where bytes allow 1,170, so 81 microseconds; Qwen3.5-397B in FP8 on eight H100 at batch 1: 165.7, so 90.
# With 85 and the whole bandwidth 10,800 tokens/s follow for the latter at batch 256; 10,500 are published.
LAYER_SECONDS = 85e-6
# Of bf16's peak in prompts, whatever the weights are: 60,000 tokens/s of Qwen3.5-35B on one H200 in FP8.
PROMPT_SHARE = 0.4
TRAINING_SHARE = 0.3  # of bf16's peak in training, where nothing is given: 0.24 to 0.33 of H100 for Qwen3-30B-A3B
USABLE_SHARE = 0.9  # of the memory: the rest is the runtime's and lost between tensors
GPUS_OF_NODE = 8


class Accelerator(NamedTuple):
    """`fp8` is None where there is no such arithmetic. Rates in a second; `watts` at most."""

    memory_bytes: int
    bandwidth: float
    bf16: float
    fp8: float | None
    watts: int
    source: str

    def peak(self, scheme: str) -> float:
        """Operations on weights of this scheme: integers are widened to bf16 before they are multiplied."""
        return self.fp8 if scheme == "fp8" and self.fp8 is not None else self.bf16


ACCELERATORS = {
    "h100": Accelerator(
        80 << 30, 3.35e12, 989.4 * _TERA, 1978.9 * _TERA, 700, "nvidia.com, H100 SXM: 80 GB, 3.35 TB/s, 700 W"
    ),
    "h200": Accelerator(
        141 << 30, 4.8e12, 989.4 * _TERA, 1978.9 * _TERA, 700, "nvidia.com, H200 SXM: 141 GB, 4.8 TB/s, 700 W"
    ),
    "a100-80g": Accelerator(
        80 << 30, 2.039e12, 312 * _TERA, None, 400, "nvidia.com, A100 SXM: 80 GB, 2,039 GB/s, 400 W"
    ),
    "b200": Accelerator(
        180 << 30, 8e12, 2250 * _TERA, 4500 * _TERA, 1000, "nvidia.com, DGX B200, of each of 8: 180 GB, 8 TB/s, 1,000 W"
    ),
    "l40s": Accelerator(48 << 30, 864e9, 362 * _TERA, 733 * _TERA, 350, "nvidia.com, L40S: 48 GB, 864 GB/s, 350 W"),
    "rtx-3090": Accelerator(
        24 << 30, 936e9, 71 * _TERA, None, 350, "nvidia.com, GA102 whitepaper, RTX 3090: 24 GB, 936 GB/s, 350 W"
    ),
    "rtx-4090": Accelerator(
        24 << 30, 1008e9, 165.2 * _TERA, 330.3 * _TERA, 450, "nvidia.com, Ada whitepaper: 24 GB, 1,008 GB/s, 450 W"
    ),
    "rtx-5090": Accelerator(
        32 << 30, 1792e9, 209.5 * _TERA, 419 * _TERA, 575, "nvidia.com, RTX 5090: 32 GB, 1,792 GB/s, 575 W"
    ),
}


# As drivers name them. Other forms of the same chips, such as those for PCIe, have other rates.
_NAMED_BY_DRIVERS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
}


def accelerator_named(device_name: str) -> Accelerator | None:
    """The one that a driver calls so; None for one that is not listed.

    >>> accelerator_named("NVIDIA H200").memory_bytes >> 30
    141
    """
    name = _NAMED_BY_DRIVERS.get(device_name)
    return None if name is None else ACCELERATORS[name]


class Cluster(NamedTuple):
    """So many GPUs of one kind. Weights are divided among all of them: layers and experts; sequences too, so that keys
    and values are nowhere twice."""

    name: str
    device: Accelerator
    num_devices: int

    @property
    def usable_bytes(self) -> int:
        return int(self.num_devices * self.device.memory_bytes * USABLE_SHARE)

    @property
    def watts(self) -> float:
        return self.num_devices * self.device.watts

    @property
    def bandwidth(self) -> float:
        return self.num_devices * self.device.bandwidth

    def operations(self, scheme: str) -> float:
        return self.num_devices * self.device.peak(scheme)

    def speed(self) -> SpeedModel:
        """What is expected of it."""
        return from_peaks(
            bandwidth=self.bandwidth,
            operations=self.operations("bf16"),
            share=PROMPT_SHARE,
            layer_seconds=LAYER_SECONDS,
        )
