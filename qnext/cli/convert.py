"""`qnext convert`: a model folder to a GGUF file or another folder, and a GGUF file to a model folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.values import AsRecords, Strict

if TYPE_CHECKING:
    from qnext.checkpoint.gguf.read import ImportReport

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
        bool, typer.Option("--dequantize", help="make what keeps its codes in OUT plain numbers too")
    ] = False,
    records: AsRecords = False,
    strict: Strict = False,
) -> None:
    """Write a folder as GGUF for llama.cpp, a GGUF file as a Hugging Face folder, or a folder as another one with or
    without records of experts, and print its path."""
    from qnext.checkpoint.convert import folder_to_gguf, gguf_source, gguf_to_folder
    from qnext.checkpoint.resolve import resolve_model
    from qnext.checkpoint.rewrite import rewrite_folder
    from qnext.cli.terminal.progress import byte_progress
    from qnext.errors import UsageError

    source = gguf_source(model, out)
    if source is not None and out.suffix == ".gguf":
        raise UsageError("one of the two must be a folder: `convert MODEL OUT.gguf`, `convert IN.gguf OUT` or folders")
    if source is None and out.suffix != ".gguf":
        if kind is not None or dtype is not None:
            raise UsageError("--type and --dtype are for GGUF files; a folder keeps its numbers")
        with byte_progress("writing") as progress:
            rewrite_folder(
                resolve_model(model), out, with_records=records, keeps_codes=not dequantize, progress=progress
            )
    elif source is not None:
        if kind is not None:
            raise UsageError("--type is for OUT.gguf; a folder has --dtype")
        if dtype is not None and dtype not in _DTYPES:
            raise UsageError(f"--dtype {dtype}: must be one of {', '.join(_DTYPES)}")
        with byte_progress("reading") as progress:
            report = gguf_to_folder(
                source, out, dtype=dtype, dequantize=dequantize, with_records=records, progress=progress
            )
        _print_report(report)
    else:
        if dtype is not None or dequantize or records:
            raise UsageError("--dtype, --dequantize and --records are for a folder; OUT.gguf has --type")
        if kind is not None and kind not in _KINDS:
            raise UsageError(f"--type {kind}: must be one of {', '.join(_KINDS)}")
        with byte_progress("writing") as progress:
            folder_to_gguf(model, out, kind=kind or "bf16", progress=progress)
    print(out)


def _print_report(report: ImportReport) -> None:
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
