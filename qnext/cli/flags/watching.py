"""The flags of training that show a run to others while it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qnext.cli.flags.values import panel

_watching = panel("Watching")


@dataclass(frozen=True)
class WatchFlags:
    """Where the numbers of a run go beside OUT/metrics.jsonl."""

    log: Annotated[
        list[str] | None, _watching("tensorboard: event files in OUT/tensorboard; wandb. May be given again.")
    ] = None
