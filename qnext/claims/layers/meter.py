"""Times of one layer at a depth of context that nobody has to compute: its caches are filled with random numbers.

Legend: N sequences.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qnext import ops
from qnext.bench.contest import Step
from qnext.checkpoint import load_model
from qnext.claims.layers.shapes import DENSE_PAIR, LAYERS
from qnext.engine import EngineConfig
from qnext.engine.assembly import make_parts
from qnext.engine.execution.local import LocalExecutor
from qnext.engine.policy.step import SequencePlan, StepPlan
from qnext.model import CausalLM

_BLOCK = 16
_DEEP = (*LAYERS, DENSE_PAIR)
_RANDOM_PAGES = 64
_OWN_PAGES_BYTES = 1 << 30  # of all sequences of a batch; above, they share the pages of their context


class DeepLayer:
    """A model of one layer with `num_sequences` sequences that have `context` tokens behind them."""

    def __init__(self, model: CausalLM, *, context: int, num_sequences: int, num_more: int) -> None:
        self._vocab_size = model.config.vocab_size
        self._context, self._num_sequences = max(1, context), num_sequences
        length = self._context + num_more
        num_blocks = -(-length // _BLOCK)
        self._executor, shares = _executor(model, length, num_blocks, num_sequences)
        _fill(self._executor)
        own = range(num_sequences) if not shares else [0] * num_sequences
        num_blocks = num_blocks if self._executor.cache.kv else 0
        self._blocks = [tuple(range(number * num_blocks, (number + 1) * num_blocks)) for number in own]
        self._is_known = False
        self._random = random.Random(0)

    def chunk_seconds(self, num_tokens: int) -> float:
        """Of a prompt's next tokens, without the head."""
        plan = StepPlan((self._sequence(0, num_tokens, self._context, needs_sample=False),))
        self._is_known = True
        start = time.perf_counter()
        self._executor.execute(plan)
        return time.perf_counter() - start

    def decode_seconds(self, step: int, num_rows: int = 1) -> float:
        """Of one token of every sequence and `num_rows` - 1 drafts behind it, `step` such steps behind the context."""
        start_token = self._context + step * num_rows
        sequences = [
            self._sequence(slot, num_rows, start_token, needs_sample=True)._replace(num_drafts=num_rows - 1)
            for slot in range(self._num_sequences)
        ]
        self._is_known = True
        start = time.perf_counter()
        self._executor.execute(StepPlan(tuple(sequences)))
        return time.perf_counter() - start

    def _sequence(self, slot: int, num_tokens: int, start: int, *, needs_sample: bool) -> SequencePlan:
        tokens = tuple(self._random.randrange(self._vocab_size) for _ in range(num_tokens))
        blocks = () if self._is_known else self._blocks[slot]
        return SequencePlan("", slot, tokens, start, needs_sample, num_prompt=self._context, blocks=blocks)


def _executor(model: CausalLM, length: int, num_blocks: int, num_sequences: int) -> tuple[LocalExecutor, bool]:
    """And whether its sequences share pages."""
    config = model.config
    page_bytes = 2 * 2 * config.num_key_value_heads * config.head_dim * _BLOCK * config.num_full_layers
    shares = num_sequences * num_blocks * page_bytes > _OWN_PAGES_BYTES
    parts = make_parts(
        model,
        EngineConfig(
            max_num_seqs=num_sequences,
            max_model_len=length,
            num_blocks=num_blocks * (1 if shares else num_sequences),
            prefix_cache=False,
            speculation=False,
            count_experts=False,
        ),
    )
    return parts.executor, shares


@torch.no_grad()
def _fill(executor: LocalExecutor) -> None:
    """Random numbers in all pages, a few of them again and again, and in all states."""
    generator = torch.Generator().manual_seed(0)
    for pages in executor.cache.kv.values():
        for tensor in pages.tensors:
            some = _normal(tensor[:_RANDOM_PAGES], generator)
            for start in range(0, len(tensor), _RANDOM_PAGES):
                part = tensor[start : start + _RANDOM_PAGES]
                part.copy_(some[: len(part)])
    for slots in executor.cache.delta.values():
        slots.conv.copy_(_normal(slots.conv, generator))
        slots.state.copy_(0.1 * _normal(slots.state, generator))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def layers_worker(*, folders: Mapping[str, str], threads: int | None) -> Step:
    """One-layer models by name, in one process. `decode` and `chunk` time some of them in turn, step by step, so that
    a layer never finds its weights in a processor cache from its own last step: between two of its steps others ran, as
    in a whole model. Frames and heads have no context: the small layer in them would have to read it."""
    ops.keep_freed_memory()  # as whoever opens a folder does
    if threads is not None:
        ops.set_num_threads(threads)
    models = {name: load_model(folder, check_finite=False) for name, folder in folders.items()}
    if "full" in models:
        models["full"].model.layers[0].mlp = models["linear"].model.layers[0].mlp
    deep: dict[tuple[Any, ...], DeepLayer] = {}

    def at(name: str, context: int, num_sequences: int, num_more: int) -> DeepLayer:
        key = (name, context, num_sequences, num_more)
        if key not in deep:
            deep[key] = DeepLayer(models[name], context=context, num_sequences=num_sequences, num_more=num_more)
        return deep[key]

    def decode(
        names: Sequence[str], context: int, num_sequences: int, steps: int, num_rows: int = 1
    ) -> dict[str, list[float]]:
        depths = {name: context if name in _DEEP else 1 for name in names}
        num_more = 4 * steps * num_rows
        layers = {name: at(name, depth, num_sequences, num_more) for name, depth in depths.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for step in range(steps):
            for name, layer in layers.items():
                seconds[name].append(layer.decode_seconds(step, num_rows))
        return seconds

    def chunk(names: Sequence[str], context: int, num_tokens: int) -> dict[str, float]:
        return {name: at(name, context, 1, num_tokens).chunk_seconds(num_tokens) for name in names}

    def forget() -> None:
        """Frees the caches."""
        deep.clear()

    actions: dict[str, Step] = {"decode": decode, "chunk": chunk, "forget": forget}
    return lambda kind, *arguments: actions[kind](*arguments)
