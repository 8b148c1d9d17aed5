"""Low-rank adapters (LoRA, arXiv 2106.09685): a small change of some matrices of a model, which alone is trained.

Nouns: LoraConfig (what to adapt), the adapted modules, Adapter (the factors by parameter name, apart from a model).
May import config, ops, planning and model. `checkpoint` reads, writes and merges adapters; `training` trains them. A
new kind of module to adapt is a class in `modules.py` and a case in `adapt.py`.
"""

from __future__ import annotations

from qnext.lora.adapt import Adapter, adapter_of, add_lora, attach, lora_parameters, merge, train_only
from qnext.lora.choice import choose_experts, count_routing
from qnext.lora.config import LoraConfig
from qnext.lora.report import LoraReport, describe_adapter

__all__ = [
    "Adapter",
    "LoraConfig",
    "LoraReport",
    "adapter_of",
    "add_lora",
    "attach",
    "choose_experts",
    "count_routing",
    "describe_adapter",
    "lora_parameters",
    "merge",
    "train_only",
]
