"""`qnext logits`: token ids in, logits to a .npy file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.sampling import Device, DType, ExpertMemory
from qnext.cli.flags.values import Model, Strict
from qnext.session.placement import AUTO


def command(
    model: Model,
    tokens: Annotated[str, typer.Option(metavar="1,2,3|@FILE", help="token ids, or a JSON file with a list of them")],
    out: Annotated[Path, typer.Option(help="the .npy file to write: float32 [tokens, vocabulary]")],
    dtype: DType = None,
    device: Device = AUTO,
    chunk: Annotated[int | None, typer.Option(help="read N tokens at a time through the cache", metavar="N")] = None,
    expert_memory: ExpertMemory = None,
    strict: Strict = False,
) -> None:
    """Write the logits after every token, and print the file's path."""
    from qnext.cli.terminal.progress import byte_progress
    from qnext.cli.terminal.source import parse_tokens
    from qnext.errors import UsageError
    from qnext.session.folder import load_weights, open_model
    from qnext.session.prefill import check_token_ids, iterate_logits, write_npy

    if chunk is not None and chunk < 1:
        raise UsageError(f"--chunk must be at least 1, not {chunk}")
    token_ids = parse_tokens(tokens)
    folder = open_model(model, expert_memory=expert_memory, device=device)
    # The ids are checked before the weights are read, which takes minutes for a large model.
    check_token_ids(token_ids, folder.config)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; --out takes the file to write")
    loaded = load_weights(folder, dtype, progress=byte_progress)
    rows = iterate_logits(loaded, token_ids, chunk=chunk)
    write_npy(out, rows, shape=(len(token_ids), loaded.config.vocab_size))
    print(out)
