"""Short names of what the answers of a model folder depend on: equal for equal files, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from qnext.checkpoint.check import Layout
from qnext.text.template_files import read_templates

_NUM_SAMPLES = 1024
_SAMPLE_BYTES = 64
_NUM_THREADS = 8
_HEX_DIGITS = 32
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")


class FolderIdentity(NamedTuple):
    """`model` names config and weights. None: the folder has no tokenizer, or no chat template."""

    model: str
    tokenizer: str | None
    template: str | None


def identity_of(layout: Layout, text_folder: Path | None = None) -> FolderIdentity:
    """That of a folder whose headers were read; tokenizer and template may be another folder's. Costs tenths of a
    second for large models on a local disk.

    Of each file of weights it reads the header, and 1,024 pieces of 64 bytes evenly over the rest: training and
    rounding change every matrix nearly everywhere. Whoever edits single numbers is not noticed; the hashes of a
    provenance file see that.
    """
    root = text_folder or layout.index.folder
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        samples = dict(zip(layout.index.files, pool.map(_sampled, layout.index.files), strict=True))
    config = json.dumps(asdict(layout.config), sort_keys=True, default=str)
    model = _name_of([config.encode(), *(digest for _, digest in sorted((p.name, d) for p, d in samples.items()))])
    tokenizer = [root / name for name in _TOKENIZER_FILES if (root / name).is_file()]
    templates = read_templates(root)
    return FolderIdentity(
        model,
        _name_of(path.name.encode() + b"\0" + path.read_bytes() for path in tokenizer) if tokenizer else None,
        None if templates is None else _name_of([json.dumps(templates.texts, sort_keys=True).encode()]),
    )


def _sampled(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        header = int.from_bytes(prefix, "little")
        digest.update(size.to_bytes(8, "little") + prefix)
        digest.update(file.read(min(header, size)))
        start = min(8 + header, size)
        stride = max(_SAMPLE_BYTES, (size - start) // _NUM_SAMPLES)
        for place in (*range(start, size, stride), max(start, size - _SAMPLE_BYTES)):
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, place))
    return digest.digest()


def _name_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=_HEX_DIGITS // 2)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
