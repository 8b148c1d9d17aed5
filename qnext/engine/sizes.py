"""The sizes of an engine, chosen so that weights, caches and the largest step fit the memory together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qnext.config import ModelConfig
from qnext.engine.cache import BLOCK_SIZE, NUM_DRAFT_PAGES, NUM_SOURCES, STATE_DTYPES
from qnext.engine.memory import available_bytes, format_bytes
from qnext.engine.recorded import largest_recordings
from qnext.errors import DoesNotFit, UsageError
from qnext.model import CausalLM
from qnext.ops import DELTA_CHUNK_SIZE, is_native
from qnext.planning import StepSizes, kv_bytes_per_token, recorded_bytes, state_bytes_per_sequence, step_bytes

_SPARE_CHECKPOINTS = 4
_REFERENCE_FACTOR = 2  # torch's operations make several tensors where a kernel makes none
_POLICY_BYTES = 128  # per token of the cache: ids, the trie of blocks, page numbers


@dataclass(frozen=True)
class WantedSizes:
    """What the caller of an engine asks for; None is chosen here. See Engine for the meaning of each."""

    max_num_seqs: int
    max_num_batched_tokens: int | None
    max_model_len: int | None
    num_blocks: int | None
    kv_budget_bytes: int | None
    kv_dtype: torch.dtype
    state_dtype: torch.dtype
    has_prefix_cache: bool
    num_checkpoints: int | None
    max_draft_tokens: int
    has_drafter: bool


@dataclass(frozen=True)
class Sizes:
    """What an engine allocates. `workspace_bytes` bounds what steps take beside weights and caches."""

    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    num_slots: int
    workspace_bytes: int


def checked_model_len(config: ModelConfig, wanted: int | None) -> int:
    """Tokens of a request in all: what is wanted, or the model's context. Raises UsageError beyond it."""
    length = config.context_length if wanted is None else wanted
    if not 2 <= length <= config.context_length:
        raise UsageError(
            f"max_model_len must be between 2 and the model's context of {config.context_length}, not {length}"
        )
    return length


def wants_drafter(wanted: bool | None, *, has_layer: bool) -> bool:
    """Whether the MTP layer drafts: as is wanted, or where the model has one. Raises UsageError where it has none."""
    if wanted and not has_layer:
        raise UsageError("the model has no layer for multi-token prediction, so it cannot speculate")
    return has_layer if wanted is None else wanted


def choose_sizes(model: CausalLM, wanted: WantedSizes) -> Sizes:
    """Sizes that fit the memory that is free now, when the weights are loaded but nothing else is.

    What the caller has not fixed shrinks until it fits: first the step and the cached states, then the blocks. Raises
    UsageError for contradictory or impossible sizes, DoesNotFit where the smallest that are allowed do not fit.
    """
    config = model.config
    if wanted.state_dtype not in STATE_DTYPES:
        raise UsageError(f"states are kept in float32 or bfloat16, not in {wanted.state_dtype}")
    max_model_len = checked_model_len(config, wanted.max_model_len)
    if wanted.num_blocks is not None and wanted.kv_budget_bytes is not None:
        raise UsageError("give num_blocks or kv_budget_bytes, not both")
    block_bytes = BLOCK_SIZE * kv_bytes_per_token(config, dtype=str(wanted.kv_dtype).removeprefix("torch."))
    if block_bytes and wanted.kv_budget_bytes is not None and wanted.kv_budget_bytes < block_bytes:
        raise UsageError(f"the KV cache needs at least one block of {block_bytes} bytes")
    available = available_bytes(model.device)
    whole_bytes = block_bytes + BLOCK_SIZE * _POLICY_BYTES
    length = -(-max_model_len // BLOCK_SIZE)
    most = min(max(1, wanted.max_num_seqs) * length, available // 2 // whole_bytes)
    is_automatic = wanted.num_blocks is None and wanted.kv_budget_bytes is None
    for num_tokens, num_checkpoints in _steps_down(config, wanted):
        num_slots = wanted.max_num_seqs + num_checkpoints
        fixed = _step_workspace(model, wanted, num_tokens, max_model_len)
        fixed += num_slots * (_state_bytes(config, wanted) + 8 * length)
        if wanted.num_blocks is not None:
            num_blocks = wanted.num_blocks
        elif wanted.kv_budget_bytes is not None:
            num_blocks = min(max(1, wanted.max_num_seqs) * length, wanted.kv_budget_bytes // max(1, block_bytes))
        else:
            num_blocks = max(1, min(most, (available - fixed) // whole_bytes))
        if not block_bytes:
            num_blocks = 0
        needed = fixed + num_blocks * whole_bytes
        # What nobody has fixed makes room for one sequence of full length.
        if needed <= available and (not is_automatic or num_blocks >= min(length, most) or not block_bytes):
            break
    if needed > available:
        raise DoesNotFit(_what_does_not_fit(wanted, num_tokens, num_blocks * block_bytes, needed, available))
    if num_blocks < 1 and block_bytes:
        raise UsageError(f"the KV cache needs at least one block of {block_bytes} bytes")
    if block_bytes:
        max_model_len = min(max_model_len, num_blocks * BLOCK_SIZE)  # a cache smaller than the context is the context
    workspace = _step_workspace(model, wanted, num_tokens, max_model_len) + num_blocks * BLOCK_SIZE * _POLICY_BYTES
    return Sizes(num_tokens, max_model_len, num_blocks, num_slots, workspace)


def _steps_down(config: ModelConfig, wanted: WantedSizes) -> Iterator[tuple[int, int]]:
    """Tokens of a step and states of cached prefixes, from what is best to the least that is allowed."""
    most_tokens = wanted.max_num_batched_tokens or _default_batched_tokens(config, wanted.max_num_seqs)
    least_tokens = wanted.max_num_batched_tokens or wanted.max_num_seqs - 1 + DELTA_CHUNK_SIZE
    most_states = wanted.max_num_seqs + _SPARE_CHECKPOINTS if wanted.num_checkpoints is None else wanted.num_checkpoints
    least_states = 0 if wanted.num_checkpoints is None else most_states
    if not (wanted.has_prefix_cache and config.num_linear_layers):
        most_states = least_states = 0
    yield most_tokens, most_states
    middle_tokens = max(least_tokens, min(most_tokens, 512))
    yield middle_tokens, most_states
    yield middle_tokens, min(most_states, least_states + _SPARE_CHECKPOINTS)
    yield least_tokens, least_states


def _default_batched_tokens(config: ModelConfig, max_num_seqs: int) -> int:
    """So many that each expert of a layer sees some forty rows on average, and its weights are read for those."""
    wanted = 40 * config.num_experts // max(1, config.num_experts_per_tok)
    return max(512, min(2048, wanted), max_num_seqs - 1 + DELTA_CHUNK_SIZE)


def _step_workspace(model: CausalLM, wanted: WantedSizes, num_tokens: int, max_model_len: int) -> int:
    """Bytes of the largest step and of all recorded ones."""
    config, drafts = model.config, 1 + wanted.max_draft_tokens
    num_rows = min(num_tokens, wanted.max_num_seqs * drafts)
    step = step_bytes(
        config, StepSizes(num_tokens, num_rows, wanted.max_num_seqs, max_model_len),
        num_threads=torch.get_num_threads(),
    )  # fmt: skip
    if not is_native(model.device):
        return _REFERENCE_FACTOR * step + 2 * kv_bytes_per_token(config, dtype="float32") * max_model_len
    recorded = largest_recordings(wanted.max_num_seqs, wanted.max_draft_tokens)
    tables = 8 * wanted.max_num_seqs * (max_model_len // BLOCK_SIZE + 1)
    num_kinds = 2 if wanted.has_drafter else 1  # passes of the MTP layer are recorded as well
    return step + num_kinds * sum(recorded_bytes(config, count) + tables for count in recorded)


def _state_bytes(config: ModelConfig, wanted: WantedSizes) -> int:
    """Bytes of one slot: the states, and the pending tokens of drafts."""
    per_token = config.linear_conv_dim + config.linear_key_dim + config.linear_value_dim + config.linear_num_value_heads
    pending = 4 * (per_token if config.num_linear_layers else 0) * config.num_linear_layers
    num_pending = wanted.max_draft_tokens + 1 if wanted.max_draft_tokens else 0
    dtype = str(wanted.state_dtype).removeprefix("torch.")
    sources = 0
    if wanted.has_drafter:
        of_all = kv_bytes_per_token(config, dtype=str(wanted.kv_dtype).removeprefix("torch."), with_mtp=True)
        of_trunk = kv_bytes_per_token(config, dtype=str(wanted.kv_dtype).removeprefix("torch."))
        sources = 4 * NUM_SOURCES * config.hidden_size + NUM_DRAFT_PAGES * BLOCK_SIZE * (of_all - of_trunk)
    return state_bytes_per_sequence(config, state_dtype=dtype).total + num_pending * pending + sources


def _what_does_not_fit(wanted: WantedSizes, num_tokens: int, kv_bytes: int, needed: int, available: int) -> str:
    lower = [f"max_num_seqs (now {wanted.max_num_seqs})"]
    if wanted.max_num_batched_tokens is not None:
        lower.append(f"max_num_batched_tokens ({num_tokens})")
    if wanted.num_blocks is not None:
        lower.append(f"num_blocks ({wanted.num_blocks})")
    if wanted.kv_budget_bytes is not None:
        lower.append(f"kv_budget_bytes ({wanted.kv_budget_bytes})")
    if wanted.num_checkpoints:
        lower.append(f"num_checkpoints ({wanted.num_checkpoints})")
    return (
        f"the engine needs {format_bytes(needed)} beside the weights, {format_bytes(kv_bytes)} of it for keys and "
        f"values, but {format_bytes(available)} of memory are free; lower {' or '.join(lower)}"
    )
