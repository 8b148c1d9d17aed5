"""Token ids in, token ids out. An engine is given a model and never loads one.

`policy` decides with integers what runs, `sampling` turns logits into tokens, `execution` runs plans on tensors,
`storage` keeps prefixes beyond the device's memory: each imports only those before it. `engine.py` is the loop.

Names are imported when first used: what compiles grammars in a process of its own needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.lazy import lazy_names

if TYPE_CHECKING:
    from qnext.engine.config import EngineConfig
    from qnext.engine.early import check_options
    from qnext.engine.engine import Engine
    from qnext.engine.execution.expert_load import ExpertCounts, ExpertLoad, LayerLoad
    from qnext.engine.execution.expert_reads import ExpertReads
    from qnext.engine.memory import MemoryPlan
    from qnext.engine.metrics import EngineMetrics, FinishCounts, Gauges, Histogram
    from qnext.engine.policy.completion import Completion
    from qnext.engine.policy.params import SamplingParams
    from qnext.engine.policy.request import FinishReason, Request, SampledToken
    from qnext.engine.policy.step import EndEvent, TokenEvent
    from qnext.engine.probing import glance_at, probed
    from qnext.engine.storage.tiers import DiskCache
    from qnext.probe import Glance

__all__ = [
    "Completion",
    "DiskCache",
    "EndEvent",
    "Engine",
    "EngineConfig",
    "EngineMetrics",
    "ExpertCounts",
    "ExpertLoad",
    "ExpertReads",
    "FinishCounts",
    "FinishReason",
    "Gauges",
    "Glance",
    "Histogram",
    "LayerLoad",
    "MemoryPlan",
    "Request",
    "SampledToken",
    "SamplingParams",
    "TokenEvent",
    "check_options",
    "glance_at",
    "probed",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Completion": "policy.completion",
        "DiskCache": "storage.tiers",
        "EndEvent": "policy.step",
        "Engine": "engine",
        "EngineConfig": "config",
        "EngineMetrics": "metrics",
        "ExpertCounts": "execution.expert_load",
        "ExpertLoad": "execution.expert_load",
        "ExpertReads": "execution.expert_reads",
        "FinishCounts": "metrics",
        "FinishReason": "policy.request",
        "Gauges": "metrics",
        "Glance": "probing",
        "Histogram": "metrics",
        "LayerLoad": "execution.expert_load",
        "MemoryPlan": "memory",
        "Request": "policy.request",
        "SampledToken": "policy.request",
        "SamplingParams": "policy.params",
        "TokenEvent": "policy.step",
        "check_options": "early",
        "glance_at": "probing",
        "probed": "probing",
    },
)
