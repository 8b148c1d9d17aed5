"""Random numbers as functions of seed and index: a request that is run again from the middle draws the same ones."""

from __future__ import annotations

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_CHILD = 0xD1B54A32D192ED03  # keeps the seeds of children apart from the numbers that a seed draws


def uniform(seed: int, index: int) -> float:
    """Number `index` of the stream `seed`, in [0, 1 - 2^-48]: SplitMix64 (Steele, Lea, Flood, 2014) as a function."""
    return (_mix(_mix(seed & _MASK) + index * _GOLDEN & _MASK) >> 16) * 2.0**-48


def child_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a request with this seed: the seed itself for 0, else a number of 53 bits."""
    if index == 0:
        return seed
    return _mix(_mix(seed & _MASK ^ _CHILD) + index * _GOLDEN & _MASK) >> 11


def _mix(value: int) -> int:
    value = value + _GOLDEN & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
