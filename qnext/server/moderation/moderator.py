"""Asks the hook in time, and decides what happens where it fails."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Literal, NamedTuple, Protocol

from qnext.server.errors import ApiError
from qnext.server.moderation.hooks import ModerationHook
from qnext.server.moderation.judgement import Action, BadReply, JudgedStage, ModerationQuestion, TextJudgement

_log = logging.getLogger("qnext.moderation")
OnFailure = Literal["block", "allow"]
_LOG_SECONDS = 10.0  # between two lines about failures


class ModerationConfig(NamedTuple):
    """The hook, how long it may take, and whether texts pass that it could not judge."""

    hook: ModerationHook
    seconds: float = 5.0
    on_failure: OnFailure = "block"


class ModerationCounters(Protocol):
    def observe_moderation(self, stage: JudgedStage, action: Action | None, seconds: float) -> None: ...

    def count_moderation_failure(self, stage: JudgedStage, reason: str) -> None: ...


class Moderator:
    """Judges texts for one server."""

    def __init__(self, config: ModerationConfig, counters: ModerationCounters) -> None:
        self._config = config
        self._counters = counters
        self._told = -_LOG_SECONDS

    async def judge(self, question: ModerationQuestion) -> TextJudgement | None:
        """The judgement; None where the hook has failed and texts pass then. Raises ApiError 503 where they do not."""
        started = time.perf_counter()
        judgement: TextJudgement | None = None
        try:
            reply = await asyncio.wait_for(self._config.hook.ask(question), self._config.seconds)
            judgement = TextJudgement.of_reply(reply, question)
        except asyncio.TimeoutError:
            self._note(question, "timeout", f"no reply within {self._config.seconds:g} seconds")
        except BadReply as error:
            self._note(question, "bad_reply", str(error))
        except Exception as error:  # of somebody else's code, or of a network
            self._note(question, "error", type(error).__name__)
        finally:
            action = None if judgement is None else judgement.action
            self._counters.observe_moderation(question.stage, action, time.perf_counter() - started)
        if judgement is None and self._config.on_failure == "block":
            raise ApiError(503, "the moderation of this server does not answer", code="moderation_failed")
        return judgement

    def _note(self, question: ModerationQuestion, reason: str, text: str) -> None:
        self._counters.count_moderation_failure(question.stage, reason)
        now = time.monotonic()
        if now - self._told >= _LOG_SECONDS:
            self._told = now
            passes = "passes unjudged" if self._config.on_failure == "allow" else "is refused"
            _log.error("request %s: moderation of the %s: %s; it %s", question.request_id, question.stage, text, passes)
