"""After a step that failed: whose fault it was, and how the others go on. No torch.

A step of one request that fails is that request's failure. The requests of any other step go back to the queue, their
caches being spoiled, and run apart from each other until each is past the place where the step failed: the one that
fails there alone was the culprit. Where nobody does, the step failed for what they were together, and requests that it
happens to a second time stay apart. So nobody ends for another's fault.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qnext.engine.request import Request
from qnext.engine.scheduling.scheduler import Scheduler
from qnext.engine.step import StepPlan
from qnext.errors import RequestBroke

if TYPE_CHECKING:
    from qnext.engine.speculation.drafter import Drafter

_log = logging.getLogger("qnext.engine")


def blame(
    scheduler: Scheduler, plan: StepPlan, error: BaseException, *, unfinished: Iterable[Request]
) -> Request | None:
    """Take back a step that raised `error`. Returns its only request, which fails with it, or None.

    `unfinished` are all requests of the engine: where a culprit is found, nobody else is suspected any longer.
    """
    assert plan.sequences
    _log.error("a step of %d requests failed", len(plan.sequences), exc_info=error)
    scheduler.discard_step(requeues=True)
    if len(plan.sequences) == 1:
        culprit = plan.sequences[0].request
        culprit.failure = RequestBroke.of(error, "a step of the model")
        for request in unfinished:
            request.num_suspected = 0
        return culprit
    for request, token_ids, start, *_ in plan.sequences:
        request.num_suspected += 1
        is_first = request.num_suspected == 1
        request.apart_until = start + len(token_ids) if is_first else request.max_cached_tokens + 1
    return None


def draft(drafter: Drafter, requests: Sequence[Request]) -> None:
    """Have the drafter set the drafts of `requests`. Whose drafts cannot be made, goes on without any."""
    able = [request for request in requests if request.may_draft]
    try:
        drafter.draft(able)
        return
    except Exception:
        _log.exception("drafts for %d requests failed", len(able))
    for request in able:
        request.drafts, request.drafting = (), None
    for request in able:
        try:
            drafter.draft([request])
        except Exception:
            _log.exception("request %s goes on without drafts", request.id)
            request.drafts, request.drafting, request.may_draft = (), None, False
