"""`qnext logits`: token ids in, logits to a .npy file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qnext.cli.flags.sampling import DType, ExpertMemory
from qnext.cli.flags.values import Model, Strict


def command(
    model: Model,
    tokens: Annotated[str, typer.Option(metavar="1,2,3|@FILE", help="token ids, or a JSON file with a list of them")],
    out: Annotated[Path, typer.Option(help="the .npy file to write: float32 [tokens, vocabulary]")],
    dtype: DType = None,
    chunk: Annotated[int | None, typer.Option(help="read N tokens at a time through the cache", metavar="N")] = None,
    expert_memory: ExpertMemory = None,
    strict: Strict = False,
) -> None:
    """Write the logits after every token, and print the file's path."""
    from qnext.cli.terminal.progress import byte_progress
    from qnext.errors import UsageError
    from qnext.session.folder import load_weights, open_model
    from qnext.session.prefill import check_token_ids, iterate_logits, write_npy

    if chunk is not None and chunk < 1:
        raise UsageError(f"--chunk must be at least 1, not {chunk}")
    token_ids = _parse_tokens(tokens)
    folder = open_model(model, expert_memory=expert_memory)
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


def _parse_tokens(text: str) -> list[int]:
    from qnext.errors import UsageError

    values: Any
    if text.startswith("@"):
        try:
            values = json.loads(Path(text[1:]).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--tokens {text}: not readable as JSON ({error})") from None
    else:
        try:
            values = [int(piece) for piece in text.split(",")] if text.strip() else []
        except ValueError:
            raise UsageError(f"--tokens {text[:60]!r}: must be integers with commas between, or @FILE") from None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UsageError(f"--tokens {text[:60]}: must be a list of integers")
    if not values:
        raise UsageError("--tokens: no token given")
    return values
