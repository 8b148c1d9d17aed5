"""Numbers of a checkpoint: are they sound, and what do FP8 blocks and packed weights stand for?

Legend: O rows (out), I columns (in), b blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qnext.checkpoint.check import Layout
from qnext.checkpoint.files import PIECE_BYTES, TensorFiles
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import scale_name
from qnext.checkpoint.packed import PackedWeight
from qnext.checkpoint.quantization import FP8_BLOCK
from qnext.ops.quantized import QuantizedWeight
from qnext.quant.formats import from_awq, from_gptq, from_int_quantized, from_pack_quantized, gptq_zeros

_CHUNK = 1 << 24
_LARGEST_E4M3 = 448.0


def tensor_value_problems(
    layout: Layout, files: TensorFiles, info: TensorInfo, *, check_finite: bool = True
) -> Iterator[str]:
    """One line for each thing that is wrong with the numbers of one tensor.

    Without `check_finite` only those of packed weights that would change what others stand for.
    """
    if info.name in layout.passed_over:
        return
    role = layout.roles.get(info.name)
    if role is not None and (role.kind != "scales" or check_finite):
        problem = _packed_problem(layout.packed[role.weight], role.kind, files, info)
        if problem is not None:
            yield f"{info.file}: tensor {info.name} {problem}"
    if role is not None or not check_finite:
        return
    is_fp8_scale = layout.is_fp8 and info.name.endswith(scale_name(""))
    if not _is_finite(files, info.name):
        yield f"{info.file}: tensor {info.name} holds NaN or infinity"
    elif is_fp8_scale and not _stays_finite(files, info.name, _LARGEST_E4M3):
        yield f"{info.file}: tensor {info.name} holds a scale beyond what FP8 weights can be multiplied by"


def _packed_problem(packed: PackedWeight, kind: str, files: TensorFiles, info: TensorInfo) -> str | None:
    wanted = packed.stored[kind]
    if info.shape != wanted.shape or info.dtype not in wanted.dtypes:
        return None  # said when headers were read
    form, tensor = packed.form, files.read(info.name)
    if kind == "scales":
        if not _is_finite(files, info.name):
            return "holds NaN or infinity"
        if not _stays_finite(files, info.name, 2.0**form.bits):
            return f"holds a scale beyond what codes of {form.bits} bits can be multiplied by"
    elif kind == "shape" and tensor.tolist() != list(packed.shape):
        return f"says {tensor.tolist()}, config.json asks for {list(packed.shape)}"
    elif kind == "index" and not torch.equal(tensor, torch.arange(packed.shape[1]) // packed.group_size):
        return "does not list the inputs' groups in order; activation order (desc_act) is not supported"
    elif kind == "zeros" and form.is_symmetric:
        zeros = gptq_zeros(tensor, bits=form.bits, is_v2=form.layout == "gptq_v2")
        if bool((zeros != 2 ** (form.bits - 1)).any()):
            return f"holds zeros other than {2 ** (form.bits - 1)}, but quantization_config.sym is true"
    elif tensor.dtype == torch.int8 and form.bits < 8 and tensor.numel():
        low, high = torch.aminmax(tensor)
        limit = 2 ** (form.bits - 1)
        if low < -limit or high >= limit:
            return f"holds numbers beyond {form.bits} bits"
    return None


def _is_finite(files: TensorFiles, name: str) -> bool:
    return all(is_finite(piece) for piece in files.pieces(name))


def _stays_finite(files: TensorFiles, name: str, factor: float) -> bool:
    """Whether every number times `factor` is finite in fp32."""
    return all(is_finite(piece.to(torch.float32) * factor) for piece in files.pieces(name))


def read_packed(packed: PackedWeight, files: TensorFiles) -> QuantizedWeight:
    """A weight [F, D] whose headers and values were checked. It may share memory with the files."""
    form = packed.form
    codes, scales = (files.read(packed.stored[kind].name) for kind in ("codes", "scales"))
    zeros = None
    if "zeros" in packed.stored and not form.is_symmetric:
        zeros = files.read(packed.stored["zeros"].name)
    if form.layout == "pack-quantized":
        return from_pack_quantized(codes, scales, zeros, num_inputs=packed.shape[1], bits=form.bits)
    if form.layout == "int-quantized":
        return from_int_quantized(codes, scales, zeros, bits=form.bits)
    if form.layout == "awq":
        assert zeros is not None
        return from_awq(codes, zeros, scales)
    return from_gptq(codes, scales, zeros, bits=form.bits, is_v2=form.layout == "gptq_v2")


def row_blocks(weight: QuantizedWeight) -> Iterator[tuple[int, QuantizedWeight]]:
    """A matrix [F, D] in blocks of rows, each with the number of its first row, a multiple of 64."""
    num_rows = max(64, PIECE_BYTES // weight.codes.shape[1] // 64 * 64)
    for first in range(0, weight.shape[0], num_rows):
        rows = slice(first, first + num_rows)
        zeros = None if weight.zeros is None else weight.zeros[rows]
        yield first, QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.bits, weight.group_size, zeros)


def read_weight(layout: Layout, files: TensorFiles, name: str, *, dtype: torch.dtype) -> Tensor:
    """The numbers of one weight in `dtype`, however it is stored; a view of the file where nothing changes."""
    if name in layout.packed:
        return read_packed(layout.packed[name], files).dequantize(dtype)
    source = files.read(name)
    if source.dtype == torch.float8_e4m3fn:
        return dequantize(source, files.read(scale_name(name)), dtype=dtype)
    return source.to(dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite, without a temporary as large as the tensor."""
    flat = tensor.detach().reshape(-1)
    if tensor.dtype == torch.float8_e4m3fn:
        # e4m3fn has no infinity; its NaN is all ones behind the sign.
        return not any(bool(((part & 0x7F) == 0x7F).any()) for part in flat.view(torch.uint8).split(_CHUNK))
    if not tensor.is_floating_point() or flat.numel() == 0:
        return True
    low, high = torch.aminmax(flat)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def dequantize(weight_OI: Tensor, scale_bb: Tensor, *, dtype: torch.dtype) -> Tensor:
    """weight * scale of its block, computed in fp32 and rounded once."""
    out_OI = torch.empty(weight_OI.shape, dtype=dtype)
    column_scales = scale_bb.to(torch.float32).repeat_interleave(FP8_BLOCK, dim=1)[:, : weight_OI.shape[1]]
    for b, start in enumerate(range(0, weight_OI.shape[0], FP8_BLOCK)):
        rows = slice(start, start + FP8_BLOCK)
        out_OI[rows] = weight_OI[rows].to(torch.float32) * column_scales[b]
    return out_OI
