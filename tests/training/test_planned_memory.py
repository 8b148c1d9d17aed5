"""What `qnext plan --train` says of memory, against what autograd keeps."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qnext.config import ModelConfig, preset
from qnext.model import CausalLM, initialize
from qnext.ops import backend_of
from qnext.planning.training_plan import activation_numbers
from qnext.training import NextToken
from qnext.training.data import DocumentRows, pack
from qnext.training.losses import RouterTap
from qnext.training.objective import TrainStep

DENSE = {"num_experts": 0, "intermediate_size": 96, "shared_expert_intermediate_size": 0}


@pytest.mark.skipif(not backend_of(torch.device("cpu")).fuses_gradients, reason="of the native kernels of training")
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_nextn_predict_layers": 0}, {"attention_output_gate": False}, DENSE],
    ids=["hybrid", "without MTP", "without gate", "dense"],
)
def test_planned_activations_are_the_tensors_that_autograd_keeps(changes: dict[str, Any]) -> None:
    """All saved tensors that are no parameters, of 128 tokens more: what does not grow with the tokens drops out."""
    config = replace(preset("nano-5m"), vocab_size=512, **changes)
    grown = _kept_bytes(config, 256) - _kept_bytes(config, 128)
    assert grown // (4 * 128) == activation_numbers(config, recomputes=False, is_fused=True)


def _kept_bytes(config: ModelConfig, num_tokens: int) -> int:
    model = CausalLM(config)
    initialize(model, seed=0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    document = np.arange(num_tokens + 1, dtype=np.int32) % config.vocab_size
    batch = pack([DocumentRows(document, start, start + 64) for start in range(0, num_tokens, 64)])
    objective = NextToken(balance=0.01, z=1e-3, mtp=0.1 if config.num_nextn_predict_layers else 0.0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), closing(RouterTap(model)) as tap:
        objective(model, batch, TrainStep([batch], 0.5, tap))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
