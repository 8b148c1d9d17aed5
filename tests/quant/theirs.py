"""What compressed-tensors says. Its import takes seconds: of whoever asks, and not of every worker that finds tests."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from torch import Tensor


def module_of_theirs(name: str) -> ModuleType:
    """Skips the test where it is not: some have another place in the releases for Python 3.10."""
    found: ModuleType = pytest.importorskip(f"compressed_tensors.{name}")
    return found


def pack_to_int32(*arguments: Any, **options: Any) -> Tensor:
    packed: Tensor = module_of_theirs("compressors.pack_quantized.helpers").pack_to_int32(*arguments, **options)
    return packed


def unpack_from_int32(*arguments: Any, **options: Any) -> Tensor:
    codes: Tensor = module_of_theirs("compressors.pack_quantized.helpers").unpack_from_int32(*arguments, **options)
    return codes
