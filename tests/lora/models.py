"""A tiny model with every kind of module, and adapters whose factors are all random."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qnext import ops
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION
from qnext.lora import LoraConfig, add_lora, lora_parameters
from qnext.model import CausalLM
from tests.model.models import PEER_CONFIGS, random_tokens

NAME = "next, sizes of the native kernels"
SHAPE = {"layer_types": (LINEAR_ATTENTION, FULL_ATTENTION), "num_nextn_predict_layers": 1}
CONFIG = replace(PEER_CONFIGS[NAME], **SHAPE)  # type: ignore[arg-type]
EXPERTS = {0: (1, 4, 6), 1: (0,), 2: (2, 3)}

LORAS = {
    "all, shared outer": LoraConfig("all", router=True),
    "all, own factors": LoraConfig("all", shares_outer=False, rank=4, alpha=2.0),
    "attention": LoraConfig("attention", rank=5),
    "some experts, shared outer": LoraConfig("experts", experts=EXPERTS, rank=3),
    "some experts, own factors": LoraConfig("experts", experts=EXPERTS, shares_outer=False, rank=3),
}


def with_random_lora(model: CausalLM, config: LoraConfig) -> CausalLM:
    add_lora(model, config)
    for i, parameter in enumerate(lora_parameters(model).values()):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def outputs_of(model: CausalLM, *, num_tokens: int = 24) -> Tensor:
    """Logits of the trunk and of the MTP layer, two documents packed."""
    from qnext.model import Batch

    tokens_T = random_tokens(model.config, num_tokens + 1)
    batch = Batch.from_lengths(tokens_T[:-1], [num_tokens - 7, 7])
    trunk = model(batch)
    rows = [trunk.hidden_TD, model.draft_hidden(tokens_T[1:], trunk, batch)]
    return torch.cat([model.logits(each) for each in rows])


def weights_of(model: CausalLM) -> dict[str, Tensor]:
    """The numbers of all weights by the name of their parameter, in fp64."""
    from qnext.planning import list_parameters

    found = {}
    for name in list_parameters(model.config):
        path, _, key = name.rpartition(".")
        found[name] = ops.dequantize(getattr(model.get_submodule(path), key), torch.float32).detach().double()
    return found
