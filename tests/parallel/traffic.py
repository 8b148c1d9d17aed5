"""Random schedules of requests for an engine, and what comes out."""

from __future__ import annotations

import random

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.policy.request import SampledToken
from tests.engine.drafting import draft_always

CONFIG = EngineConfig(
    max_num_seqs=4, max_model_len=192, num_blocks=24, num_checkpoints=4, checkpoint_interval=32, poison=True
)
Answers = list[tuple[SampledToken, ...]]


def play(engine: Engine, seed: int, *, num_requests: int = 4) -> Answers:
    """Requests that share prefixes, come one after another, and are preempted, since blocks are few; of some, none of
    the answer is read. Tokens and their log-probabilities, of each in turn."""
    rng = random.Random(seed)
    if engine.drafter is not None:
        draft_always(engine, seed)
        # Not by the clock: how many tokens an aborted request had depends on when drafting began.
        engine.drafter.lengths.may_probe = lambda *of, **more: True  # type: ignore[method-assign]
    base = [rng.randrange(engine.model_config.vocab_size) for _ in range(120)]
    requests = []
    while len(requests) < num_requests or engine.has_unfinished:
        if len(requests) < num_requests and (rng.random() < 0.3 or not engine.has_unfinished):
            shared = rng.randrange(len(base))
            own = [rng.randrange(engine.model_config.vocab_size) for _ in range(rng.randint(1, 40))]
            temperature = rng.choice([0.0, 0.0, 1.0])
            params = SamplingParams(
                max_tokens=rng.randint(1, 24),
                temperature=temperature,
                seed=rng.randrange(1000),
                logprobs=2,
                ignore_eos=rng.random() < 0.5,
            )
            requests.append(engine.add_request(base[:shared] + own, params))
        engine.step()
        if requests and rng.random() < 0.03:
            engine.abort(requests[-1].id)
    engine.check_integrity()
    return [tuple(request.sampled) for request in requests]
