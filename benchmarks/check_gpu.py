"""What GPU kernels and an engine do on this machine: errors against the reference, and times at the released sizes.

    python benchmarks/check_gpu.py [--out report.json]        also: make bench-gpu

Without a CUDA device and Triton it ends with exit code 2. A kernel's bytes are those that it must read and write;
before each timed call the L2 cache is overwritten. Prompts: beside kernels of other packages. Training: each op forward
and backward, steps of large-1b. The engine runs random FP8 weights in released shapes, as many layers as fit.
`--smallest` runs tiny sizes, also under Triton's interpreter, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, starmap
from pathlib import Path
from typing import Any, NamedTuple

import _gpu_prompts
import _gpu_training
import torch
from _gpu_engine import RELEASED as RELEASED_ENGINE
from _gpu_engine import SMALLEST as SMALLEST_ENGINE
from _gpu_engine import measure_engine
from _gpu_prompts import prompt_cases
from _gpu_training import time_step, training_cases

import qnext  # noqa: F401 - before torch
from qnext import ops
from qnext.ops import (
    AttentionCache,
    AttentionWeights,
    DeltaCache,
    DeltaWeights,
    Fp8Weight,
    Norm,
    Packing,
    Rope,
    Routing,
    SharedExpert,
    backends,
)
from qnext.ops import triton as gpu
from qnext.planning.accelerators import accelerator_named

CACHE_BYTES = 256 << 20  # more than the L2 cache of any GPU that is known


class Sizes(NamedTuple):
    hidden: int
    width: int
    experts: int
    top_k: int
    key_heads: int
    heads: int  # of values in Gated DeltaNet, and of queries times two
    head_dim: int
    attention_dim: int
    context: int


RELEASED = Sizes(2048, 512, 512, 10, 16, 32, 128, 256, 8192)
SMALLEST = Sizes(64, 32, 4, 2, 1, 2, 16, 16, 40)


class Case(NamedTuple):
    name: str
    num_bytes: int
    call: Callable[[], Any]


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Single-stream decoding: the calls of one token."""
    x_TD = torch.randn(1, sizes.hidden, device=device, dtype=torch.bfloat16)
    norm = Norm(torch.zeros(sizes.hidden, device=device, dtype=torch.bfloat16), 1e-6, True)
    qkvz, out = fp8((6 * sizes.hidden, sizes.hidden), device), fp8((sizes.hidden, 2 * sizes.hidden), device)
    ba = torch.zeros(2 * sizes.heads, sizes.hidden, device=device, dtype=torch.bfloat16)
    yield Case(
        "norm and two projections, fp8", qkvz.nbytes + ba.nbytes, lambda: gpu.normed_linears(x_TD, norm, (qkvz, ba))
    )
    yield delta_step(sizes, device)
    yield attention(sizes, device)
    mixed_TZ = torch.randn(1, 2 * sizes.hidden, device=device, dtype=torch.bfloat16)
    yield Case("projection and sum, fp8", out.nbytes, lambda: gpu.add_linear(x_TD, mixed_TZ, out))
    router = torch.randn(sizes.experts, sizes.hidden, device=device, dtype=torch.bfloat16)
    choice: Any = {"top_k": sizes.top_k, "norm_topk_prob": True}
    yield Case("norm, logits and choice", router.nbytes, lambda: gpu.normed_route(x_TD, norm, router, **choice))
    gate_up = fp8((sizes.experts, 2 * sizes.width, sizes.hidden), device)
    down = fp8((sizes.experts, sizes.hidden, sizes.width), device)
    gate, up = (fp8((sizes.width, sizes.hidden), device) for _ in range(2))
    scores = torch.full((1, sizes.top_k), 1 / sizes.top_k, device=device)
    routing = Routing(scores, torch.arange(sizes.top_k, device=device)[None])
    experts: Any = {"routing": routing, "shared": SharedExpert(gate, up, down[0], router[:1])}
    of_token = (gate_up.nbytes + down.nbytes) * (sizes.top_k + 1) // sizes.experts
    yield Case("experts and sum, fp8", of_token, lambda: gpu.add_experts(x_TD, x_TD, gate_up, down, **experts))


def delta_step(sizes: Sizes, device: torch.device) -> Case:
    key_heads, heads, dim = sizes.key_heads, sizes.heads, sizes.head_dim
    channels = 2 * key_heads * dim + heads * dim
    shapes = ((channels, 1, 4), (heads,), (heads,), (dim,))
    weights = DeltaWeights(
        *(torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes),
        eps=1e-6,
        num_key_heads=key_heads,
        key_head_dim=dim,
    )
    conv, state = torch.zeros(1, 3, channels, device=device), torch.zeros(1, heads, dim, dim, device=device)
    slots_N = torch.zeros(1, dtype=torch.int64, device=device)
    cache = DeltaCache(conv, state, slots_N, slots_N != 0, has_fresh=False)
    rows = [torch.randn(1, n, device=device, dtype=torch.bfloat16) for n in (channels + heads * dim, 2 * heads)]
    packing = Packing([1], device=device)
    call = lambda: gpu.gated_delta_mixer(*rows, weights, packing=packing, cache=cache)  # noqa: E731
    return Case("gated_delta_mixer, one token", 2 * (conv.nbytes + state.nbytes), call)


def attention(sizes: Sizes, device: torch.device) -> Case:
    dim, page_size, heads = sizes.attention_dim, 16, sizes.heads // 2
    num_pages = -(-sizes.context // page_size)
    ones_K = torch.ones(dim, device=device, dtype=torch.bfloat16)
    weights = AttentionWeights(ones_K, ones_K, 1e-6, True, True, dim**-0.5)
    pages = [torch.randn(num_pages, 1, page_size, dim, device=device).bfloat16() for _ in range(2)]
    tables_NM = torch.arange(num_pages, device=device)[None]
    place_T = torch.tensor([sizes.context - 1], device=device)
    cache = AttentionCache(*pages, None, None, tables_NM, torch.tensor([sizes.context]), place_T)
    rows = [torch.randn(1, n * dim, device=device, dtype=torch.bfloat16) for n in (2 * heads, 1, 1)]
    rope = Rope(*(torch.ones(1, dim // 8, device=device) for _ in range(2)))
    packing = Packing([1], device=device)
    call = lambda: gpu.attention_mixer(*rows, weights, rope=rope, packing=packing, cache=cache)  # noqa: E731
    return Case(f"attention_mixer, {sizes.context} keys of one head", sum(x.nbytes for x in pages), call)


def fp8(shape: tuple[int, ...], device: torch.device) -> Fp8Weight:
    codes = torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    blocks = (*shape[:-2], *(-(-size // 128) for size in shape[-2:]))
    return Fp8Weight(codes, torch.ones(blocks, device=device))


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of single calls, each behind a write over the whole L2 cache."""
    call()  # compiles
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    spoiler = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    taken = []
    for _ in range(repeats):
        spoiler.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize(device)
        taken.append(start_event.elapsed_time(end_event) / 1000)
    return statistics.median(taken)


def error_of(self_test: gpu.SelfTest, device: torch.device) -> float | str:
    """Of a self-test: the relative RMS error, or why there is none."""
    try:
        return gpu.self_test_error(self_test, device)
    except Exception as failure:  # what a compiler or a driver may raise belongs to the report
        return f"{type(failure).__name__}: {failure}"


def report(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "interpreter"
    known = accelerator_named(name)
    peak = None if known is None else known.bandwidth
    print(f"{name}: {ops.arithmetic_of(device)}")
    errors = {test.__name__.removeprefix("try_"): error_of(test, device) for test in gpu.SELF_TESTS}
    for kernel, error in errors.items():
        print(f"  {kernel:<40} {error if isinstance(error, str) else f'error {error:.1e}'}")
    found = {
        "delta rule of training in bf16": gpu.training_rule(device),
        "delta rule of prompts in bf16": gpu.prompt_rule(device),
        "attention of prompts in bf16": gpu.piece_attention(device),
    }
    packages = {what: "own kernels" if each is None else each.package for what, each in found.items()}
    for what, package in packages.items():
        print(f"  {what:<40} {package}")
    is_smallest, times = sizes is SMALLEST, []
    trained = training_cases(_gpu_training.SMALLEST if is_smallest else _gpu_training.RELEASED, device)
    prompts = prompt_cases(_gpu_prompts.SMALLEST if is_smallest else _gpu_prompts.RELEASED, device)
    for case in chain(cases(sizes, device), starmap(Case, prompts), starmap(Case, trained)):
        taken = seconds(case.call, device, repeats=50)
        rate = case.num_bytes / taken
        share = "" if peak is None else f" {100 * rate / peak:5.1f} % of peak"
        print(f"  {case.name:<40} {taken * 1e6:9.1f} us {rate / 1e9:8.1f} GB/s{share}", flush=True)
        times.append({"kernel": case.name, "seconds": taken, "bytes": case.num_bytes, "peak": peak})
    step = time_step(device, is_smallest=is_smallest, peak=None if known is None else known.bf16)
    share = "" if step["mfu"] is None else f" {100 * step['mfu']:5.1f} % of peak"
    print(f"  {'step of ' + step['model']:<40} {step['tokens_per_second']:9.0f} tokens/s{share}", flush=True)
    return {"benchmark": "check_gpu", "device": name, "arithmetic": ops.arithmetic_of(device), "errors": errors} | {
        "times": times,
        "step": step,
        "packages": packages,
        "not_measured": ["released weights", "drafts", "several GPUs"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU kernels on this machine")
    parser.add_argument("--out", type=Path, help="write the report as JSON into this file")
    parser.add_argument("--smallest", action="store_true", help="tiny sizes, also under Triton's interpreter")
    parser.add_argument("--without-engine", action="store_true", help="neither an engine nor its model")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backends.backend_of(device).name != "triton":
        print("check_gpu: no GPU kernels run here: they need a CUDA device and Triton", file=sys.stderr)
        return 2
    with torch.no_grad():
        found = report(SMALLEST if options.smallest else RELEASED, device)
        if not options.without_engine:
            found["engine"] = measure_engine(SMALLEST_ENGINE if options.smallest else RELEASED_ENGINE, device)
    text = json.dumps(found)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
