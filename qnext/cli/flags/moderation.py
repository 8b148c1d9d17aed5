"""The flags of `qnext serve` for the operator's say about texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from qnext.cli.flags.values import panel
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.server.moderation.moderator import ModerationConfig

_moderation = panel("Moderation")


@dataclass(frozen=True)
class ModerationFlags:
    """Who judges prompts and answers, and what happens where nobody does."""

    moderation: Annotated[
        str | None,
        _moderation("Who judges prompts and answers: an address, or a function of Python.", metavar="URL|MODULE:NAME"),
    ] = None
    moderation_on_failure: Annotated[
        Literal["block", "allow"], _moderation("What becomes of a text that it does not judge.")
    ] = "block"
    moderation_timeout: Annotated[float, _moderation("Seconds of one judgement.", min=0.01)] = 5.0
    moderation_api_key: Annotated[str | None, _moderation("Sent to the address as Authorization: Bearer.")] = None

    def config(self) -> ModerationConfig | None:
        """Raises UsageError for a hook that is not there."""
        if self.moderation is None:
            if self.moderation_api_key is not None:
                raise UsageError("--moderation-api-key needs --moderation")
            return None
        from qnext.server.moderation.hooks import hook_of
        from qnext.server.moderation.moderator import ModerationConfig

        hook = hook_of(self.moderation, api_key=self.moderation_api_key)
        return ModerationConfig(hook, self.moderation_timeout, self.moderation_on_failure)
