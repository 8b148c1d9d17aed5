"""`qnext attention`: where a model looks and what its states keep on a text, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.flags.sampling import DType, ExpertMemory
from qnext.cli.flags.values import AsJson, Model, Strict
from qnext.cli.terminal.progress import byte_progress, token_progress
from qnext.cli.terminal.source import TextFlags
from qnext.cli.terminal.text import note


def command(
    model: Model,
    *,
    source: TextFlags,
    num_generated: Annotated[
        int, typer.Option("--tokens", min=0, metavar="N", help="go on for N tokens, and count their reads")
    ] = 0,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="tokens to name that are read most")] = 3,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="layers by heads and by distance, .svg or .png")
    ] = None,
    dtype: DType = None,
    expert_memory: ExpertMemory = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Print where full-attention layers look and what Gated DeltaNet layers remember.

    First token: the attention that goes to it. Entropy in nats. Gate: the mean of its sigmoid, closed where below 0.1.
    Half-life: tokens after which half of a state is left. Rank: effective, of the state at the end. Read: |S^T q|.
    Reach: the distance within which half of what the last tokens read was written. --json has every head.
    """
    source.check()
    if picture is not None:
        from qnext.diagnostics.heatmap import check_picture

        check_picture(picture)
    from qnext.session.folder import end_token_ids, load_weights, open_folder

    folder = open_folder(model, expert_memory=expert_memory)
    token_ids = folder.tokenizer.encode(source.read())
    from qnext.diagnostics.inside.report import look_inside

    network = load_weights(folder, dtype, progress=byte_progress)
    with token_progress("reading") as progress:
        report = look_inside(
            network,
            token_ids,
            num_generated=num_generated,
            num_top=top,
            eos_token_ids=end_token_ids(folder.tokenizer, folder.config),
            progress=progress,
        )
    if picture is not None:
        from qnext.diagnostics.inside.show import write_inside

        write_inside(picture, report, title=f"{model}: {len(token_ids):,} tokens")
        note(str(picture))
    if as_json:
        print(json.dumps({"model": model, **report.document()}))
    else:
        from qnext.diagnostics.inside.show import show_inside

        all_ids = [*token_ids, *report.generated]
        show_inside(report, lambda position: folder.tokenizer.decode([all_ids[position]]))
