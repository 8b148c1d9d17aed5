"""How much of a model's experts stays in memory when not all of them fit. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from qnext.config import ModelConfig
from qnext.errors import DoesNotFit
from qnext.planning.counts import kv_bytes_per_token, state_bytes_per_sequence
from qnext.planning.machine import format_bytes
from qnext.planning.plan import DEFAULT_SEQUENCES, SPARE_CHECKPOINTS
from qnext.planning.workspace import StepSizes, step_bytes

_SPARE = 64  # buffers for reads under way: of a prompt's next layer above all
_STEP_TOKENS = 4096
_DRAFTS = 8  # what drafts of a sequence keep is an eighth of its state in the 80B
_KEPT_TOKENS = 32_768  # of keys and values
_OTHERS = 512 << 20  # programs beside this one, and what nobody counted


@dataclass(frozen=True)
class ExpertSizes:
    """Of the layers whose experts can be streamed, and of all other weights."""

    num_layers: int
    num_experts: int
    record_bytes: int
    other_bytes: int

    @property
    def all_bytes(self) -> int:
        """Of all experts."""
        return self.num_layers * self.num_experts * self.record_bytes


@dataclass(frozen=True)
class ExpertRoom:
    """Experts of each layer that stay in memory, and buffers beside them for reads under way."""

    slots: tuple[int, ...]
    num_spare: int
    record_bytes: int

    @property
    def num_bytes(self) -> int:
        return (sum(self.slots) + self.num_spare) * self.record_bytes


def engine_reserve(
    config: ModelConfig, *, num_threads: int, num_sequences: int | None = None, num_tokens: int | None = None
) -> int:
    """Bytes that an engine wants beside the weights, where memory is short: one of the default options, or one of so
    many sequences and of `num_tokens` in all."""
    kept = min(config.context_length, _KEPT_TOKENS) if num_tokens is None else num_tokens
    num_rows = DEFAULT_SEQUENCES if num_sequences is None else num_sequences
    sizes = StepSizes(_STEP_TOKENS, num_rows, num_rows, min(config.context_length, kept))
    step = step_bytes(config, sizes, num_threads=num_threads, streams_experts=True)
    state = state_bytes_per_sequence(config).total
    num_states = DEFAULT_SEQUENCES + SPARE_CHECKPOINTS if num_sequences is None else num_sequences
    states = num_states * (state + (state // _DRAFTS if config.num_nextn_predict_layers else 0))
    return step + states + kept * kv_bytes_per_token(config, with_mtp=True) + _OTHERS


def plan_expert_memory(
    config: ModelConfig, sizes: ExpertSizes, *, free_bytes: int, wanted_bytes: int | None, num_threads: int
) -> ExpertRoom | None:
    """None where all experts and what an engine wants beside them fit into memory, unless bytes for them are wanted.

    Raises DoesNotFit where the other weights, the wanted memory or the smallest that works are not free.
    """
    reserve = engine_reserve(config, num_threads=num_threads)
    if wanted_bytes is None:
        if sizes.all_bytes + sizes.other_bytes + reserve <= free_bytes:
            return None
        room = free_bytes - sizes.other_bytes - reserve
    else:
        room = wanted_bytes
        if sizes.other_bytes + room > free_bytes:
            raise DoesNotFit(
                f"{format_bytes(room)} for experts and {format_bytes(sizes.other_bytes)} of other weights, but "
                f"{format_bytes(free_bytes)} of memory are free"
            )
    num_buffers = room // sizes.record_bytes
    least = 2 * sizes.num_layers
    if num_buffers < least:
        raise DoesNotFit(
            f"experts on disk need {format_bytes(least * sizes.record_bytes)} of memory at least beside "
            f"{format_bytes(sizes.other_bytes)} of other weights and {format_bytes(reserve)} for an engine; "
            f"{format_bytes(max(0, room))} are left for them"
        )
    num_spare = min(_SPARE, num_buffers // 2)
    each, more = divmod(num_buffers - num_spare, sizes.num_layers)
    slots = tuple(min(sizes.num_experts, each + (layer < more)) for layer in range(sizes.num_layers))
    return ExpertRoom(slots, num_spare, sizes.record_bytes)
