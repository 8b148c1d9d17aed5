"""Layers of tiny experts in record files, beside the same experts in panels."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qnext import ops
from qnext.checkpoint.record_values import code_form, matrix_form, write_rows
from qnext.ops import RecordReader
from qnext.planning.expert_records import RecordFile, RecordLayout
from qnext.residency.store import ExpertStore, ResidencyPlan

HIDDEN, WIDTH, NUM_EXPERTS = 64, 32, 24
RING, THREADS = RecordReader("io_uring", 4, is_direct=True), RecordReader("threads", 3, is_direct=True)


class Layer(NamedTuple):
    gate_up: Tensor | ops.Weight
    down: Tensor | ops.Weight
    records_EB: Tensor

    @property
    def checksums(self) -> tuple[int, ...]:
        return tuple(zlib.crc32(record_B.numpy().data) for record_B in self.records_EB)


def make_layer(form: str, *, seed: int) -> tuple[Layer, RecordLayout]:
    """`form`: int4, int8, int4 with zeros, bfloat16 or float32."""
    generator = torch.Generator().manual_seed(seed)
    if form in ("bfloat16", "float32"):
        dtype = getattr(torch, form)
        layout = RecordLayout(HIDDEN, WIDTH, *2 * (matrix_form(dtype),))
        shapes = (NUM_EXPERTS, 2 * WIDTH, HIDDEN), (NUM_EXPERTS, HIDDEN, WIDTH)
        gate_up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        return Layer(gate_up, down, _records(layout, gate_up, down)), layout
    bits, has_zeros = 8 if form == "int8" else 4, form.endswith("zeros")
    code = code_form(bits=bits, group_size=32, scale_dtype=torch.float16, has_zeros=has_zeros)
    layout = RecordLayout(HIDDEN, WIDTH, code, code)
    stacks = []
    for name in ("gate_up", "down"):
        shape = (NUM_EXPERTS, *layout.shape_of(name))
        stack = ops.empty_quantized(shape, bits=bits, group_size=32, scale_dtype=torch.float16, has_zeros=has_zeros)
        for expert in range(NUM_EXPERTS):
            ops.write_quantized(stack, _random_codes(shape[1:], bits, has_zeros, generator), expert=expert)
        stacks.append(stack)
    return Layer(stacks[0], stacks[1], _records(layout, *stacks)), layout


def _random_codes(
    shape: tuple[int, ...], bits: int, has_zeros: bool, generator: torch.Generator
) -> ops.QuantizedWeight:
    num_outputs, num_inputs = shape
    codes = torch.randint(256, (num_outputs, num_inputs * bits // 8), dtype=torch.uint8, generator=generator)
    groups = (num_outputs, num_inputs // 32)
    scales = (torch.rand(groups, generator=generator) * 0.05).half()
    zeros = torch.randint(1 << bits, groups, dtype=torch.uint8, generator=generator) if has_zeros else None
    return ops.QuantizedWeight(codes, scales, bits, 32, zeros)


def _records(layout: RecordLayout, gate_up: Tensor | ops.Weight, down: Tensor | ops.Weight) -> Tensor:
    records_EB = torch.zeros(NUM_EXPERTS, layout.stride, dtype=torch.uint8)
    for expert, record_B in enumerate(records_EB):
        write_rows(record_B, layout, "gate_up", gate_up[expert], 0)  # type: ignore[arg-type]
        write_rows(record_B, layout, "down", down[expert], 0)  # type: ignore[arg-type]
    return records_EB


def write_file(path: Path, layers: list[Layer], layout: RecordLayout) -> list[RecordFile]:
    """All layers one after the other, behind a page of something else."""
    files, start = [], 4096
    with path.open("wb") as file:
        file.write(b"x" * start)
        for number, layer in enumerate(layers):
            files.append(RecordFile(f"model.layers.{number}", path, start, layout, layer.checksums))
            file.write(layer.records_EB.numpy().data)
            start += layer.records_EB.nbytes
    return files


def open_store(
    files: list[RecordFile],
    *,
    slots: int,
    spare: int = 4,
    half_life: int = 8,
    reader: RecordReader = RING,
    least_wait_ns: int = 0,
) -> ExpertStore:
    return ExpertStore(files, ResidencyPlan((slots,) * len(files), spare, reader, half_life, least_wait_ns))
