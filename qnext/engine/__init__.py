"""Token ids in, token ids out: requests, scheduling, cache, sampling. Is given a model and never loads one.

Names are imported when first used: what compiles grammars in a process of its own needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnext.engine.completion import Completion
    from qnext.engine.early import check_options
    from qnext.engine.engine import Engine
    from qnext.engine.expert_load import ExpertCounts, ExpertLoad, LayerLoad
    from qnext.engine.memory import MemoryPlan
    from qnext.engine.metrics import EngineMetrics, FinishCounts, Gauges, Histogram
    from qnext.engine.params import SamplingParams
    from qnext.engine.request import FinishReason, Request, SampledToken
    from qnext.engine.step import EndEvent, TokenEvent
    from qnext.engine.storage.tiers import DiskCache

__all__ = [
    "Completion",
    "DiskCache",
    "EndEvent",
    "Engine",
    "EngineMetrics",
    "ExpertCounts",
    "ExpertLoad",
    "FinishCounts",
    "FinishReason",
    "Gauges",
    "Histogram",
    "LayerLoad",
    "MemoryPlan",
    "Request",
    "SampledToken",
    "SamplingParams",
    "TokenEvent",
    "check_options",
]

_HOME = {
    "Completion": "completion",
    "DiskCache": "storage.tiers",
    "EndEvent": "step",
    "Engine": "engine",
    "EngineMetrics": "metrics",
    "ExpertCounts": "expert_load",
    "ExpertLoad": "expert_load",
    "FinishCounts": "metrics",
    "FinishReason": "request",
    "Gauges": "metrics",
    "Histogram": "metrics",
    "LayerLoad": "expert_load",
    "MemoryPlan": "memory",
    "Request": "request",
    "SampledToken": "request",
    "SamplingParams": "params",
    "TokenEvent": "step",
    "check_options": "early",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
