"""Flags that spread a model over several ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

import typer

from qnext.cli.flags.values import panel
from qnext.errors import UsageError
from qnext.parallel.mesh import PATIENCE
from qnext.session.rank_options import EVEN, Launched, RankOptions

_ranks = panel("Ranks")


@dataclass(frozen=True)
class RankFlags:
    """How many ranks there are, and which of them has which experts."""

    tensor_parallel: Annotated[
        int,
        _ranks("Heads, matrices, vocabulary in N parts.", "--tensor-parallel", "--tensor-parallel-size", min=1),
    ] = 1
    expert_parallel: Annotated[int, _ranks("So often all but the routed experts, which are spread.", min=1)] = 1
    expert_placement: Annotated[
        str, _ranks("even, auto (by the loads of earlier runs) or a baseline of `qnext experts`.", metavar="HOW")
    ] = EVEN
    expert_copies: Annotated[int, _ranks("So many hot experts of a layer on further ranks.", min=0)] = 0
    rank_patience: Annotated[float, _ranks("Seconds without a sign of life of a rank.", min=1)] = PATIENCE

    def begin(self, model: str) -> RankOptions:
        """The same, as the session has it. Only the first rank returns: another one that torchrun has started follows
        it to its end here, and its process ends. Raises UsageError for what contradicts itself."""
        launched = Launched.found_in(os.environ)
        options = RankOptions(
            self.tensor_parallel,
            self.expert_parallel,
            patience=self.rank_patience,
            placement=self.expert_placement,
            copies=self.expert_copies,
            launched=launched,
        )
        is_first = launched is None or launched.rank == 0
        try:
            options.check()
        except UsageError as error:
            if is_first:
                raise
            raise typer.Exit(error.exit_code) from error
        if is_first:
            return options
        from qnext.session.ranks import follow_launched

        raise typer.Exit(follow_launched(model, options))
