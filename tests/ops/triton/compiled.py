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
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
    yield gpu.route(numbers(4, 512, seed=2, device=CPU).to(dtype), top_k=10, norm_topk_prob=True, load_E=load_E)


def main() -> None:
    JITFunction.run = compile_in_place
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            list(calls(dtype))


if __name__ == "__main__":
    main()
