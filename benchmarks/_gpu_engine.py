"""An engine on a GPU: time to the first token, tokens a second of one stream and of many, with and without graphs.

The weights are random numbers in FP8 in released shapes, made on the device; as many layers as fit.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qnext.checkpoint.codes import Fp8Codes
from qnext.checkpoint.load import Places, empty_model
from qnext.config import ModelConfig, preset
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.memory import free_bytes
from qnext.model import CausalLM, held_bytes, named_weights
from qnext.model.init import initial_values
from qnext.ops import Fp8Weight
from qnext.planning import list_parameters
from qnext.planning.parameters import QUANTIZED

_SHARE = 0.65  # of the free memory for weights; caches of many sequences take the rest
_PIECE = 1 << 27  # numbers that are drawn at a time
_WARM_STEPS = 2  # the first decoding step of a size is captured


class EngineSizes(NamedTuple):
    """What is run: `goals` are tokens a second by batch, and seconds to the first token (batch 0)."""

    name: str
    config: ModelConfig  # with all layers
    block: int
    batches: tuple[int, ...]
    prompt: int
    prompt_of_many: int
    num_first: int  # prompts of which the first token is timed
    steps: int
    goals: dict[int, float]
    both: bool = True  # with graphs and without


_TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    layer_types=("linear_attention", "full_attention"),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    partial_rotary_factor=0.25,
    rope_theta=10_000.0,
    max_position_embeddings=128,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
    initializer_range=0.1,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
RELEASED = EngineSizes(
    "80b-a3b",
    replace(preset("80b-a3b"), num_nextn_predict_layers=0),
    block=128,
    batches=(1, 256),
    prompt=1024,
    prompt_of_many=64,
    num_first=5,
    steps=64,
    goals={0: 0.1, 1: 600.0, 256: 6000.0},
)
SMALLEST = EngineSizes(
    "tiny", _TINY, 32, batches=(2,), prompt=4, prompt_of_many=2, num_first=1, steps=1, goals={}, both=False
)


def measure_engine(sizes: EngineSizes, device: torch.device) -> dict[str, Any]:
    """One document: the model, and a figure for each batch with and without graphs. Prints as it goes."""
    config = _that_fits(sizes, device)
    model = _random_model(config, sizes.block, device)
    print(
        f"  {sizes.name} with {config.num_hidden_layers} layers, {held_bytes(model) / 2**30:.1f} GiB in FP8", flush=True
    )
    figures = []
    for records in (True, False) if sizes.both else (True,):
        first = _first_token(model, sizes, records=records)
        figures.append({"batch": 0, "graphs": records, "seconds": first, "goal": sizes.goals.get(0)})
        print(
            f"  first token of {sizes.prompt} tokens{_how(records)}: {first * 1e3:.1f} ms{_beside(sizes, 0, 'ms')}",
            flush=True,
        )
        for batch in sizes.batches:
            rate = _decode_rate(model, sizes, batch, records=records)
            figures.append(
                {"batch": batch, "graphs": records, "tokens_per_second": rate, "goal": sizes.goals.get(batch)}
            )
            print(
                f"  decoding {batch} at once{_how(records)}: {rate:.1f} tokens/s{_beside(sizes, batch, '')}", flush=True
            )
    layers = {"layers": config.num_hidden_layers, "of_layers": sizes.config.num_hidden_layers}
    return {"model": sizes.name, **layers, "precision": "fp8", "figures": figures}


def _how(records: bool) -> str:
    return ", graphs" if records else ", no graphs"


def _beside(sizes: EngineSizes, batch: int, unit: str) -> str:
    goal = sizes.goals.get(batch)
    if goal is None:
        return ""
    return f" (goal: at most {goal * 1e3:.0f} {unit})" if batch == 0 else f" (goal: at least {goal:,.0f})"


def _that_fits(sizes: EngineSizes, device: torch.device) -> ModelConfig:
    """With the most layers, in whole periods of four, whose weights take their share of the free memory."""
    room, config = _SHARE * free_bytes(device), sizes.config
    while _fp8_bytes(config) > room and config.num_hidden_layers > 4:
        config = config.with_layers(config.num_hidden_layers - 4)
    return config


def _fp8_bytes(config: ModelConfig) -> int:
    infos = list_parameters(config).values()
    return sum(torch.Size(info.shape).numel() * (1 if info.kind in QUANTIZED else 2) for info in infos)


def _random_model(config: ModelConfig, block: int, device: torch.device) -> CausalLM:
    infos = list_parameters(config)
    codes = {
        name: Fp8Codes(info.shape, (block, block), torch.float32)
        for name, info in infos.items()
        if info.kind in QUANTIZED
    }
    model = empty_model(config, dtypes=torch.bfloat16, places=Places(device), quantized=codes)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial_values(config, infos[name], seed=0, dtype=parameter.dtype, device=device))
    generator = torch.Generator(device).manual_seed(0)
    for _, weight in named_weights(model):
        assert isinstance(weight, Fp8Weight)
        for piece in weight.codes.view(-1).split(_PIECE):
            piece.copy_(torch.randn(len(piece), device=device, generator=generator))
        weight.scales.fill_(config.initializer_range)
    return model.eval()


def _engine(model: CausalLM, *, seats: int, length: int, records: bool) -> Engine:
    config = EngineConfig(
        max_num_seqs=seats, max_model_len=length, prefix_cache=False, speculation=False, record_steps=records
    )
    return Engine.of(model, config)


def _prompt(model: CausalLM, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()


def _first_token(model: CausalLM, sizes: EngineSizes, *, records: bool) -> float:
    """Seconds: the median of some prompts, after one that compiles."""
    params, taken = SamplingParams(max_tokens=1, ignore_eos=True), []
    with _engine(model, seats=1, length=sizes.prompt + 8, records=records) as engine:
        for seed in range(1 + sizes.num_first):
            start = time.perf_counter()
            engine.generate([_prompt(model, sizes.prompt, seed)], params)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _decode_rate(model: CausalLM, sizes: EngineSizes, batch: int, *, records: bool) -> float:
    """Tokens a second while `batch` sequences decode. The host has each step's tokens before the next one."""
    prompt = sizes.prompt if batch == 1 else sizes.prompt_of_many
    params = SamplingParams(max_tokens=sizes.steps + _WARM_STEPS + batch + 4, ignore_eos=True)
    length = 2 * (prompt + (params.max_tokens or 0))  # a request is admitted where blocks are left to grow into
    with _engine(model, seats=batch, length=length, records=records) as engine:
        requests = [engine.add_request(_prompt(model, prompt, seed), params) for seed in range(batch)]
        for _ in range(4 * batch):
            if all(request.output_ids for request in requests):
                break
            engine.step()
        for _ in range(_WARM_STEPS):
            engine.step()
        start = time.perf_counter()
        events = [engine.step() for _ in range(sizes.steps)]
        taken = time.perf_counter() - start
        assert all(len(each) == batch for each in events), "a sequence ended while it was timed"
    return batch * sizes.steps / taken
