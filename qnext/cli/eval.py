"""qnext eval: bits per byte of a model on files of any kind."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.sampling import DType
from qnext.cli.flags.values import AsJson, Model, Strict
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.eval.perplexity import PerplexityByDocument

_MANY = 40  # files of which the best and the worst are shown


def command(
    model: Model,
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="files, folders, patterns such as docs/**/*.md")],
    sequence_length: Annotated[int, typer.Option(help="longer files are read in pieces of this many tokens")] = 2048,
    dtype: DType = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Bits per byte on files, each a document of its own, and the acceptance of the MTP draft.

    Files may be of any kind: bytes that are no UTF-8 are read one by one. The interval (95 %) says how far the mean
    moves with other files of this kind. Other forms: `qnext eval tasks|docs|harness|quant|speed|bias -h`.
    """
    from qnext.cli.terminal.progress import byte_progress
    from qnext.eval import EvalDocument, evaluate_documents
    from qnext.session.folder import load_weights, open_folder
    from qnext.text.any_bytes import encode_bytes
    from qnext.text.files import find_files, read_bytes

    if sequence_length < 1:
        raise UsageError(f"--sequence-length must be at least 1, not {sequence_length}")
    paths = find_files(files)
    contents = [read_bytes(path) for path in paths]
    folder = open_folder(model)
    end_id = min(folder.tokenizer.eos_ids)
    documents = [EvalDocument([*encode_bytes(data, folder.tokenizer), end_id], len(data)) for data in contents]
    loaded = load_weights(folder, dtype, progress=byte_progress)
    result = evaluate_documents(loaded, documents, sequence_length=sequence_length)
    if as_json:
        each = [{"file": str(path), **asdict(one)} for path, one in zip(paths, result.documents, strict=True)]
        interval = [result.bits_per_byte.low, result.bits_per_byte.high] if len(paths) > 1 else None
        print(json.dumps({**asdict(result.total), "interval": interval, "files": each}, indent=2))
    else:
        _show(paths, result)


def _show(paths: list[Path], result: PerplexityByDocument) -> None:
    total, interval = result.total, result.bits_per_byte
    spread = f"  [{interval.low:.4f}, {interval.high:.4f}]" if len(paths) > 1 else ""
    print(f"bits per byte    {total.bits_per_byte:.4f}{spread}")
    print(f"nats per token   {total.nats_per_token:.4f}")
    print(f"documents        {total.num_documents}, {total.num_bytes:,} bytes, {total.num_tokens:,} tokens")
    if total.mtp_acceptance is not None:
        print(f"MTP acceptance   {total.mtp_acceptance:.1%}")
    if len(paths) == 1:
        return
    ranked = sorted(zip(paths, result.documents, strict=True), key=lambda each: each[1].bits_per_byte)
    left_out = len(ranked) - _MANY
    shown = ranked if left_out <= 0 else [*ranked[: _MANY // 2], *ranked[-_MANY // 2 :]]
    print()
    for number, (path, one) in enumerate(shown):
        if left_out > 0 and number == _MANY // 2:
            print(f"    ... {left_out} files between them")
        print(f"{one.bits_per_byte:8.4f}  {one.num_bytes:>12,} bytes  {path}")
