"""Disk stores for tests, what is put into them, and what then lies in their folders."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qnext.engine.storage import disk_entry
from qnext.engine.storage.disk import DiskStore
from qnext.engine.storage.disk_entry import PREFIX, Header, make_fingerprint
from qnext.engine.storage.disk_files import ENTRY_SUFFIX

MODEL = make_fingerprint(b"weights", version="1", block_size=16)


def open_store(folder: Path, *, max_bytes: int = 1 << 24, fingerprint: bytes = MODEL, **options: int) -> DiskStore:
    return DiskStore(folder, max_bytes=max_bytes, fingerprint=fingerprint, **options)


def random_tensors(seed: int) -> dict[str, Tensor]:
    """Every bit pattern, NaNs with payloads among them; sizes that leave gaps before the next tensor."""
    generator = torch.Generator().manual_seed(seed)

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        last = shape[-1] * dtype.itemsize
        return torch.randint(0, 256, (*shape[:-1], last), dtype=torch.uint8, generator=generator).view(dtype)

    return {
        "conv.0": of(torch.float32, 3, 5),
        "state.0": of(torch.float32, 2, 3, 7),
        "keys": of(torch.bfloat16, 2, 16, 9),
        "codes": of(torch.int8, 2, 16, 3),
        "scales": of(torch.float16, 1),
        "empty": torch.empty(0, 4),
        "transposed": of(torch.bfloat16, 4, 6).T,
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_bits(left: dict[str, Tensor] | None, right: dict[str, Tensor]) -> bool:
    return (
        left is not None
        and list(left) == list(right)
        and all(
            left[name].dtype == right[name].dtype
            and left[name].shape == right[name].shape
            and bits(left[name]).equal(bits(right[name]))
            for name in right
        )
    )


def sized(num_bytes: int, value: int = 1) -> dict[str, Tensor]:
    return {"x": torch.full((num_bytes,), value, dtype=torch.uint8)}


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*" + ENTRY_SUFFIX))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def hold_writer(store: DiskStore) -> Callable[[], None]:
    """The writer waits before its next file until the returned function is called."""
    go, write = threading.Event(), store._files.write

    def waiting(name: str, header: Header, body_B: Tensor) -> None:
        assert go.wait(60)
        write(name, header, body_B)

    store._files.write = waiting  # type: ignore[method-assign]
    return go.set


def file_bytes(kind: str, salt: bytes, num_tokens: int, tensors: dict[str, Tensor]) -> int:
    header = disk_entry.make_header(kind, salt, num_tokens, tensors)
    return PREFIX.size + len(disk_entry.encode_header(header, MODEL)) + header.body_bytes
