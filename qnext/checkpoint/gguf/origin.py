"""What a GGUF file says of where its model comes from, for the provenance of a folder that is made of it."""

from __future__ import annotations

from typing import Any

from qnext.checkpoint.gguf.container import GgufFile
from qnext.checkpoint.hashing import sha256_of
from qnext.checkpoint.provenance import GGUF_KEY, parsed
from qnext.errors import warn


def gguf_parent(file: GgufFile) -> dict[str, Any]:
    """A GGUF file, or all parts of one, with their hashes, and the provenance that qnext wrote into it."""
    paths = sorted({file.path, *(tensor.path for tensor in file.tensors.values())})
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    found: dict[str, Any] = {"role": "source", "name": file.path.name, "files": files}
    text, licence = file.keys.get(GGUF_KEY), file.keys.get("general.license")
    try:
        found["provenance"] = parsed(text) if isinstance(text, str) else None
    except ValueError:
        warn(f"{file.path}: key {GGUF_KEY} cannot be read, so nothing is known of where the model comes from")
        found["provenance"] = None
    known = {"name": licence} if isinstance(licence, str) else (found["provenance"] or {}).get("licence")
    return {**found, "licence": known} if known else found
