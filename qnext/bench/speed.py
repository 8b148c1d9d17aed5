"""The speed of a model: times of prefill, of decode at a depth, and of the whole engine.

Legend: Y vocabulary.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.assembly import make_parts
from qnext.engine.execution.executor import Executor
from qnext.engine.policy.step import SequencePlan, StepPlan
from qnext.engine.sampling.logprobs import not_finite
from qnext.model import CausalLM


def random_tokens(num_tokens: int, *, vocab_size: int) -> list[int]:
    """Random tokens, the same for the same sizes, so that every contestant reads the same prompt."""
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(0, vocab_size, (num_tokens,), generator=generator).tolist()


class SpeedMeter:
    """Times one model, one sequence at a time. Prompts are random tokens. The first call of each kind warms up.

    Times are the clock's, from when the model's device had nothing left to do until it has nothing left again.

    Caches stay allocated between calls; `cache_bytes` is their size.
    """

    def __init__(self, model: CausalLM, *, decode_tokens: int) -> None:
        self.model = model
        self.decode_tokens = decode_tokens
        self._engines: dict[tuple[str, int], Engine] = {}
        self._deep: dict[int, _Deep] = {}
        self._reading_seconds: dict[int, float] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and states that are allocated."""
        executors = [
            *(engine.executor for engine in self._engines.values()),
            *(deep.executor for deep in self._deep.values()),
        ]
        held = [executor.held_bytes() for executor in executors]
        return sum(each.kv + each.states for each in held)

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes per token of the caches in use, with their real dtype. Call prefill_seconds first."""
        engine = next(iter(self._engines.values()))
        return engine.memory_plan.kv_bytes_per_1000_tokens / 1000

    @property
    def state_bytes(self) -> int:
        """Bytes that the linear layers keep for one sequence. Call prefill_seconds first."""
        return next(iter(self._engines.values())).memory_plan.state_bytes_per_sequence

    def prefill_seconds(self, num_tokens: int) -> float:
        """Seconds from the prompt to its first answer token, through the engine."""
        engine = self._engine("prefill", num_tokens, num_tokens + 1)
        prompt = self._tokens(num_tokens)
        start = self._now()
        engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
        return self._now() - start

    def reading_seconds(self, depth: int) -> float:
        """Seconds of the prompt with which a sequence of this depth began: a prefill that is timed once."""
        self._at_depth(depth)
        return self._reading_seconds[depth]

    def decode_seconds(self, depth: int) -> float:
        """`decode_tokens` steps of the model after `depth` tokens (at least one): logits and the most likely token.

        Every call writes the same positions again. The state of the linear layers goes on from the last call, which
        changes numbers but no sizes.
        """
        deep = self._at_depth(depth)
        token = deep.token
        start = self._now()
        for position in range(deep.num_tokens, deep.num_tokens + self.decode_tokens):
            token = _step(deep.executor, (token,), position)
        return self._now() - start

    def generate_seconds(self) -> float:
        """`decode_tokens` steps of the engine after one token: decode_seconds(0) and the time of the engine around
        it."""
        engine = self._engine("generate", 1, self.decode_tokens + 2)
        events = engine.stream(
            self._tokens(1), SamplingParams(max_tokens=self.decode_tokens + 1, temperature=0.0, ignore_eos=True)
        )
        next(events)
        start = self._now()
        for _ in events:
            pass
        return self._now() - start

    def _now(self) -> float:
        """Seconds, once the device has done all that it was asked for."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _tokens(self, num_tokens: int) -> list[int]:
        return random_tokens(num_tokens, vocab_size=self.model.config.vocab_size)

    def _engine(self, kind: str, length: int, max_model_len: int) -> Engine:
        key = (kind, length)
        if key not in self._engines:
            self._engines[key] = Engine.of(
                self.model,
                EngineConfig(max_num_seqs=1, max_model_len=max_model_len, prefix_cache=False, speculation=False),
            )
        return self._engines[key]

    def _at_depth(self, depth: int) -> _Deep:
        """A sequence that has read `depth` tokens, at least one, and whose cache has room for all the steps."""
        if depth not in self._deep:
            num_prompt = max(depth, 1)
            max_model_len = num_prompt + self.decode_tokens + 1
            executor, scheduler, *_ = make_parts(
                self.model,
                EngineConfig(max_num_seqs=1, max_model_len=max_model_len, prefix_cache=False, speculation=False),
            )
            limits = scheduler.limits
            blocks = tuple(range(limits.blocks_of(max_model_len)))
            prompt, token = self._tokens(num_prompt), 0
            size = limits.max_num_batched_tokens // limits.chunk_size * limits.chunk_size
            start = self._now()
            for first in range(0, num_prompt, size):
                chunk = tuple(prompt[first : first + size])
                token = _step(executor, chunk, first, num_prompt=num_prompt, blocks=() if first else blocks)
            self._reading_seconds[depth] = self._now() - start
            self._deep[depth] = _Deep(executor, num_prompt, token)
        return self._deep[depth]


class _Deep(NamedTuple):
    """A sequence in slot 0 of an executor of its own, and the token that comes next."""

    executor: Executor
    num_tokens: int
    token: int


def _step(
    executor: Executor, token_ids: tuple[int, ...], start: int, *, num_prompt: int = 0, blocks: tuple[int, ...] = ()
) -> int:
    """Compute these tokens; the most likely next one, as far as the prompt is read."""
    needs_sample = start + len(token_ids) >= num_prompt
    sequence = SequencePlan("", 0, token_ids, start, needs_sample, num_prompt=num_prompt, blocks=blocks)
    output = executor.execute(StepPlan((sequence,)))
    if num_prompt and needs_sample and not output.logits_RY.isfinite().all():
        raise not_finite()
    return int(output.logits_RY.argmax(-1)) if needs_sample else 0
