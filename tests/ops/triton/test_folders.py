"""Folders of codes for GPU kernels, run by an engine: weights stay codes, and answers are those of their numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.quantize import quantize_folder
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.model import CausalLM, held_bytes, initialize, named_weights
from qnext.ops import Fp8Weight, QuantizedWeight
from qnext.ops import triton as gpu
from qnext.quant.float_formats import to_fp8
from qnext.quant.scheme import make_policy
from tests.checkpoint.folders import edit_config, rewrite
from tests.engine.models import tiny_model

from .device import DEVICE

PARAMS = SamplingParams(max_tokens=2, ignore_eos=True, logprobs=0, prompt_logprobs=0)
PROMPTS = [[5, 9, 2], [44, 1, 30, 17, 8, 21, 3, 3, 60, 12]]
# Logarithms of probabilities: sums of fp32 numbers in another order, through two layers. A GPU multiplies three TF32
# parts of each number, and knows exponentials to 2e-7.
TOLERANCE = 2e-4 if DEVICE.type == "cpu" else 1e-3


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(
        tiny_model("hybrid").config,
        layer_types=("linear_attention", "full_attention"),
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        num_experts=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    model = CausalLM(config)
    initialize(model, seed=2)
    folder = tmp_path_factory.mktemp("plain") / "m"
    save_model(model, folder, dtype=torch.float32)
    return folder


def in_fp8(folder: Path) -> None:
    """Turn it into the released form, with blocks of 32."""

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight") or ".in_proj_qkvz" in name]:
            codes, scales = to_fp8(
                tensors[name], block=(32, 32), code_dtype=torch.float8_e4m3fn, scale_dtype=torch.float32
            )
            tensors[name], tensors[f"{name}_scale_inv"] = codes, scales

    rewrite(folder, pack)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})


def answers(model: CausalLM) -> tuple[list[tuple[int, ...]], Tensor]:
    """Greedy tokens of two prompts side by side, and all log-probabilities."""
    config = EngineConfig(max_num_seqs=2, max_model_len=64, prefix_cache=False)
    with Engine.of(model, config) as engine:
        found = engine.generate(PROMPTS, PARAMS)
    scores = [token.logprob for each in found for token in (*each.prompt_sampled[1:], *each.sampled)]
    return [each.output_ids for each in found], torch.tensor(scores)


@pytest.mark.parametrize(("form", "kind"), [("int4", QuantizedWeight), ("fp8", Fp8Weight)])
def test_a_folder_of_codes_answers_as_its_numbers_do(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, kind: type
) -> None:
    folder = tmp_path / "m"
    if form == "int4":
        quantize_folder(plain, folder, policy=make_policy("int4-g32", head="keep", is_tied=False), is_calibrated=False)
    else:
        save_model(load_model(plain), folder, dtype=torch.float32)
        in_fp8(folder)
    model = load_model(folder, device=DEVICE)
    weights = dict(named_weights(model))
    assert {type(weight) for weight in weights.values()} == {kind}
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_proj.weight"} < weights.keys()
    numbers = load_model(folder, dequantize=True, dtype=torch.float32)
    assert held_bytes(model) < held_bytes(numbers)
    tokens, scores = answers(model)
    with monkeypatch.context() as patch:
        for name in (name for name in dir(gpu) if name.startswith("serves_")):
            patch.setattr(gpu, name, lambda *args, **kwargs: False)
        wanted_tokens, wanted = answers(numbers)
    assert tokens == wanted_tokens
    assert (scores - wanted).abs().max() < TOLERANCE
    moved = load_model(folder, device=DEVICE)
    moved.load_state_dict(model.state_dict())
    moved.to("meta")
    assert all(tensor.is_meta for _, weight in named_weights(moved) for tensor in weight.tensors)
