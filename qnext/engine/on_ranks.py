"""An engine whose model is spread over several ranks, each of which has loaded its part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial

from qnext.engine.assembly import build
from qnext.engine.config import EngineConfig
from qnext.engine.drafter import Drafter
from qnext.engine.engine import Engine
from qnext.engine.execution.ranks import Ranks, RanksExecutor, follow
from qnext.engine.sizes import choose_sizes
from qnext.errors import DoesNotFit, LostRank, QnextError, UsageError
from qnext.model import CausalLM, residency_of
from qnext.planning.plan import Sizes, WantedSizes


def engine_on_ranks(
    model: CausalLM, config: EngineConfig, ranks: Ranks, *, at_end: Callable[[bool], None] = lambda is_heard: None
) -> Engine:
    """In the first rank, when all have loaded their part. The others call `follow_engine` with the same options.
    `at_end` is called when the engine is closed, with whether the others know it. Raises the errors of Engine.of, and
    UsageError for what ranks do not have."""
    executor, scheduler, wanted, max_model_len = build(model, _checked(config), partial(_agree, ranks))
    everywhere = RanksExecutor(executor, ranks, at_end, may_fault=_may_fault(ranks, model))
    drafter = Drafter(everywhere, max_draft_tokens=wanted.max_draft_tokens) if wanted.has_drafter else None
    return Engine(
        everywhere, scheduler, max_model_len=max_model_len, drafter=drafter, eos_token_ids=config.eos_token_ids
    )


def follow_engine(model: CausalLM, config: EngineConfig, ranks: Ranks) -> None:
    """Run the plans of the engine in the first rank until it is closed. Raises as engine_on_ranks does."""
    own = build(model, replace(_checked(config), count_experts=False), partial(_agree, ranks)).executor
    follow(own, ranks, may_fault=_may_fault(ranks, model))


def check_on_ranks(config: EngineConfig) -> None:
    """Raises UsageError for what an engine on ranks does not have."""
    if config.disk_cache is not None or config.host_cache_bytes:
        raise UsageError("on several ranks prefixes stay in the memory of each rank: no disk cache and no host cache")
    if config.adapters is not None:
        raise UsageError("adapters are not served on several ranks; `qnext merge` makes one a part of the model")


def _checked(config: EngineConfig) -> EngineConfig:
    check_on_ranks(config)
    return replace(config, host_cache_bytes=0)


def _may_fault(ranks: Ranks, model: CausalLM) -> bool:
    """Whether a rank, which may be another one, reads experts from a disk while it computes."""
    return ranks.least([int(residency_of(model) is None)]) == [0]


def _agree(ranks: Ranks, model: CausalLM, wanted: WantedSizes) -> Sizes:
    """The least of what each rank has room for. Where one has none, all of them raise an error."""
    mine, failure = Sizes(0, 0, 0, 0, 0), None
    try:
        mine = choose_sizes(model, wanted, num_sharing=ranks.num_local)
    except QnextError as error:
        failure = error
    least = Sizes(*ranks.least(astuple(mine)))
    if failure is not None:
        raise failure
    if not least.max_model_len:
        raise LostRank.because("another rank has no room for the engine", DoesNotFit.exit_code)
    return replace(least, workspace_bytes=mine.workspace_bytes)
