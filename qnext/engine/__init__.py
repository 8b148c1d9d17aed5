"""Token ids in, token ids out: requests, scheduling, cache, sampling. Is given a model and never loads one."""

from __future__ import annotations

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
