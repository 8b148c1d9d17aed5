"""The flags that divide a training run among the processes of torchrun."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qnext.cli.flags.values import panel

_ranks = panel("Under torchrun")


@dataclass(frozen=True)
class DivisionFlags:
    """What processes in a row share beside the micro batches of a step."""

    expert_parallel: Annotated[int, _ranks("So many processes in a row share the experts.", metavar="M", min=1)] = 1
    context_parallel: Annotated[int, _ranks("So many processes in a row share a micro batch.", metavar="C", min=1)] = 1

    def division(self) -> dict[str, int]:
        """What terminal.ranks.ranks_of_run takes."""
        return {"expert": self.expert_parallel, "context": self.context_parallel}
