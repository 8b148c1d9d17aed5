"""How every chat surface begins an answer after its conversation is rendered."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from qnext.engine.policy.params import SamplingParams
from qnext.server.body.strict import SamplingBody
from qnext.server.exchange import Exchange
from qnext.server.inference.generation import TokenPrompt
from qnext.server.surfaces.dialogue import Dialogue
from qnext.server.surfaces.held import ReadAnswer, held
from qnext.server.surfaces.sampling import AnswerOptions, sampling_params
from qnext.server.surfaces.source import Source, open_source


class Opening(NamedTuple):
    """Answers before their first token, and their source. The source begins when it is entered."""

    params: SamplingParams
    answers: list[ReadAnswer]
    source: AbstractAsyncContextManager[Source]


async def open_answers(exchange: Exchange, dialogue: Dialogue, body: SamplingBody, options: AnswerOptions) -> Opening:
    """Check the parameters, compile the constraint, and prepare `n` answers. Raises ApiError."""
    params = sampling_params(exchange, body, len(dialogue.prompt_ids), options)
    guide = await exchange.server.guide(dialogue.constraint, param=dialogue.constraint_param, owner=exchange.owner)
    readers = [dialogue.new_answer(exchange) for _ in range(params.n)]
    prompt = TokenPrompt(dialogue.prompt_ids, params, guide)
    return Opening(params, *held(exchange, readers, open_source(exchange, [prompt], salt=body.cache_salt)))
