"""What a machine can do, as a benchmark says it, where measuring it takes seconds; `test_limits` measures."""

from __future__ import annotations

from typing import Any

LIMITS: dict[str, Any] = {
    "read_bytes_per_second": 1e9,
    "operations_per_second": {"float32": 1e9, "bfloat16": None, "int8": 1e9},
    "native_kernels": None,
}
