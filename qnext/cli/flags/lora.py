"""The flags of training that make an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from qnext.cli.flags.values import panel
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.recipes.adapted import AdapterTask

_adapter = panel("Adapter")


@dataclass(frozen=True)
class LoraFlags:
    """What an adapter changes; without --lora all weights are trained."""

    lora: Annotated[
        str | None, _adapter("all, attention or experts: train an adapter of these alone.", metavar="TARGETS")
    ] = None
    rank: Annotated[int | None, _adapter("Of the adapter; default 8.", min=1)] = None
    alpha: Annotated[float | None, _adapter("The changes are multiplied by alpha / rank; default 2 * rank.")] = None
    experts: Annotated[str | None, _adapter("all, or auto:coverage=0.5: those that get half of the data's tokens.")] = (
        None
    )
    router: Annotated[bool, _adapter("The routers too.", "--router", show_default=False)] = False

    def task(self) -> AdapterTask | None:
        """Raises UsageError naming a value that is impossible, and flags without --lora."""
        from qnext.recipes.adapted import AdapterTask

        if self.lora is None:
            given = {"--rank": self.rank, "--alpha": self.alpha, "--experts": self.experts, "--router": self.router}
            for name, value in given.items():
                if value:
                    raise UsageError(f"{name} goes with --lora alone")
            return None
        rank = self.rank or 8
        alpha = 2.0 * rank if self.alpha is None else self.alpha
        return AdapterTask(self.lora, rank, alpha, self.experts or "all", self.router)
