"""qnext eval: bits per byte of a model on text files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.sampling import DType
from qnext.cli.flags.values import AsJson, Model, Strict
from qnext.errors import UsageError


def command(
    model: Model,
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="UTF-8 text files")],
    sequence_length: Annotated[int, typer.Option(help="longer files are read in pieces of this many tokens")] = 2048,
    dtype: DType = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Bits per byte on files, each a document of its own, and the acceptance of the MTP draft."""
    from qnext.cli.terminal.progress import byte_progress
    from qnext.eval import EvalDocument, evaluate_perplexity
    from qnext.session.folder import load_weights, open_folder
    from qnext.text.files import read_user_text
    from qnext.training.sources import tokenize

    if sequence_length < 1:
        raise UsageError(f"--sequence-length must be at least 1, not {sequence_length}")
    texts = [read_user_text(path) for path in files]
    folder = open_folder(model)
    token_ids = tokenize(texts, folder.tokenizer, end_id=min(folder.tokenizer.eos_ids))
    loaded = load_weights(folder, dtype, progress=byte_progress)
    documents = [EvalDocument(ids.tolist(), len(text.encode())) for ids, text in zip(token_ids, texts, strict=True)]
    result = evaluate_perplexity(loaded, documents, sequence_length=sequence_length)
    if as_json:
        print(json.dumps(asdict(result), indent=2))
        return
    print(f"bits per byte    {result.bits_per_byte:.4f}")
    print(f"nats per token   {result.nats_per_token:.4f}")
    print(f"documents        {result.num_documents}, {result.num_bytes:,} bytes, {result.num_tokens:,} tokens")
    if result.mtp_acceptance is not None:
        print(f"MTP acceptance   {result.mtp_acceptance:.1%}")
