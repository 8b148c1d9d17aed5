"""The options that all ways of fine-tuning have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="folder of the run")]
Template = Annotated[str | None, typer.Option(help="instruct or thinking: the chat template of a base that has none")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in the folder")]
SampleFiles = Annotated[
    list[Path] | None,
    typer.Option(help="chats (JSONL, JSON, parquet), a text, or a folder of them; may be given again"),
]


@dataclass(frozen=True)
class BeginFlags:
    """Whether a run begins, goes on, or shows its data alone."""

    show_sample: Annotated[
        int, typer.Option(min=0, metavar="N", help="show N samples, with what is learnt in colour, and end")
    ] = 0
    resume: Resume = False
