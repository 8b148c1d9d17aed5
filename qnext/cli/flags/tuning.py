"""The options that all ways of fine-tuning have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="folder of the run")]
Template = Annotated[str | None, typer.Option(help="instruct or thinking: the chat template of a base that has none")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in the folder")]
