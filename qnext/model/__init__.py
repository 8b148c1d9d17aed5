"""The architecture on a single device. Takes packed batches; knows nothing of disk, engine or training."""

from __future__ import annotations

from qnext.model.batch import Batch, CacheView, DeltaSlots, KVPages
from qnext.model.init import initialize
from qnext.model.moe import Experts, Router, RouterOutput, SparseMoE
from qnext.model.transformer import CausalLM, DecoderLayer, TrunkOutput

__all__ = [
    "Batch",
    "CacheView",
    "CausalLM",
    "DecoderLayer",
    "DeltaSlots",
    "Experts",
    "KVPages",
    "Router",
    "RouterOutput",
    "SparseMoE",
    "TrunkOutput",
    "initialize",
]
