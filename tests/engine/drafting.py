"""Engines whose drafter drafts always, and the drafts of the bare model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from qnext.engine import Engine, EngineConfig, Request, SamplingParams
from qnext.engine.drafter import Drafter
from qnext.engine.policy.draft_lengths import Drafting
from qnext.engine.policy.planner import Drafts
from qnext.model import Batch, CausalLM, TrunkOutput

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)


def make_engine(model: CausalLM, **options: Any) -> Engine:
    return Engine.of(model, EngineConfig(**{"max_num_seqs": 4, "max_model_len": 384, "poison": True, **options}))


def draft_always(engine: Engine, seed: int | None = None) -> None:
    """As many drafts as may be, or with a seed some number of them, whatever they are worth."""
    assert isinstance(engine.drafter, Drafter)
    rng = None if seed is None else random.Random(seed)

    def choose(requests: Sequence[Drafting], most: Sequence[int]) -> list[int]:
        limits = [max(0, min(3, limit)) for limit in most]
        return limits if rng is None else [rng.randint(0, limit) for limit in limits]

    engine.drafter.lengths.choose = choose  # type: ignore[method-assign]


def prompts_of(model: CausalLM, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def drafts_of_the_bare_model(model: CausalLM, tokens: Sequence[int], count: int, *, first: int = 0) -> list[int]:
    """Greedy drafts after all tokens of a sequence, everything computed anew; the layer sees rows from `first` on."""
    tokens_T = torch.tensor(tokens)
    source_TD = model.draft_source(model(Batch.from_lengths(tokens_T, [len(tokens)])))[first:-1]
    drafts: list[int] = []
    for _ in range(count):
        next_ids_T = torch.tensor([*tokens[first + 1 :], *drafts])
        batch = Batch.from_lengths(next_ids_T, [len(next_ids_T)])
        batch = Batch(next_ids_T, batch.positions_T + first, batch.packing)
        hidden_TD = model.draft_hidden(next_ids_T, TrunkOutput(source_TD, source_TD), batch)
        drafts.append(int(model.logits(hidden_TD[-1:]).argmax()))
        source_TD = torch.cat([source_TD, hidden_TD[-1:]])
    return drafts


def drafts_like_those_of(model: CausalLM, engine: Engine, request: Request, drafts: tuple[int, ...]) -> list[int]:
    tokens = request.token_range(0, request.num_tokens)
    return drafts_of_the_bare_model(model, tokens, len(drafts), first=drafting_of(engine, request).first_row)


def drafting_of(engine: Engine, request: Request) -> Drafting:
    assert isinstance(engine.drafter, Drafter)
    return engine.drafter.drafting_of(engine.scheduler.sequences[request.id])


def draft(engine: Engine) -> Drafts:
    """What the next step would draft."""
    assert engine.drafter is not None
    return engine.drafter.draft(engine.scheduler.decoding)
