"""Operations by part: published arithmetic, and what the real model computes."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from qnext.config import ModelConfig, preset
from qnext.model import Batch, CausalLM, initialize
from qnext.model.layers import Linear
from qnext.planning import (
    count_active,
    count_parameters,
    distinct_experts,
    forward_flops_per_token,
    prefill_flops,
    token_flops,
    training_compute_ratio,
    training_flops,
)
from qnext.planning.flops import DeltaForm
from tests.planning.test_counts import CONFIGS

RELEASED = preset("80b-a3b")


def test_the_released_model_by_part() -> None:
    """Of a layer, in MFLOP: projections 67.4 and 54.5, delta core 3.67 and 5.85, attention core 33.6 at 2,048 tokens,
    MoE 71.3; the head 622 once."""
    found, chunked = token_flops(RELEASED, context=2048), token_flops(RELEASED, context=2048, form="chunked")
    assert found.delta_projections == 36 * 67_436_544
    assert found.delta_core == 36 * 7 * 32 * 128 * 128
    assert chunked.delta_core == pytest.approx(36 * 5_854_549, abs=36)
    assert found.attention_projections == 12 * 54_525_952
    assert found.attention_core == 12 * 33_554_432
    assert found.router + found.experts + found.shared_experts == 48 * 71_307_264
    assert found.head == 2 * 2048 * 151_936
    assert found.mtp == 0 and found.dense_mlp == 0


@pytest.mark.parametrize(
    ("context", "without_mtp", "with_mtp"),
    [(4097 / 2, 7.74, 8.54), (32769 / 2, 10.56, 11.59), (131_072, 33.1, 36.0), (262_144, 58.9, 63.9)],
)
def test_the_released_model_in_all(context: float, without_mtp: float, with_mtp: float) -> None:
    """GFLOP of a token, with the delta rule in chunks: training at 4K and 32K, decoding after 131K and 262K."""
    digits = 2 if context < 1e5 else 1
    for expected, has_mtp in ((without_mtp, False), (with_mtp, True)):
        found = token_flops(RELEASED, context=context, form="chunked", with_mtp=has_mtp).total
        assert round(found / 1e9, digits) == expected


@pytest.mark.parametrize(("length", "giga"), [(4096, 0.4), (32768, 3.2), (131_072, 12.9), (262_144, 25.8)])
def test_attention_of_a_prompt(length: int, giga: float) -> None:
    found = prefill_flops(RELEASED, length)
    assert round(found.attention_core / length / 1e9, 1) == giga
    assert round((found.without_head - found.cores) / length / 1e9, 1) == 6.5
    assert found.head == token_flops(RELEASED, context=1).head, "of the last token alone"


def test_training_against_the_compared_systems() -> None:
    """4.7 and 5.2 % of Qwen3-32B's arithmetic at 4K, 4.5 and 4.9 % at 32K, 42 to 46 % of Qwen3-30B-A3B's: 15T tokens
    against 36T. The published 9.3 % and 80 % are hours."""
    dense, sparse = preset("qwen3-32b"), preset("qwen3-30b-a3b")

    def percent(other: ModelConfig, length: int, has_mtp: bool) -> float:
        ratio = training_compute_ratio(
            RELEASED, other, sequence_length=length, tokens=15e12, other_tokens=36e12, with_mtp=has_mtp
        )
        return 100 * ratio

    assert [round(percent(dense, 4096, mtp), 1) for mtp in (False, True)] == [4.7, 5.2]
    assert [round(percent(dense, 32768, mtp), 1) for mtp in (False, True)] == [4.5, 4.9]
    assert [round(percent(sparse, 4096, mtp)) for mtp in (False, True)] == [42, 46]


def test_distinct_experts() -> None:
    found = {batch: round(distinct_experts(512, 10, batch)) for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
    assert found == {1: 10, 2: 20, 4: 39, 8: 75, 16: 139, 32: 240, 64: 367, 128: 471, 256: 509}
    of_expert = 48 * 3 * 2048 * 512 / 1e9
    gigabytes = [distinct_experts(512, 10, batch) * of_expert for batch in found]
    assert [round(each, 1) for each in gigabytes[:3]] == [1.5, 3.0, 5.9]
    assert [round(each) for each in gigabytes[3:]] == [11, 21, 36, 55, 71, 77]


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_parts_add_up(form: DeltaForm) -> None:
    found = token_flops(RELEASED, context=100, form=form, with_mtp=True)
    assert found.total == pytest.approx(sum(asdict(found).values()))
    assert found.without_head + found.head + found.mtp == pytest.approx(found.total)
    assert found.times(3).total == pytest.approx(3 * found.total)


def test_a_prompt_is_the_sum_of_its_tokens() -> None:
    config = preset("nano-5m")
    found = prefill_flops(config, 50, start=7)
    each = [token_flops(config, context=7 + place + 1) for place in range(50)]
    for field in fields(found):
        if field.name != "head":
            assert getattr(found, field.name) == pytest.approx(sum(getattr(token, field.name) for token in each))


def test_training_is_three_passes_or_four() -> None:
    forward = token_flops(RELEASED, context=4097 / 2, form="chunked", with_mtp=True).total
    assert training_flops(RELEASED, sequence_length=4096).total == pytest.approx(3 * forward)
    assert training_flops(RELEASED, sequence_length=4096, recomputes=True).total == pytest.approx(4 * forward)


def test_one_token_of_the_trunk() -> None:
    short, long = (forward_flops_per_token(RELEASED, context=length) for length in (1, 1001))
    assert long - short == 12 * 4 * 16 * 256 * 1000
    without = forward_flops_per_token(RELEASED, context=1, with_head=False)
    assert short - without == 2 * RELEASED.vocab_size * RELEASED.hidden_size


@pytest.mark.parametrize("name", ["80b-a3b", "qwen3-30b-a3b", "qwen3-32b", "nano-5m"])
def test_matrices_are_the_active_parameters(name: str) -> None:
    """Two operations for each active parameter but those of norms and of time constants, which multiply no matrix."""
    config = preset(name)
    found = token_flops(config, context=0)
    active = count_active(config).with_head
    vectors = 2 * active - (found.total - found.delta_core)
    assert 0 <= vectors < 4 * count_parameters(config).norms + 100_000


@pytest.mark.parametrize("name", ["nano-5m", "dense first layer", "every second sparse", "no shared expert"])
def test_products_of_the_real_model(name: str) -> None:
    """A forward pass whose linear modules count their products: those of the parts that are such modules."""
    config = replace(CONFIGS[name], num_nextn_predict_layers=0, tie_word_embeddings=False)
    model = CausalLM(config).eval()
    initialize(model, seed=0)
    counted = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * output.numel() * inputs[0].shape[-1]

    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(count)
    num_tokens = 9
    with torch.inference_mode():
        hidden_TD = model(Batch.from_lengths(torch.arange(num_tokens), [num_tokens])).hidden_TD
        model.logits(hidden_TD)
    found = token_flops(config, context=0)
    convolution = 2 * config.num_linear_layers * config.linear_conv_dim * config.linear_conv_kernel_dim
    modules = found.total - found.delta_core - found.router - found.experts - convolution
    assert counted == num_tokens * modules
