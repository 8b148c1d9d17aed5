"""`qnext convert`: a model folder to a GGUF file, and a GGUF file to a model folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli._types import Strict

_KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
_DTYPES = ("bfloat16", "float16", "float32")


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|IN.gguf", help="a folder, a hub name, or a GGUF file: any part of a split one"),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf|OUT", help="the file or folder to make; must be new")],
    kind: Annotated[
        str | None, typer.Option("--type", metavar="|".join(_KINDS), help="of the matrices in OUT.gguf; else bf16")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="|".join(_DTYPES), help="of what is not packed in OUT; else the file's")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="make Q8_0 and Q4_0 of IN.gguf plain numbers too")
    ] = False,
    strict: Strict = False,
) -> None:
    """Write a folder as GGUF for llama.cpp, or a GGUF file as a Hugging Face folder, and print its path."""
    from qnext.errors import UsageError

    source = _gguf_source(model, out)
    if (source is None) != (out.suffix == ".gguf"):
        raise UsageError("one of the two must be a GGUF file that ends in .gguf: `convert MODEL OUT.gguf` or back")
    if source is not None:
        if kind is not None:
            raise UsageError("--type is for OUT.gguf; a folder has --dtype")
        if dtype is not None and dtype not in _DTYPES:
            raise UsageError(f"--dtype {dtype}: must be one of {', '.join(_DTYPES)}")
        _import(source, out, dtype, dequantize)
    else:
        if dtype is not None or dequantize:
            raise UsageError("--dtype and --dequantize are for a folder; OUT.gguf has --type")
        if kind is not None and kind not in _KINDS:
            raise UsageError(f"--type {kind}: must be one of {', '.join(_KINDS)}")
        _export(model, out, kind or "bf16")
    print(out)


def _gguf_source(model: str, out: Path) -> Path | None:
    """The GGUF file that MODEL stands for; None where it is a folder to be exported."""
    from qnext.checkpoint.gguf import find_gguf
    from qnext.checkpoint.resolve import resolve_folder

    if out.suffix == ".gguf" and Path(model).is_dir():
        return None
    found = find_gguf(model)
    if found is None and out.suffix != ".gguf" and not Path(model).exists():
        found = find_gguf(str(resolve_folder(model)))
    return found


def _export(model: str, out: Path, kind: str) -> None:
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.gguf import export_gguf
    from qnext.checkpoint.header import read_index
    from qnext.checkpoint.resolve import resolve_model
    from qnext.cli._progress import byte_progress
    from qnext.text.gguf import vocabulary_keys

    folder = resolve_model(model)
    config = read_layout(folder, read_index(folder).tensors).config
    keys = vocabulary_keys(folder, num_rows=config.vocab_size)
    with byte_progress("writing") as progress:
        export_gguf(folder, out, kind=kind, tokenizer_keys=keys, progress=progress)


def _import(path: Path, out: Path, dtype: str | None, dequantize: bool) -> None:
    import torch

    from qnext.checkpoint.gguf import import_gguf, read_gguf
    from qnext.checkpoint.gguf.read_keys import config_from_keys
    from qnext.cli._progress import byte_progress
    from qnext.errors import warn
    from qnext.files import scratch_folder
    from qnext.text.gguf import has_vocabulary, write_vocabulary

    file = read_gguf(path)
    config = config_from_keys(file)
    with scratch_folder() as made:
        has_tokenizer = has_vocabulary(file.keys)
        if has_tokenizer:
            write_vocabulary(file.keys, made, source=str(file.path), model_max_length=config.max_position_embeddings)
        else:
            warn(f"{file.path}: holds no vocabulary; the folder gets no tokenizer and can only be given token ids")
        with byte_progress("reading") as progress:
            report = import_gguf(
                path, out, dtype=None if dtype is None else getattr(torch, dtype), dequantize=dequantize,
                tokenizer_folder=made if has_tokenizer else None, progress=progress,
            )  # fmt: skip
    name = str(report.dtype).removeprefix("torch.")
    if report.packed:
        print(f"{len(report.packed)} quantised tensors keep their codes and scales", file=sys.stderr)
    if report.dequantized:
        print(f"{len(report.dequantized)} quantised tensors were made {name}", file=sys.stderr)
    if report.rounded:
        print(
            f"{len(report.rounded)} tensors were rounded to {name}, {report.rounded[0]} the first; "
            "--dtype float32 keeps them exact",
            file=sys.stderr,
        )
