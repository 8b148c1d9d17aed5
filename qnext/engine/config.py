"""What can be chosen about an engine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from qnext.engine.execution.executor import AdapterSwitch
from qnext.engine.storage.tiers import DiskCache
from qnext.planning.plan import CHECKPOINT_INTERVAL, DEFAULT_SEQUENCES


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. None lets the engine choose, when the weights are loaded and nothing else is.

    The caches get their memory when the engine is made; what is left must hold the largest step. Sizes that are not
    given shrink until it does, and given ones that are too large raise DoesNotFit. docs/hybrid-cache.md tells how
    prefixes and memory are shared.
    """

    max_num_seqs: int = DEFAULT_SEQUENCES
    """Requests that run side by side."""

    max_num_batched_tokens: int | None = None
    """Tokens of a step at most; by default between 512 and 2,048, more where many experts share them."""

    max_model_len: int | None = None
    """Tokens of prompt and answer of a request together: by default the model's context, and never more than the cache
    holds."""

    num_blocks: int | None = None
    """KV memory in blocks of 16 tokens. Neither this nor `kv_budget_bytes`: what `max_num_seqs` requests of full length
    can use, at most half of the free memory."""

    kv_budget_bytes: int | None = None
    """KV memory in bytes, instead of `num_blocks`."""

    kv_dtype: torch.dtype | None = None
    """Of keys and values: the model's, if None. int8 has an fp32 scale per token and head."""

    state_dtype: torch.dtype = torch.float32
    """Of recurrent states: fp32, or bf16 for half the memory (docs/hybrid-cache.md tells what that changes)."""

    prefix_cache: bool = True
    """Requests of one salt share the prefixes that they have in common."""

    num_checkpoints: int | None = None
    """States of cached prefixes, from which others can go on, beside those of running requests; by default
    `max_num_seqs` and four more."""

    checkpoint_interval: int = CHECKPOINT_INTERVAL
    """A state is kept every so many tokens of a long prompt. 0: only where it is likely to be of use."""

    speculation: bool | None = None
    """The model's MTP layer drafts tokens, and the next step verifies them together; answers stay the same, token for
    token. By default where the model has such a layer."""

    max_draft_tokens: int | None = None
    """Drafted tokens of a request in a step at most: of these as many as make decoding faster. Without `speculation`,
    how many tokens whoever owns the engine may put into the drafts of a request."""

    disk_cache: DiskCache | None = None
    """Where cached prefixes go that memory is too short for, and where an engine of the same model and settings finds
    them again. An engine with a disk cache is to be closed; it is a context manager."""

    host_cache_bytes: int | None = None
    """The host's memory for such prefixes, before the disk; by default an eighth of what is free there on a GPU, else
    none."""

    eos_token_ids: Collection[int] | None = None
    """Tokens that end a request unless it says ignore_eos; by default those of the model's configuration."""

    count_experts: bool = True
    """Counts the tokens of each expert, for `Engine.expert_load`."""

    keep_routing: bool = False
    """Keeps the experts of every token beside its keys and values, 8 bytes each; a completion has those of its tokens,
    cached prefixes included."""

    record_steps: bool = True
    """Decoding steps are recorded, on a GPU as CUDA graphs, and repeated without Python. Answers are the same."""

    adapters: AdapterSwitch | None = None
    """Changes of the model by name, of which a request may choose one (lora.serving)."""

    poison: bool = False
    """Fills freed memory with NaN, for tests."""
