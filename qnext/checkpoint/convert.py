"""A folder to a GGUF file, and a GGUF file to a folder, with the vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch

from qnext.checkpoint.check import read_layout
from qnext.checkpoint.files import Progress
from qnext.checkpoint.gguf import export_gguf, find_gguf, import_gguf, read_gguf
from qnext.checkpoint.gguf.read import ImportReport
from qnext.checkpoint.gguf.read_keys import config_from_keys
from qnext.checkpoint.resolve import resolve_folder, resolve_model
from qnext.errors import warn
from qnext.files import scratch_folder
from qnext.text.gguf import has_vocabulary, vocabulary_keys, write_vocabulary


def gguf_source(model: str, out: Path) -> Path | None:
    """The GGUF file that a name stands for; None where the name is a folder to be exported."""
    if out.suffix == ".gguf" and Path(model).is_dir():
        return None
    found = find_gguf(model)
    if found is None and out.suffix != ".gguf" and not Path(model).exists():
        found = find_gguf(str(resolve_folder(model)))
    return found


def folder_to_gguf(model: str, out: Path, *, kind: str, progress: Progress | None = None) -> None:
    """Export a folder. Raises the errors of `resolve_model`, `read_layout` and `export_gguf`."""
    folder = resolve_model(model)
    layout = read_layout(folder)
    keys = vocabulary_keys(folder, num_rows=layout.config.vocab_size)
    export_gguf(layout, out, kind=kind, tokenizer_keys=keys, progress=progress)


def gguf_to_folder(
    path: Path,
    out: Path,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    with_records: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Import a file. Raises the errors of `read_gguf` and `import_gguf`. A file without a vocabulary causes a
    warning."""
    file = read_gguf(path)
    config = config_from_keys(file)
    with scratch_folder() as made:
        has_tokenizer = has_vocabulary(file.keys)
        if has_tokenizer:
            write_vocabulary(file.keys, made, source=str(file.path), model_max_length=config.max_position_embeddings)
        else:
            warn(f"{file.path}: holds no vocabulary; the folder gets no tokenizer and can only be given token ids")
        return import_gguf(
            path,
            out,
            dtype=None if dtype is None else getattr(torch, dtype),
            dequantize=dequantize,
            with_records=with_records,
            tokenizer_folder=made if has_tokenizer else None,
            progress=progress,
        )
