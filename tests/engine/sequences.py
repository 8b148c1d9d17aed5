"""Sequences in a cache, stepped by hand: tokens in any cuts, drafts that are accepted or not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from qnext.engine.execution.cache import BLOCK_SIZE, Cache, CacheDtypes, CacheSizes
from qnext.engine.execution.inputs import MixedInputs
from qnext.engine.policy.step import Rows, SequencePlan, StepPlan
from qnext.model import CausalLM

NUM_DRAFTS = 4
MAX_LEN = 128


class Sequences:
    """A cache full of NaN and sequences in it, each with the tokens that it will turn out to have."""

    def __init__(self, model: CausalLM, lengths: Sequence[int], *, num_slots: int = 7) -> None:
        self.model = model
        self.pages = -(-MAX_LEN // BLOCK_SIZE)
        num_blocks = num_slots * self.pages
        sizes = CacheSizes(
            num_blocks=num_blocks, num_slots=num_slots, max_model_len=MAX_LEN, num_draft_tokens=NUM_DRAFTS
        )
        dtypes = CacheDtypes(activations=model.dtype, kv=model.dtype)
        self.cache = Cache(model.config, sizes, dtypes, poison=True)
        generator = torch.Generator().manual_seed(len(lengths))
        self.tokens = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        self.done = [0] * len(lengths)
        self.logits: list[list[Tensor]] = [[] for _ in lengths]
        self.slots = [(3 * n + 1) % num_slots for n in range(len(lengths))]
        self.blocks = [self._blocks_of(slot, num_slots) for slot in self.slots]
        self._has_blocks = [False] * len(lengths)

    def _blocks_of(self, slot: int, num_slots: int) -> tuple[int, ...]:
        return tuple(slot + num_slots * page for page in reversed(range(self.pages if self.cache.kv else 0)))

    def left(self, n: int) -> int:
        return len(self.tokens[n]) - self.done[n]

    def step(self, parts: Sequence[tuple[int, int, bool, int]]) -> None:
        """Parts of a step: sequence, number of tokens, whether they are drafts, how many of them are its own."""
        plans = []
        for n, count, _, accepted in parts:
            own = self.tokens[n][self.done[n] : self.done[n] + accepted]
            wrong = [(token + 1) % self.model.config.vocab_size for token in range(count - accepted)]
            blocks = () if self._has_blocks[n] else self.blocks[n]
            self._has_blocks[n] = True
            plans.append(
                SequencePlan(
                    str(n),
                    self.slots[n],
                    (*own, *wrong),
                    self.done[n],
                    needs_sample=True,
                    num_prompt=len(self.tokens[n]),
                    blocks=blocks,
                )
            )
        self.cache.prepare(StepPlan(tuple(plans), (), ()))
        rows = [
            Rows(plan.slot, plan.token_ids, plan.start, is_draft, plan.num_prompt)
            for plan, (_, _, is_draft, _) in zip(plans, parts, strict=True)
        ]
        hidden_TD = self.model(MixedInputs(self.cache, rows).batch).hidden_TD
        logits = self.model.logits(hidden_TD).split([count for _, count, _, _ in parts])
        for (n, _, is_draft, accepted), rows in zip(parts, logits, strict=True):
            self.logits[n].append(rows[:accepted])
            self.done[n] += accepted
            if is_draft:
                self.cache.commit(self.slots[n], accepted)

    def random_step(self, choose: random.Random) -> None:
        open_ = [n for n in range(len(self.done)) if self.left(n)]
        parts = []
        for n in choose.sample(open_, choose.randint(1, len(open_))):
            is_draft = choose.random() < 0.7
            count = choose.randint(1, NUM_DRAFTS) if is_draft else min(self.left(n), choose.choice([1, 2, 9, 30]))
            accepted = min(self.left(n), choose.randint(0, count)) if is_draft else count
            parts.append((n, count, is_draft, accepted))
        self.step(parts)

    def run_to_the_end(self, seed: int) -> list[Tensor]:
        choose = random.Random(seed)
        while any(self.left(n) for n in range(len(self.done))):
            self.random_step(choose)
        return [torch.cat(rows) for rows in self.logits]
