"""Whether an engine fits into memory, and with which sizes. No other code decides this.

An engine's memory is weights, caches (blocks of keys and values, slots of states) and the workspace of its largest
step. A caller that knows torch says what is free and what the backend takes (`Surroundings`). The rest is arithmetic.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qnext.config import ModelConfig
from qnext.errors import DoesNotFit, UsageError
from qnext.planning import machine
from qnext.planning.counts import kv_bytes_per_token, state_bytes_per_sequence
from qnext.planning.machine import format_bytes
from qnext.planning.workspace import StepSizes, recorded_bytes, step_bytes

DEFAULT_SEQUENCES = 8
CHECKPOINT_INTERVAL = 4096  # tokens between the states that are kept of a long prompt
SPARE_CHECKPOINTS = 4  # states of cached prefixes that are kept where memory is short
_POLICY_BYTES = 128  # per token of the cache: ids, the trie of blocks, page numbers
_ESTIMATED_STEP = 512  # tokens
_STREAMED_STEP = 8192  # tokens, which read the experts of each layer once


class Surroundings(NamedTuple):
    """What an engine runs on, and the fixed sizes of its code.

    `available_bytes` are free when the weights are loaded and nothing else is. A step takes `workspace_factor` times
    the workspace of the kernels, and the keys and values of the longest sequence where the backend `copies_context`.
    `recorded` has the number of tokens of each recorded step that is kept.
    """

    available_bytes: int
    num_threads: int
    workspace_factor: int
    copies_context: bool
    recorded: tuple[int, ...]
    block_size: int
    chunk_size: int  # of the delta rule: the least that a step leaves for prompts
    num_sources: int  # rows that drafting keeps of each sequence
    num_draft_pages: int
    num_spare: int = 0  # slots, and pages, that belong to no sequence


@dataclass(frozen=True)
class WantedSizes:
    """The sizes that the caller of an engine asks for. None is chosen here. EngineConfig documents each field."""

    max_num_seqs: int
    max_num_batched_tokens: int | None
    max_model_len: int | None
    num_blocks: int | None
    kv_budget_bytes: int | None
    kv_dtype: str
    state_dtype: str
    has_prefix_cache: bool
    num_checkpoints: int | None
    max_draft_tokens: int
    has_drafter: bool
    routing_bytes: int = 0  # of a token, beside its keys and values
    streams_experts: bool = False  # each step reads experts from disk: the larger, the fewer for each token


@dataclass(frozen=True)
class Sizes:
    """The sizes that an engine allocates. `workspace_bytes` bounds what steps take beside weights and caches."""

    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    num_slots: int
    workspace_bytes: int


def checked_model_len(config: ModelConfig, wanted: int | None) -> int:
    """The maximum of tokens in a request: the wanted number, or the model's context. Raises UsageError for more than
    the context."""
    length = config.context_length if wanted is None else wanted
    if not 2 <= length <= config.context_length:
        raise UsageError(
            f"max_model_len must be between 2 and the model's context of {config.context_length}, not {length}"
        )
    return length


def weights_fit(needed: int, free_bytes: int) -> bool:
    """Whether so many bytes of weights go into the free memory of a device."""
    return needed <= free_bytes


def check_weights(
    name: object,
    needed: int,
    *,
    hint: Callable[[int], str] = lambda free: "",
    free_bytes: int | None = None,
    device: str = "cpu",
) -> None:
    """Raise DoesNotFit for weights that do not fit into the free memory, or `free_bytes` of it, before they are read.

    `hint` gets the free bytes and returns what would fit, after a semicolon. `device` is where those bytes are free.
    """
    free = machine.available_bytes() if free_bytes is None else free_bytes
    if not weights_fit(needed, free):
        where = "memory" if device == "cpu" else f"the memory of {device}"
        raise DoesNotFit(
            f"{name}: weights of {format_bytes(needed)}, but {format_bytes(free)} of {where} are free{hint(free)}"
        )


def check_disk(folder: Path, needed: int) -> None:
    """Raise DoesNotFit for a folder of `needed` bytes that does not fit on the disk, before it is written."""
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise DoesNotFit(f"{folder}: needs {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of {parent} are free")


class Estimate(NamedTuple):
    """The memory that a model would take, before anything is loaded. `fits` maps lengths in tokens to the number of
    sequences of that length that fit beside weights and steps. `longest` is the length of a single sequence that fits.
    """

    free_bytes: int
    weight_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    state_bytes: int
    fits: dict[int, int]
    longest: int

    @property
    def holds_weights(self) -> bool:
        return self.weight_bytes + self.workspace_bytes <= self.free_bytes


def estimate(config: ModelConfig, weight_bytes: int, *, lengths: tuple[int, ...], num_threads: int) -> Estimate:
    """An estimate for sequences of `lengths` tokens. `plan_engine` plans with the memory that is left when the weights
    are loaded."""
    free = machine.available_bytes()
    workspace = step_bytes(config, StepSizes(_ESTIMATED_STEP, 1, 1, config.context_length), num_threads=num_threads)
    kv = kv_bytes_per_token(config, with_mtp=bool(config.num_nextn_predict_layers))
    state = state_bytes_per_sequence(config).total
    left = max(0, free - weight_bytes - workspace)
    fits = sequences_that_fit(config, left, lengths)
    longest = max(0, left - state) // kv if kv else config.context_length
    return Estimate(free, weight_bytes, workspace, kv, state, fits, longest)


def sequences_that_fit(config: ModelConfig, left: int, lengths: Sequence[int]) -> dict[int, int]:
    """Of so many tokens each, in `left` bytes: keys and values, those of the MTP layer too, and states."""
    kv = kv_bytes_per_token(config, with_mtp=bool(config.num_nextn_predict_layers))
    state = state_bytes_per_sequence(config).total
    return {length: max(0, left) // (state + length * kv) for length in lengths}


def plan_engine(config: ModelConfig, wanted: WantedSizes, around: Surroundings) -> Sizes:
    """Sizes that together fit into the free memory.

    Sizes that the caller has not fixed shrink until they fit: first the step and the cached states, then the blocks.
    Raises UsageError for contradictory or impossible sizes, DoesNotFit where the smallest allowed sizes do not fit.
    """
    max_model_len = checked_model_len(config, wanted.max_model_len)
    if wanted.num_blocks is not None and wanted.kv_budget_bytes is not None:
        raise UsageError("give num_blocks or kv_budget_bytes, not both")
    block_bytes = around.block_size * (kv_bytes_per_token(config, dtype=wanted.kv_dtype) + wanted.routing_bytes)
    if block_bytes and wanted.kv_budget_bytes is not None and wanted.kv_budget_bytes < block_bytes:
        raise UsageError(f"the KV cache needs at least one block of {block_bytes} bytes")
    available = around.available_bytes
    policy_bytes = around.block_size * _POLICY_BYTES
    length = -(-max_model_len // around.block_size)
    wished = max(1, wanted.max_num_seqs) * length
    most = min(wished, available // 2 // (block_bytes + policy_bytes))
    is_automatic = wanted.num_blocks is None and wanted.kv_budget_bytes is None
    for num_tokens, num_checkpoints in _steps_down(config, wanted, around.chunk_size):
        num_slots = wanted.max_num_seqs + num_checkpoints
        fixed = _step_workspace(config, wanted, around, num_tokens, max_model_len)
        fixed += (num_slots + around.num_spare) * (_state_bytes(config, wanted, around) + 8 * length)
        fixed += around.num_spare * block_bytes
        if not block_bytes:
            num_blocks = 0
        elif wanted.num_blocks is not None:
            num_blocks = wanted.num_blocks
        elif wanted.kv_budget_bytes is not None:
            num_blocks = min(wished, wanted.kv_budget_bytes // block_bytes)
        else:
            num_blocks = max(1, min(most, (available - fixed) // (block_bytes + policy_bytes)))
        needed = fixed + num_blocks * (block_bytes + policy_bytes)
        # What nobody has fixed makes room for one sequence of full length.
        if needed <= available and (not is_automatic or num_blocks >= min(length, most) or not block_bytes):
            break
    if needed > available:
        raise DoesNotFit(_what_does_not_fit(wanted, num_tokens, num_blocks * block_bytes, needed, available))
    if num_blocks < 1 and block_bytes:
        raise UsageError(f"the KV cache needs at least one block of {block_bytes} bytes")
    if block_bytes:  # a cache smaller than the context is the context
        max_model_len = min(max_model_len, num_blocks * around.block_size)
    workspace = _step_workspace(config, wanted, around, num_tokens, max_model_len) + num_blocks * policy_bytes
    return Sizes(num_tokens, max_model_len, num_blocks, num_slots, workspace)


def _steps_down(config: ModelConfig, wanted: WantedSizes, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Tokens of a step and states of cached prefixes, from what is best to the least that is allowed."""
    least_step = wanted.max_num_seqs - 1 + chunk_size
    default = _STREAMED_STEP if wanted.streams_experts else default_step_tokens(config)
    most_tokens = wanted.max_num_batched_tokens or max(default, least_step)
    least_tokens = wanted.max_num_batched_tokens or least_step
    most_states = wanted.max_num_seqs + SPARE_CHECKPOINTS if wanted.num_checkpoints is None else wanted.num_checkpoints
    least_states = 0 if wanted.num_checkpoints is None else most_states
    if not (wanted.has_prefix_cache and config.num_linear_layers):
        most_states = least_states = 0
    while wanted.streams_experts and most_tokens >= 4096 and wanted.max_num_batched_tokens is None:
        yield most_tokens, most_states
        most_tokens //= 2
    yield most_tokens, most_states
    middle_tokens = max(least_tokens, min(most_tokens, 512))
    yield middle_tokens, most_states
    yield middle_tokens, min(most_states, least_states + SPARE_CHECKPOINTS)
    yield least_tokens, least_states


def default_step_tokens(config: ModelConfig) -> int:
    """So many that each expert of a layer sees some forty rows on average, and its weights are read for those."""
    wanted = 40 * config.num_experts // max(1, config.num_experts_per_tok)
    return max(512, min(2048, wanted))


def _step_workspace(
    config: ModelConfig, wanted: WantedSizes, around: Surroundings, num_tokens: int, max_model_len: int
) -> int:
    """Bytes of the largest step and of all recorded ones."""
    num_rows = min(num_tokens, wanted.max_num_seqs * (1 + wanted.max_draft_tokens))
    sizes = StepSizes(num_tokens, num_rows, wanted.max_num_seqs, max_model_len)
    of_kernels = step_bytes(config, sizes, num_threads=around.num_threads, streams_experts=wanted.streams_experts)
    step = around.workspace_factor * of_kernels
    if around.copies_context:
        step += 2 * kv_bytes_per_token(config, dtype="float32") * max_model_len
    tables = 8 * wanted.max_num_seqs * (max_model_len // around.block_size + 1)
    num_kinds = 2 if wanted.has_drafter else 1  # passes of the MTP layer are recorded as well
    return step + num_kinds * sum(recorded_bytes(config, count) + tables for count in around.recorded)


def _state_bytes(config: ModelConfig, wanted: WantedSizes, around: Surroundings) -> int:
    """Bytes of one slot: the states, and the pending tokens of drafts."""
    per_token = config.linear_conv_dim + config.linear_key_dim + config.linear_value_dim + config.linear_num_value_heads
    pending = 4 * (per_token if config.num_linear_layers else 0) * config.num_linear_layers
    num_pending = wanted.max_draft_tokens + 1 if wanted.max_draft_tokens else 0
    sources = 0
    if wanted.has_drafter:
        of_all = kv_bytes_per_token(config, dtype=wanted.kv_dtype, with_mtp=True)
        of_draft = of_all - kv_bytes_per_token(config, dtype=wanted.kv_dtype)
        sources = 4 * around.num_sources * config.hidden_size + around.num_draft_pages * around.block_size * of_draft
    return state_bytes_per_sequence(config, state_dtype=wanted.state_dtype).total + num_pending * pending + sources


def _what_does_not_fit(wanted: WantedSizes, num_tokens: int, kv_bytes: int, needed: int, available: int) -> str:
    lower = [f"max_num_seqs (now {wanted.max_num_seqs})"]
    if wanted.max_num_batched_tokens is not None:
        lower.append(f"max_num_batched_tokens ({num_tokens})")
    for name in ("num_blocks", "kv_budget_bytes"):
        if getattr(wanted, name) is not None:
            lower.append(f"{name} ({getattr(wanted, name)})")
    if wanted.num_checkpoints:
        lower.append(f"num_checkpoints ({wanted.num_checkpoints})")
    return (
        f"the engine needs {format_bytes(needed)} beside the weights, {format_bytes(kv_bytes)} of it for keys and "
        f"values, but {format_bytes(available)} of memory are free; lower {' or '.join(lower)}"
    )
