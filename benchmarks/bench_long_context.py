"""How long does a prompt of the full context take, how fast are answers behind it, and does memory stay as planned?

A small random hybrid model reads one prompt in chunks and decodes behind it. Printed are the speed of the first and of
the last 8,192 tokens, of decoding at that depth, and the planned bytes beside those of the process. With `--yarn 4` the
context of 262,144 tokens becomes one of 1,048,576: `--tokens 1010000`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from _pair import print_json

import torch

from qnext.config import ModelConfig, hybrid_pattern
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.model import CausalLM, initialize
from qnext.ops import keep_freed_memory
from qnext.planning.machine import format_bytes

CONTEXT = 262_144


def model_of(yarn: float | None) -> CausalLM:
    """Four layers in the proportions of the released model, small enough to read its whole context in a minute."""
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=64,
        layer_types=hybrid_pattern(4, interval=4),
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        partial_rotary_factor=0.25,
        rope_theta=1e7,
        max_position_embeddings=CONTEXT + 64,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = CausalLM(config if yarn is None else config.with_yarn(yarn)).to(torch.bfloat16).eval()
    initialize(model, seed=0)
    return model


def peak_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(engine: Engine, num_tokens: int, num_new: int, edge: int) -> dict[str, Any]:
    """Read a prompt step by step and decode `num_new` tokens; `edge` tokens at both ends are timed apart."""
    prompt = [(i * 7919 + i // 97) % engine.model_config.vocab_size for i in range(num_tokens)]
    request = engine.add_request(prompt, SamplingParams(max_tokens=num_new, ignore_eos=True))
    times = [(0, time.perf_counter())]
    while not request.output_ids:
        engine.step()
        times.append((engine.metrics.prompt_tokens_computed, time.perf_counter()))
    started = time.perf_counter()
    while request.finish_reason is None:
        engine.step()
    decode_seconds = time.perf_counter() - started
    return {
        "prompt_tokens": num_tokens,
        "prefill_seconds": times[-1][1] - times[0][1],
        "first_tokens_per_second": _rate([t for t in times if t[0] <= edge] or times),
        "last_tokens_per_second": _rate([t for t in times if t[0] >= num_tokens - edge] or times),
        "prefill_tokens_per_second": _rate(times),
        "decode_tokens_per_second": (num_new - 1) / decode_seconds,
    }


def _rate(times: list[tuple[int, float]]) -> float:
    (first, started), (last, ended) = times[0], times[-1]
    return (last - first) / (ended - started) if last > first else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=CONTEXT, help="length of the prompt (default: 262144)")
    parser.add_argument("--decode", type=int, default=32, help="tokens of the answer")
    parser.add_argument("--edge", type=int, default=8192, help="tokens at both ends of the prompt that are timed apart")
    parser.add_argument("--yarn", type=float, help="stretch the context by YaRN, 4 for 1,010,000 tokens")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    model = model_of(options.yarn)
    before = peak_bytes()
    started = time.perf_counter()
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=options.tokens + options.decode))
    start_seconds = time.perf_counter() - started
    plan = engine.memory_plan
    print(plan.describe())
    found = measure(engine, options.tokens, options.decode, options.edge)
    planned = plan.total_bytes - plan.weight_bytes
    peak = peak_bytes()
    grown = None if peak is None or before is None else peak - before
    print(f"engine made in {start_seconds:.2f} s")
    print(
        f"prompt {options.tokens:,} tokens in {found['prefill_seconds']:.1f} s: "
        f"{found['first_tokens_per_second']:,.0f} tokens/s at first, "
        f"{found['last_tokens_per_second']:,.0f} at last; then {found['decode_tokens_per_second']:.1f} tokens/s"
    )
    if grown is not None:
        print(f"planned beside the weights {format_bytes(planned)}, the process grew by {format_bytes(grown)}")
    print_json(
        {
            "benchmark": "long_context",
            "yarn": options.yarn,
            "threads": torch.get_num_threads(),
            "start_seconds": start_seconds,
            "cache_bytes": plan.kv_bytes + plan.state_bytes,
            "planned_bytes": planned,
            "grown_bytes": grown,
            **found,
        }
    )


if __name__ == "__main__":
    main()
