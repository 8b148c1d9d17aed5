"""From a model and options to the parts of an engine that runs in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qnext.engine.config import EngineConfig
from qnext.engine.drafter import Drafter
from qnext.engine.execution.cache import BLOCK_SIZE, Cache, CacheDtypes, CacheSizes, prompt_grid
from qnext.engine.execution.expert_load import ExpertCounter
from qnext.engine.execution.local import LocalExecutor
from qnext.engine.policy.scheduler import Scheduler
from qnext.engine.policy.step import EngineLimits
from qnext.engine.sizes import choose_sizes, wanted_sizes
from qnext.engine.storage.tiers import make_tiers
from qnext.model import CausalLM
from qnext.ops import backend_of, caches_keep_bits
from qnext.planning.plan import Sizes, WantedSizes


class Parts(NamedTuple):
    executor: LocalExecutor
    scheduler: Scheduler
    drafter: Drafter | None
    max_model_len: int


class WithoutDrafter(NamedTuple):
    """All but the drafter, which may draft by another executor around this one."""

    executor: LocalExecutor
    scheduler: Scheduler
    wanted: WantedSizes
    max_model_len: int


def make_parts(model: CausalLM, config: EngineConfig) -> Parts:
    """Raises UsageError and DoesNotFit as Engine.of."""
    executor, scheduler, wanted, max_model_len = build(model, config, choose_sizes)
    drafter = Drafter(executor, max_draft_tokens=wanted.max_draft_tokens) if wanted.has_drafter else None
    return Parts(executor, scheduler, drafter, max_model_len)


def build(model: CausalLM, config: EngineConfig, choose: Callable[[CausalLM, WantedSizes], Sizes]) -> WithoutDrafter:
    """`choose` decides the sizes that are not given. Raises what it raises, and UsageError."""
    wanted = wanted_sizes(model, config)
    sizes = choose(model, wanted)
    num_draft_tokens = wanted.max_draft_tokens + 1 if wanted.max_draft_tokens else 0
    dtypes = CacheDtypes(activations=model.dtype, kv=config.kv_dtype or model.dtype, states=config.state_dtype)
    keeps_bits = model.is_cut_invariant and caches_keep_bits(dtypes.kv, num_draft_tokens)
    grid = prompt_grid(dtypes.states, is_cut_invariant=keeps_bits)
    limits = _limits(model, config, wanted, sizes, grid)
    counts_experts = config.count_experts and model.config.num_experts > 0
    experts = ExpertCounter(model.config, model.device) if counts_experts else None
    cache = Cache(
        model.config,
        CacheSizes(
            num_blocks=sizes.num_blocks,
            num_slots=sizes.num_slots,
            max_model_len=sizes.max_model_len,
            num_draft_tokens=num_draft_tokens,
            has_drafter=wanted.has_drafter,
            keeps_routing=config.keep_routing,
            has_spare=backend_of(model.device).pads_recordings,
        ),
        dtypes,
        device=model.device,
        poison=config.poison,
        expert_load=None if experts is None else experts.of_layer,
    )
    tiers = make_tiers(model, cache, config.prefix_cache, config.disk_cache, config.host_cache_bytes)
    executor = LocalExecutor(
        model, cache, store=tiers, experts=experts, adapters=config.adapters, workspace_bytes=sizes.workspace_bytes
    )
    executor.watch.may_record = config.record_steps
    return WithoutDrafter(executor, Scheduler(limits, tiers), wanted, sizes.max_model_len)


def _limits(model: CausalLM, config: EngineConfig, wanted: WantedSizes, sizes: Sizes, grid: int) -> EngineLimits:
    return EngineLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        block_size=BLOCK_SIZE,
        num_blocks=sizes.num_blocks or None,
        num_slots=sizes.num_slots,
        chunk_size=grid,
        has_states=model.config.num_linear_layers > 0,
        has_prefix_cache=config.prefix_cache,
        checkpoint_interval=config.checkpoint_interval,
        max_draft_tokens=wanted.max_draft_tokens,
    )
