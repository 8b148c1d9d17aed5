"""Compiles for an H200 every GPU program as the released sizes start it: python -m tests.ops.triton.compiled

No GPU is needed: the calls are made on the CPU, and each launch compiles in place of running. Prints a line of JSON per
program: its name, registers of a thread, bytes of stack (spilled registers) and shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from qnext.ops import (
    AttentionCache,
    AttentionWeights,
    DeltaCache,
    DeltaInputs,
    DeltaWeights,
    Fp8Weight,
    Norm,
    Packing,
    PendingTokens,
    QuantizedWeight,
    Rope,
    Routing,
    SharedExpert,
    Weight,
)
from qnext.ops import triton as gpu
from qnext.ops.triton.trust import numbers

CPU = torch.device("cpu")
TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages")
seen: set[str] = set()


def compile_in_place(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """Takes the place of JITFunction.run."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    is_constant = {parameter.name: parameter.is_constexpr for parameter in kernel.params}
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if is_constant[name] or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
    key = repr((kernel.__name__, signature, constants))
    if key in seen:
        return
    seen.add(key)
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=TARGET, options=options)
    print(json.dumps({"kernel": kernel.__name__, **resources(made), "types": list(signature.values())}), flush=True)


def resources(made: Any) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": made.metadata.shared}


def calls(dtype: torch.dtype) -> Iterator[Any]:
    """Every op at the released sizes, a few tokens each."""
    x_TD = numbers(4, 2048, seed=0, device=CPU).to(dtype)
    yield gpu.rms_norm(x_TD, numbers(2048, seed=1, device=CPU).to(dtype), eps=1e-6, zero_centered=True)
    load_E = torch.zeros(512, dtype=torch.int64)
    yield gpu.rope_cos_sin(torch.zeros(4).long(), torch.zeros(32))
    yield from delta_steps(dtype)
    yield from attention(dtype)
    yield from experts(dtype)
    yield from matrices(dtype)
    yield gpu.route(numbers(4, 512, seed=2, device=CPU).to(dtype), top_k=10, norm_topk_prob=True, load_E=load_E)


def training(dtype: torch.dtype) -> None:
    """Ops with their gradients; programs of the delta rule take fp32."""

    def rows(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype).requires_grad_()

    gpu.rms_norm(rows(4, 2048), rows(2048), eps=1e-6, zero_centered=True).sum().backward()
    tensors = (rows(*shape, dtype=torch.float32) for shape in ((8192, 1, 4), (32,), (32,), (128,)))
    weights = DeltaWeights(*tensors, eps=1e-6, num_key_heads=16, key_head_dim=128)
    gpu.gated_delta_mixer(rows(40, 12288), rows(40, 64), weights, packing=Packing([40])).sum().backward()
    norms = (rows(256, dtype=torch.float32), rows(256, dtype=torch.float32))
    heads, rope = AttentionWeights(*norms, 1e-6, True, True, 0.0625), Rope(torch.ones(8, 32), torch.ones(8, 32))
    q_TX, k_TY, v_TY = rows(8, 8192), rows(8, 512), rows(8, 512)
    gpu.attention_mixer(q_TX, k_TY, v_TY, heads, rope=rope, packing=Packing([8])).sum().backward()
    gpu.swiglu(rows(4, 512), rows(4, 512)).sum().backward()
    routing = Routing(rows(4, 2, dtype=torch.float32), torch.zeros(4, 2).long())
    gpu.experts_swiglu(rows(4, 2048), rows(4, 1024, 2048), rows(4, 2048, 512), routing=routing).sum().backward()
    if dtype == torch.float32:
        inputs = DeltaInputs(rows(40, 16, 128), rows(40, 16, 128), rows(40, 32, 128), rows(40, 32), rows(40, 32))
        gpu.gated_delta_rule(inputs, packing=Packing([40]), initial_state_NHKV=rows(1, 32, 128, 128))[
            0
        ].sum().backward()


def delta_steps(dtype: torch.dtype) -> Iterator[Any]:
    """Drafts on states in fp32, single tokens on states in bf16, and pieces of prompts in chunks."""
    small: dict[str, Any] = {"eps": 1e-6, "num_key_heads": 16, "key_head_dim": 128}
    weights = DeltaWeights(
        *(torch.ones(*shape, dtype=dtype) for shape in ((8192, 1, 4), (32,), (32,), (128,))), **small
    )
    packing, yes_N = Packing([4]), torch.ones(1, dtype=torch.bool)
    pending = PendingTokens.empty(1, 4, num_channels=8192, num_key_heads=16, state_shape=(32, 128, 128), device=CPU)
    cache = DeltaCache(torch.zeros(1, 3, 8192), torch.zeros(1, 32, 128, 128), torch.zeros(1).long(), yes_N)
    qkvz_TX, ba_TY = torch.zeros(4, 12288, dtype=dtype), torch.zeros(4, 64, dtype=dtype)
    drafting = cache._replace(pending=pending, is_draft_N=yes_N)
    yield gpu.gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing, cache=drafting)
    narrow = cache._replace(state=cache.state.bfloat16())
    yield gpu.gated_delta_mixer(qkvz_TX[:1], ba_TY[:1], weights, packing=Packing([1]), cache=narrow)
    qkvz_TX, ba_TY = torch.zeros(40, 12288, dtype=dtype), torch.zeros(40, 64, dtype=dtype)
    for given in (cache, None):
        yield gpu.gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=Packing([40]), cache=given)


def attention(dtype: torch.dtype) -> Iterator[Any]:
    """One token, drafts and a piece of a prompt, over pages of every kind."""
    weights = AttentionWeights(torch.ones(256, dtype=dtype), torch.ones(256, dtype=dtype), 1e-6, True, True, 0.0625)
    tables_NM = torch.zeros(1, 2048).long()
    scales = torch.ones(3, 2, 16)
    for page_dtype, num_tokens in product((torch.bfloat16, torch.float32, torch.int8), (1, 4, 20)):
        pages = torch.zeros(3, 2, 16, 256, dtype=page_dtype)
        kept = (scales, scales) if page_dtype == torch.int8 else (None, None)
        write_index_T, contexts_N = torch.zeros(num_tokens).long(), torch.tensor([num_tokens])
        cache = AttentionCache(pages, pages, *kept, tables_NM, contexts_N, write_index_T)
        rows = [torch.zeros(num_tokens, width, dtype=dtype) for width in (8192, 512, 512)]
        rope = Rope(torch.ones(num_tokens, 32), torch.ones(num_tokens, 32))
        yield gpu.attention_mixer(*rows, weights, rope=rope, packing=Packing([num_tokens]), cache=cache)


def experts(dtype: torch.dtype) -> Iterator[Any]:
    """Four of the experts, for few tokens and for many, in every form."""
    vector_1D, shapes = torch.zeros(1, 2048, dtype=dtype), ((4, 1024, 2048), (4, 2048, 512), (1, 2048, 1024))
    for gate_up, down, shared_down in zip(*(weights(shape, dtype) for shape in shapes), strict=True):
        for num_tokens in (1, 9):
            x_TD, experts_TA = torch.zeros(num_tokens, 2048, dtype=dtype), torch.zeros(num_tokens, 10).long()
            routing = Routing(torch.zeros(num_tokens, 10), experts_TA)
            if num_tokens == 1:
                yield gpu.experts_swiglu(x_TD, gate_up, down, routing=routing)
                shared = SharedExpert(gate_up[0], gate_up[1], shared_down[0], vector_1D)
                yield gpu.add_experts(x_TD, x_TD, gate_up, down, routing=routing, shared=shared)
            elif not isinstance(down, torch.Tensor):
                yield gpu.experts_swiglu(x_TD, gate_up, down, routing=routing)


def matrices(dtype: torch.dtype) -> Iterator[Any]:
    """Those around a mixer, the router's, and both kinds of starts: of some hundred programs, and of fewer."""
    x_TD, norm = torch.zeros(1, 2048, dtype=dtype), Norm(torch.zeros(2048, dtype=dtype), 1e-6, True)
    floats_FD = torch.zeros(64, 2048, dtype=dtype)
    load_E = torch.zeros(512, dtype=torch.int64)
    yield gpu.normed_route(
        x_TD, norm, torch.zeros(512, 2048, dtype=dtype), top_k=10, norm_topk_prob=True, load_E=load_E
    )
    for wide, narrow in zip(weights((1, 8192, 2048), dtype), weights((1, 512, 2048), dtype), strict=True):
        for num_rows in (1,) if isinstance(wide, torch.Tensor) else (1, 17):
            x_TD = torch.zeros(num_rows, 2048, dtype=dtype)
            yield gpu.normed_linears(x_TD, norm, (wide[0], narrow[0], narrow[0]))
            yield gpu.normed_linears(x_TD, norm, (wide[0], floats_FD))
            for weight in (wide[0], narrow[0]):
                yield gpu.add_linear(torch.zeros(num_rows, weight.shape[0], dtype=dtype), x_TD, weight)
                if not isinstance(weight, torch.Tensor):
                    yield gpu.linear(x_TD, weight)


def weights(shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[torch.Tensor | Weight]:
    yield torch.zeros(shape, dtype=dtype)
    num_experts, rows, columns = shape
    for bits in (4, 8):
        codes = torch.zeros(num_experts, rows, columns * bits // 8, dtype=torch.uint8)
        yield QuantizedWeight(codes, torch.zeros(num_experts, rows, columns // 32, dtype=torch.bfloat16), bits, 32)
    yield Fp8Weight(torch.zeros(shape).to(torch.float8_e4m3fn), torch.zeros(num_experts, rows // 128, columns // 128))


def main() -> None:
    JITFunction.run = compile_in_place
    for dtype in (torch.bfloat16, torch.float32):
        with torch.no_grad():
            list(calls(dtype))
        training(dtype)


if __name__ == "__main__":
    main()
