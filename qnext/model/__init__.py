"""The architecture on one device: CausalLM takes a Batch. It knows nothing of disk, engine or training.

Nouns: Batch and CacheView, the mixers, the feed-forwards, HoldsWeights. May import config, ops and planning. A new
mixer is a file beside delta_net.py and a case in DecoderLayer; its parameters join planning/parameters.py. Modules are
called. A fused op reads weights that `layers.fusable` gave. Wrappers and shards come from outside.
"""

from __future__ import annotations

from qnext.model.batch import Batch, CacheView, DeltaSlots, KVPages
from qnext.model.init import initialize
from qnext.model.moe import Experts, Router, RouterOutput, SparseMoE
from qnext.model.transformer import CausalLM, DecoderLayer, TrunkOutput
from qnext.model.weights import HoldsWeights, held_bytes, named_tensors, named_weights, residency_of

__all__ = [
    "Batch",
    "CacheView",
    "CausalLM",
    "DecoderLayer",
    "DeltaSlots",
    "Experts",
    "HoldsWeights",
    "KVPages",
    "Router",
    "RouterOutput",
    "SparseMoE",
    "TrunkOutput",
    "held_bytes",
    "initialize",
    "named_tensors",
    "named_weights",
    "residency_of",
]
