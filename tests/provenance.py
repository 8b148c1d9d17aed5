"""Folders beside each other, whatever their provenance says of how long it took."""

from __future__ import annotations

from pathlib import Path

from qnext.checkpoint.gguf import read_gguf
from qnext.checkpoint.provenance import GGUF_KEY, PROVENANCE_FILE


def content_of(folder: Path) -> dict[str, bytes]:
    """All files by name, but the provenance."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != PROVENANCE_FILE}


def content_of_gguf(path: Path) -> tuple[dict[str, object], dict[str, bytes]]:
    """Keys, but the provenance, and the bytes of each tensor."""
    file, raw = read_gguf(path), path.read_bytes()
    keys = {name: value for name, value in file.keys.items() if name != GGUF_KEY}
    return keys, {name: raw[tensor.start : tensor.end] for name, tensor in file.tensors.items()}
