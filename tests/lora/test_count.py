"""The numbers of an adapter without making it: published arithmetic, and what is made."""

from __future__ import annotations

from math import prod

import pytest
import torch

from qnext.config import preset
from qnext.lora import LoraConfig, add_lora, lora_parameters
from qnext.lora.config import ROUTED
from qnext.model import CausalLM
from qnext.planning import list_parameters


def test_of_a_rank_of_the_released_model() -> None:
    """All experts 138.4 M a rank, 37.9 M with shared outer factors; attention and Gated DeltaNet 1.0 M."""
    config = preset("80b-a3b").with_(num_nextn_predict_layers=0)
    routed = sum(prod(info.shape) for info in list_parameters(config).values() if info.kind in ROUTED)
    assert routed == 77_309_411_328
    mixers = LoraConfig(targets="attention", rank=1).num_parameters(config)
    assert mixers / 1e6 == pytest.approx(1.05, abs=0.05)
    none = dict.fromkeys(range(48), ())
    others = LoraConfig(targets="experts", rank=1, experts=none, shares_outer=False).num_parameters(config)
    own = LoraConfig(targets="experts", rank=1, shares_outer=False).num_parameters(config) - others
    shared = LoraConfig(targets="experts", rank=1).num_parameters(config) - others
    assert (round(own / 1e6, 1), round(shared / 1e6, 1)) == (138.4, 37.9)


@pytest.mark.parametrize(
    "wanted",
    [
        LoraConfig(rank=3),
        LoraConfig(rank=200, targets="experts", shares_outer=False),
        LoraConfig(rank=2, targets="attention", mtp=False),
        LoraConfig(rank=4, targets="experts", experts={0: (1, 5), 2: (0,)}, router=True),
    ],
)
def test_as_many_as_are_made(wanted: LoraConfig) -> None:
    config = preset("nano-5m")
    model = CausalLM(config)
    add_lora(model, wanted)
    made = sum(parameter.numel() for parameter in lora_parameters(model).values())
    assert wanted.num_parameters(config) == made
    assert made and torch.is_grad_enabled()
