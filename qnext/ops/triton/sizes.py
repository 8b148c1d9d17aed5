"""Sizes of the blocks that programs hold."""

from __future__ import annotations


def next_power_of_2(size: int) -> int:
    """The least power of two that is no less than `size`, and at least one."""
    return 1 << max(0, size - 1).bit_length()


def num_warps(block: int) -> int:
    """How many warps share a row of so many numbers: about eight numbers for each of their threads."""
    return min(16, max(1, block // 256))
