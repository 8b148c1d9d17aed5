"""Matrices of different dtypes: each is kept as it is stored, and the model computes as with all of them widened."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.checkpoint import load_model
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.model import Batch, CausalLM

from .folders import CONFIGS, rewrite, tiny_folder, tiny_model

Tensors = dict[str, Tensor]


def narrowed(folder: Path, dtype_of: Callable[[str], torch.dtype]) -> None:
    def change(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype_of(name))

    rewrite(folder, change)


def only(pattern: str, dtype: torch.dtype, other: torch.dtype = torch.bfloat16) -> Callable[[str], torch.dtype]:
    return lambda name: dtype if re.search(pattern, name) else other


MIXED = {
    "fp32 routers": only(r"\.mlp\.gate\.weight", torch.float32),
    "fp32 head": only("lm_head", torch.float32),
    "fp16 head": only("lm_head", torch.float16),
    "fp32 embedding": only("embed_tokens", torch.float32),
    "bf16 experts in fp32": only(r"\.experts\.", torch.bfloat16, torch.float32),
    "one expert in fp32": only(r"\.experts\.1\.up_proj", torch.float32),
    "attention in fp16": only("self_attn", torch.float16),
    "fp32 convolution and decay": only("conv1d|A_log|dt_bias", torch.float32),
    "drafter in fp32": only("^mtp", torch.float32),
}


@pytest.mark.parametrize("form", MIXED)
def test_each_matrix_keeps_its_dtype_and_the_model_computes(tmp_path: Path, form: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    narrowed(folder, MIXED[form])
    model, wide = load_model(folder), load_model(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        stored = MIXED[form](name)
        if form == "one expert in fp32" and name.endswith("experts.gate_up_proj"):
            stored = torch.float32  # a stack has one dtype, the widest of its parts
        assert parameter.dtype == stored, name
    batch = Batch.from_lengths(torch.arange(40), [15, 25])
    with torch.no_grad():
        logits, expected = (each.logits(each(batch).hidden_TD).float() for each in (model, wide))
    # bf16 has 8 bits, and a token that stands between two experts may go to the other.
    assert float((logits - expected).abs().mean()) < 0.01 * float(expected.abs().max())
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64))
    (done,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(done.output_ids) == 4


@pytest.mark.parametrize("name", ["next", "moe"])
def test_routers_that_are_stored_wider_stay_so_in_every_dtype(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "m", name)
    narrowed(folder, MIXED["fp32 routers"])
    for wanted in (None, torch.bfloat16, torch.float16, torch.float32):
        model = load_model(folder, dtype=wanted)
        routers = {key: value for key, value in model.named_parameters() if key.endswith(".mlp.gate.weight")}
        assert routers
        for key, router in routers.items():
            assert router.dtype == torch.float32
            assert torch.equal(router, tiny_model(name).get_parameter(key))
        assert model.model.embed_tokens.weight.dtype == (wanted or torch.bfloat16)


def test_routers_of_a_wide_checkpoint_become_what_is_asked_for(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path / "m"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_wide_router_chooses_by_its_last_bits(tmp_path: Path) -> None:
    """Two experts whose rows differ by less than bf16 shows, in the reference too."""
    model = CausalLM(CONFIGS["moe"].with_(num_experts=2, num_experts_per_tok=1)).to(torch.bfloat16)
    router = model.model.layers[0].mlp.gate
    router.weight.data = torch.ones(2, 40) * torch.tensor([[1.0], [1.0 + 2**-12]])
    with torch.no_grad():
        output = router(torch.ones(3, 40, dtype=torch.bfloat16))
    assert output.logits_TE.dtype == torch.float32
    assert output.routing.experts_TA.flatten().tolist() == [1, 1, 1]
