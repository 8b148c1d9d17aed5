"""The flags of training that show a run to others while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from qnext.cli.flags.values import panel

_watching = panel("Watching")


@dataclass(frozen=True)
class WatchFlags:
    """Where the numbers of a run go beside OUT/metrics.jsonl."""

    log: Annotated[
        list[str] | None, _watching("tensorboard: event files in OUT/tensorboard; wandb. May be given again.")
    ] = None
    page: Annotated[
        bool,
        _watching("Serve a page of the run while it goes on, on this machine alone.", "--page", show_default=False),
    ] = False
    page_port: Annotated[int | None, _watching("Of the page; any other where it is taken.", min=0, max=65535)] = None

    @contextmanager
    def serving(self, folder: Path) -> Iterator[str | None]:
        """The address of the page of the run in `folder`, where there is to be one."""
        if not self.page and self.page_port is None:
            yield None
            return
        from qnext.diagnostics.run_page.serving import PORT, serving

        with serving(folder, port=PORT if self.page_port is None else self.page_port) as address:
            yield address
