"""Checksums of bytes in memory."""

from __future__ import annotations

import zlib

from torch import Tensor

from qnext.ops.backends import cpu_kernels


def crc32(bytes_B: Tensor) -> int:
    """The CRC-32 of zlib of a contiguous uint8 tensor on the CPU."""
    module = cpu_kernels()
    if module is None:
        return zlib.crc32(bytes_B.numpy().data)
    return int(module.crc32(bytes_B.data_ptr(), bytes_B.numel()))
