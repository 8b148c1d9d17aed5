"""How fast a model reads and writes: times of prefill, of decoding at a depth, and of the whole engine.

Legend: Y vocabulary.
"""

from __future__ import annotations

import time

import torch

from qnext.engine import Engine, Request, SamplingParams
from qnext.engine.step import SequencePlan, StepPlan
from qnext.model import CausalLM


def random_tokens(num_tokens: int, *, vocab_size: int) -> list[int]:
    """The same tokens for the same sizes, so that every contestant reads the same prompt."""
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(0, vocab_size, (num_tokens,), generator=generator).tolist()


class SpeedMeter:
    """Times one model, one sequence at a time. Prompts are random tokens; every first call of a kind warms up.

    Caches stay allocated between calls; `cache_bytes` says how much they hold.
    """

    def __init__(self, model: CausalLM, *, decode_tokens: int) -> None:
        self.model = model
        self.decode_tokens = decode_tokens
        self._engines: dict[tuple[str, int], Engine] = {}
        self._deep: dict[int, tuple[Engine, Request]] = {}
        self._reading_seconds: dict[int, float] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and states that are allocated."""
        engines = [*self._engines.values(), *(engine for engine, _ in self._deep.values())]
        return sum(engine.cache.kv_bytes + engine.cache.state_bytes for engine in engines)

    @property
    def kv_bytes_per_token(self) -> float:
        """Of the caches in use, hence in their real dtype. Needs a call of prefill_seconds before."""
        engine = next(iter(self._engines.values()))
        return engine.memory_plan.kv_bytes_per_1000_tokens / 1000

    @property
    def state_bytes(self) -> int:
        """What the linear layers keep for one sequence. Needs a call of prefill_seconds before."""
        return next(iter(self._engines.values())).memory_plan.state_bytes_per_sequence

    def prefill_seconds(self, num_tokens: int) -> float:
        """From the prompt to its first answer token, through the engine."""
        engine = self._engine("prefill", num_tokens, num_tokens + 1)
        prompt = self._tokens(num_tokens)
        start = time.perf_counter()
        engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
        return time.perf_counter() - start

    def reading_seconds(self, depth: int) -> float:
        """How long the prompt took that a sequence of this depth began with: a prefill that is timed once."""
        self._at_depth(depth)
        return self._reading_seconds[depth]

    def decode_seconds(self, depth: int) -> float:
        """`decode_tokens` steps of the model after `depth` tokens (at least one): logits and the most likely token.

        Every call writes the same positions again. The state of the linear layers goes on from the last call, which
        changes numbers but no sizes.
        """
        engine, request = self._at_depth(depth)
        token = request.output_ids[-1]
        first = request.num_computed_tokens
        start = time.perf_counter()
        for position in range(first, first + self.decode_tokens):
            plan = StepPlan((SequencePlan(request, (token,), position, needs_sample=True),), (), ())
            token = int(engine.runner.run(plan).logits_RY.argmax(-1))
        return time.perf_counter() - start

    def generate_seconds(self) -> float:
        """`decode_tokens` steps of the engine after one token: decode_seconds(0) and all that is around it."""
        engine = self._engine("generate", 1, self.decode_tokens + 2)
        events = engine.stream(
            self._tokens(1), SamplingParams(max_tokens=self.decode_tokens + 1, temperature=0.0, ignore_eos=True)
        )
        next(events)
        start = time.perf_counter()
        for _ in events:
            pass
        return time.perf_counter() - start

    def _tokens(self, num_tokens: int) -> list[int]:
        return random_tokens(num_tokens, vocab_size=self.model.config.vocab_size)

    def _engine(self, kind: str, length: int, max_model_len: int) -> Engine:
        key = (kind, length)
        if key not in self._engines:
            self._engines[key] = Engine(
                self.model, max_num_seqs=1, max_model_len=max_model_len, prefix_cache=False, speculation=False
            )
        return self._engines[key]

    def _at_depth(self, depth: int) -> tuple[Engine, Request]:
        """A request that has read `depth` tokens and chosen the next, and whose cache has room for all the steps."""
        if depth not in self._deep:
            num_prompt = max(depth, 1)
            max_model_len = num_prompt + self.decode_tokens + 1
            engine = Engine(
                self.model, max_num_seqs=1, max_model_len=max_model_len, prefix_cache=False, speculation=False
            )
            params = SamplingParams(max_tokens=self.decode_tokens + 1, ignore_eos=True)
            request = engine.add_request(self._tokens(num_prompt), params)
            start = time.perf_counter()
            while not request.output_ids:
                engine.step()
                if request.fault is not None:
                    raise request.fault
            self._reading_seconds[depth] = time.perf_counter() - start
            self._deep[depth] = engine, request
        return self._deep[depth]
