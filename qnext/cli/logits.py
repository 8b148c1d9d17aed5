"""`qnext logits`: token ids in, logits to a .npy file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.ranks import RankFlags
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
    *,
    ranks: RankFlags,
) -> None:
    """Write the logits after every token, and print the file's path."""
    from qnext.cli.terminal.progress import byte_progress
    from qnext.cli.terminal.source import parse_tokens
    from qnext.cli.terminal.text import note
    from qnext.errors import UsageError
    from qnext.session.folder import EngineOpening, load_weights, open_model
    from qnext.session.prefill import check_token_ids, iterate_logits, write_npy

    if chunk is not None and chunk < 1:
        raise UsageError(f"--chunk must be at least 1, not {chunk}")
    token_ids, spread = parse_tokens(tokens), ranks.begin(model)
    folder = open_model(model, expert_memory=expert_memory, device=device)
    # The ids are checked before the weights are read, which takes minutes for a large model.
    check_token_ids(token_ids, folder.config)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; --out takes the file to write")
    shape = len(token_ids), folder.config.vocab_size
    if spread.num_ranks > 1:
        from qnext.session.ranks import logits_on_ranks

        how = EngineOpening(dtype, spread, progress=byte_progress, note=note)
        rows = logits_on_ranks(folder, token_ids, how, chunk=chunk)
    else:
        rows = iterate_logits(load_weights(folder, dtype, progress=byte_progress), token_ids, chunk=chunk)
    with closing(rows):
        write_npy(out, rows, shape=shape)
    print(out)
