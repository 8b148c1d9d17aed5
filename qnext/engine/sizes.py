"""The sizes of an engine: planning chooses them from its options and from what its backend and device offer."""

from __future__ import annotations

import torch

from qnext.engine.config import EngineConfig
from qnext.engine.execution.cache import BLOCK_SIZE, NUM_DRAFT_PAGES, NUM_SOURCES, STATE_DTYPES
from qnext.engine.execution.recorded import largest_recordings
from qnext.engine.memory import free_bytes
from qnext.errors import UsageError
from qnext.model import CausalLM, residency_of
from qnext.ops import DELTA_CHUNK_SIZE, backend_of
from qnext.planning.plan import Sizes, Surroundings, WantedSizes, plan_engine

DEFAULT_DRAFT_TOKENS = 3


def wants_drafter(wanted: bool | None, *, has_layer: bool) -> bool:
    """Whether the MTP layer drafts: as is wanted, or where the model has one. Raises UsageError where it has none."""
    if wanted and not has_layer:
        raise UsageError("the model has no layer for multi-token prediction, so it cannot speculate")
    return has_layer if wanted is None else wanted


def wanted_sizes(model: CausalLM, config: EngineConfig) -> WantedSizes:
    """With what a model decides where the options do not. Raises UsageError for drafts or states that cannot be."""
    has_drafter = wants_drafter(config.speculation, has_layer=model.mtp is not None)
    max_draft_tokens = config.max_draft_tokens
    if max_draft_tokens is None:
        max_draft_tokens = DEFAULT_DRAFT_TOKENS if has_drafter else 0
    if has_drafter and max_draft_tokens < 1:
        raise UsageError(f"max_draft_tokens must be at least 1 to speculate, not {max_draft_tokens}")
    if config.state_dtype not in STATE_DTYPES:
        raise UsageError(f"states are kept in float32 or bfloat16, not in {config.state_dtype}")
    num_sparse = sum(map(model.config.is_moe_layer, range(model.config.num_hidden_layers)))
    if config.keep_routing and (not num_sparse or model.config.num_linear_layers == model.config.num_hidden_layers):
        raise UsageError("keep_routing needs routers, and a layer of full attention, whose blocks keep the choice")
    return WantedSizes(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        num_blocks=config.num_blocks,
        kv_budget_bytes=config.kv_budget_bytes,
        kv_dtype=_name(config.kv_dtype or model.dtype),
        state_dtype=_name(config.state_dtype),
        has_prefix_cache=config.prefix_cache,
        num_checkpoints=config.num_checkpoints,
        max_draft_tokens=max_draft_tokens,
        has_drafter=has_drafter,
        streams_experts=residency_of(model) is not None,
        routing_bytes=8 * num_sparse * model.config.num_experts_per_tok if config.keep_routing else 0,
    )


def choose_sizes(model: CausalLM, wanted: WantedSizes, *, num_sharing: int = 1) -> Sizes:
    """Those of `plan_engine`, when the weights are loaded and nothing else is, in a part of the host's memory that
    `num_sharing` processes share. Raises UsageError and DoesNotFit."""
    backend = backend_of(model.device)
    recorded = largest_recordings(
        wanted.max_num_seqs,
        wanted.max_draft_tokens,
        max_tokens=backend.max_recorded_tokens,
        is_padded=backend.pads_recordings,
    )
    around = Surroundings(
        available_bytes=free_bytes(model.device) // (num_sharing if model.device.type == "cpu" else 1),
        num_threads=torch.get_num_threads(),
        workspace_factor=backend.workspace_factor,
        copies_context=backend.copies_context,
        recorded=tuple(recorded),
        block_size=BLOCK_SIZE,
        chunk_size=DELTA_CHUNK_SIZE,
        num_sources=NUM_SOURCES,
        num_draft_pages=NUM_DRAFT_PAGES,
        num_spare=int(backend.pads_recordings),
    )
    return plan_engine(model.config, wanted, around)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
