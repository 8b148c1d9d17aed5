"""The numbers of packed weights: checking them, and computing what they stand for.

Legend: F outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qnext.checkpoint.files import PIECE_BYTES, TensorFiles
from qnext.checkpoint.finite import is_finite, is_finite_on_disk
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.packed import PackedWeight
from qnext.ops.float8 import Fp8Weight
from qnext.ops.quantized import QuantizedWeight
from qnext.quant.float_formats import Nested, from_bitsandbytes, from_fp4, from_fp8, scale_values
from qnext.quant.formats import (
    dequantize_ordered,
    from_awq,
    from_bitsandbytes_int8,
    from_gptq,
    from_int_quantized,
    from_pack_quantized,
    from_panels,
    unpack_codes,
)

# The largest number that a code can stand for.
_LARGEST = {"fp8": 57344.0, "nvfp4": 6.0, "nvfp4-modelopt": 6.0, "mxfp4": 6.0, "bnb-nf4": 1.0, "bnb-fp4": 1.0}
_LARGEST_E4M3 = 448.0
_MAX_STATE_BYTES = 10_000


def packed_problem(
    packed: PackedWeight, kind: str, files: TensorFiles, info: TensorInfo, *, check_finite: bool = True
) -> str | None:
    """The fault in the numbers of one tensor of a packed weight, without the tensor's name, or None.

    Without `check_finite` it reports only faults that would change what other numbers stand for.
    """
    wanted = packed.stored[kind]
    if info.shape != wanted.shape or info.dtype not in wanted.dtypes:
        return None  # said when headers were read
    if kind in ("scales", "global", "map", "nested_scales", "nested_map"):
        return _scale_problem(packed, kind, files, info) if check_finite else None
    if kind == "codes":
        return _code_problem(packed, files, info, check_finite=check_finite)
    tensor = files.read(info.name)
    if kind == "shape" and tensor.tolist() != list(packed.shape):
        return f"says {tensor.tolist()}, config.json asks for {list(packed.shape)}"
    if kind == "bias" and bool(tensor.any()):
        return "is a bias, but config.json describes none"
    if kind == "index" and not _is_unset(tensor):
        groups = packed.shape[1] // packed.group_size
        if tensor.numel() and (int(tensor.min()) < 0 or int(tensor.max()) >= groups):
            return f"names a group beyond the {groups} that there are"
    if kind == "format" and bool(tensor.reshape(-1).any()):
        return "asks for an order of columns other than by row, which is not supported"
    if kind == "state":
        return _state_problem(packed, files)
    if kind == "zeros":
        return _zeros_problem(packed, tensor)
    return None


def _scale_problem(packed: PackedWeight, kind: str, files: TensorFiles, info: TensorInfo) -> str | None:
    form = packed.form
    tensor = files.read(info.name)
    if kind == "scales" and info.dtype == "U8" and form.layout.startswith("bnb-"):
        return None  # codes of the nested form: any byte is one
    values = scale_values(tensor) if info.dtype in ("U8", "F8_E8M0") else tensor
    if not is_finite(values):
        return "holds NaN or infinity"
    if kind == "global":
        if not bool((values.to(torch.float32) > 0).all()):
            return "is not positive"
        return None
    if kind == "nested_map" or kind == "map":
        return None
    largest = _LARGEST.get(form.layout, 2.0**form.bits)
    if form.layout == "fp8" and files.tensors[packed.stored["codes"].name].dtype == "F8_E4M3":
        largest = _LARGEST_E4M3
    values = values.to(torch.float32)
    factor = files.tensors.get(packed.stored["global"].name) if "global" in packed.stored else None
    if factor is not None and factor.shape == packed.stored["global"].shape:
        number = files.read(factor.name).to(torch.float32).reshape(())
        values = values / number if form.layout == "nvfp4" else values * number
    if not is_finite(values * largest):
        what = f"codes of {form.bits} bits" if form.keeps_codes else f"{form.layout.upper()} weights"
        return f"holds a scale beyond what {what} can be multiplied by"
    return None


def _code_problem(packed: PackedWeight, files: TensorFiles, info: TensorInfo, *, check_finite: bool) -> str | None:
    form = packed.form
    if form.layout == "fp8":
        return "holds NaN or infinity" if check_finite and not is_finite_on_disk(files, info.name) else None
    if info.dtype != "I8" or form.bits == 8:
        return None
    return next(filter(None, (_range_problem(packed, piece) for piece in files.pieces(info.name))), None)


def _range_problem(packed: PackedWeight, tensor: Tensor) -> str | None:
    """Whether signed bytes stand for codes of fewer bits."""
    if tensor.dtype == torch.int8 and packed.form.bits < 8 and tensor.numel():
        low, high = torch.aminmax(tensor)
        limit = 2 ** (packed.form.bits - 1)
        if low < -limit or high >= limit:
            return f"holds numbers beyond {packed.form.bits} bits"
    return None


def _zeros_problem(packed: PackedWeight, tensor: Tensor) -> str | None:
    """Zeros of a symmetric form must be the middle code. GPTQ's may be written in either of its two formats."""
    form = packed.form
    middle = 2 ** (form.bits - 1)
    problem = _range_problem(packed, tensor)
    if form.layout == "panels" and tensor.numel() and int(tensor.max()) >= 2**form.bits:
        problem = f"holds zeros beyond {form.bits} bits"
    if problem is not None or not form.is_symmetric:
        return problem
    num_outputs = packed.shape[0]
    if form.layout in ("gptq", "gptq_v2"):
        codes = unpack_codes(tensor, count=num_outputs, bits=form.bits)
        is_middle = bool((codes == middle).all()) or bool((codes == middle - 1).all())
    elif tensor.dtype == torch.int8:
        is_middle = not bool(tensor.any())
    else:
        is_middle = bool((unpack_codes(tensor.T, count=num_outputs, bits=form.bits) == middle).all())
    return None if is_middle else f"holds zeros other than {middle}, but quantization_config.sym is true"


def _state_problem(packed: PackedWeight, files: TensorFiles) -> str | None:
    state = _read_state(packed, files)
    if state is None:
        return "is no JSON object"
    sizes = [state.get("blocksize"), state.get("nested_blocksize", 256)]
    if not all(type(size) is int and 1 < size < 2**31 and size % 2 == 0 for size in sizes):
        return f"gives no usable block sizes: {str(sizes)[:60]}"
    if list(state.get("shape") or packed.shape) != list(packed.shape):
        return f"says {str(state['shape'])[:60]}, config.json asks for {list(packed.shape)}"
    if not isinstance(state.get("nested_offset", 0.0), (int, float)):
        return "gives no usable nested_offset"
    num_blocks = -(-packed.shape[0] * packed.shape[1] // sizes[0])
    stored = files.tensors[packed.stored["scales"].name]
    if stored.shape != (num_blocks,):
        return f"asks for {num_blocks} blocks, {stored.name} has {list(stored.shape)}"
    if "nested_scales" in packed.stored:
        nested = files.tensors.get(packed.stored["nested_scales"].name)
        if nested is not None and nested.shape != (-(-num_blocks // sizes[1]),):
            return f"asks for {-(-num_blocks // sizes[1])} nested blocks, {nested.name} has {list(nested.shape)}"
    return None


def _read_state(packed: PackedWeight, files: TensorFiles) -> dict[str, Any] | None:
    raw = files.read(packed.stored["state"].name)
    if raw.numel() > _MAX_STATE_BYTES:
        return None
    try:
        state = json.loads(bytes(raw.tolist()))
    except (ValueError, RecursionError):
        return None
    shape = state.get("shape") if isinstance(state, dict) else None
    return state if isinstance(state, dict) and (shape is None or isinstance(shape, list)) else None


def _is_unset(index_D: Tensor) -> bool:
    """Whether an index was never written: compressed-tensors fills it with -1 first."""
    return bool((index_D == -1).all())


def is_in_order(packed: PackedWeight, files: TensorFiles) -> bool:
    """Whether the inputs of each group follow each other, as they do without activation order."""
    if "index" not in packed.stored:
        return True
    index = files.read(packed.stored["index"].name)
    return _is_unset(index) or torch.equal(index.to(torch.int64), torch.arange(packed.shape[1]) // packed.group_size)


def read_packed(packed: PackedWeight, files: TensorFiles) -> QuantizedWeight:
    """The codes of a weight [F, D] whose headers and values were checked.

    For a weight that is not `is_in_order`, the groups belong to other inputs than their position says.
    """
    form = packed.form
    codes_name = packed.stored["codes"].name
    scales, zeros = _scales_and_zeros(packed, files)
    if form.layout == "panels":
        return from_panels(files.read(codes_name), scales, zeros, num_inputs=packed.shape[1], bits=form.bits)
    if form.layout == "awq":
        assert zeros is not None
        return from_awq(files.read(codes_name), zeros, scales)
    if form.layout in ("gptq", "gptq_v2"):
        return from_gptq(files.read(codes_name), scales, zeros, bits=form.bits, is_v2=form.layout == "gptq_v2")
    return _by_rows(packed, files.read(codes_name), scales, zeros, 0)


def packed_blocks(packed: PackedWeight, files: TensorFiles) -> Iterator[tuple[int, QuantizedWeight]]:
    """The result of read_packed in blocks of rows, each with the number of its first row, a multiple of 64.

    Where the codes are stored by rows, only one block of them is in memory.
    """
    codes = files.tensors[packed.stored["codes"].name]
    if packed.form.layout in ("awq", "gptq", "gptq_v2", "panels"):
        weight = read_packed(packed, files)
        for first, end in _blocks(weight.shape[0], weight.codes.shape[1]):
            rows = slice(first, end)
            zeros = None if weight.zeros is None else weight.zeros[rows]
            yield first, QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.bits, weight.group_size, zeros)
        return
    scales, zeros = _scales_and_zeros(packed, files)
    for first, end in _blocks(packed.shape[0], codes.num_bytes // max(1, packed.shape[0])):
        yield first, _by_rows(packed, files.read_rows(codes.name, first, end), scales, zeros, first)


def fp8_blocks(packed: PackedWeight, files: TensorFiles) -> Iterator[tuple[int, Fp8Weight]]:
    """A weight in fp8 with scales for blocks, rows by rows: each part with the number of its first row, which begins a
    block. Scales of another type than bf16 are in fp32."""
    assert packed.form.block is not None
    (rows, columns), (num_outputs, num_inputs) = packed.form.block, packed.shape
    stored = files.read(packed.stored["scales"].name)
    scales = stored if stored.dtype == torch.bfloat16 else scale_values(stored)
    scales = scales.reshape(-(-num_outputs // rows), -(-num_inputs // columns))
    for first, end in _blocks(num_outputs, num_inputs, math.lcm(rows, 64)):
        codes = files.read_rows(packed.stored["codes"].name, first, end)
        yield first, Fp8Weight(codes, scales[first // rows : -(-end // rows)], packed.form.block)


def _blocks(num_rows: int, row_bytes: int, multiple: int = 64) -> Iterator[tuple[int, int]]:
    step = max(multiple, PIECE_BYTES // max(1, row_bytes) // multiple * multiple)
    return ((first, min(first + step, num_rows)) for first in range(0, num_rows, step))


def _scales_and_zeros(packed: PackedWeight, files: TensorFiles) -> tuple[Tensor, Tensor | None]:
    has_zeros = "zeros" in packed.stored and not packed.form.is_symmetric
    return files.read(packed.stored["scales"].name), files.read(packed.stored["zeros"].name) if has_zeros else None


def _by_rows(packed: PackedWeight, codes: Tensor, scales: Tensor, zeros: Tensor | None, first: int) -> QuantizedWeight:
    """Rows of a weight from `first` on, a multiple of 64, from their codes and the scales and zeros of all rows."""
    form = packed.form
    num_outputs, num_inputs = packed.shape
    end = first + len(codes)
    if form.layout == "bnb-int8":
        return from_bitsandbytes_int8(codes, scales.reshape(-1)[first:end])
    scales_FG = scales.reshape(-1, scales.shape[-1] if scales.dim() == 2 else 1)
    scales_FG = scales_FG.expand(num_outputs, -1)[first:end].contiguous()
    if zeros is not None and zeros.dtype == torch.int8:
        zeros = zeros.reshape(-1, scales_FG.shape[1]).expand(num_outputs, -1)[first:end]
    elif zeros is not None:  # packed along the outputs: 64 of them fill whole words
        zeros = zeros[first * form.bits // 32 : -(-end * form.bits // 32)]
    if form.layout == "pack-quantized":
        return from_pack_quantized(codes, scales_FG, zeros, num_inputs=num_inputs, bits=form.bits)
    return from_int_quantized(codes, scales_FG, zeros, bits=form.bits)


def read_packed_numbers(packed: PackedWeight, files: TensorFiles, *, dtype: torch.dtype) -> Tensor:
    """The numbers of any packed weight [F, D], computed in fp32 and rounded once to `dtype`."""
    form = packed.form
    if form.keeps_codes:
        weight = read_packed(packed, files)
        if is_in_order(packed, files):
            return weight.dequantize(dtype)
        return dequantize_ordered(weight, files.read(packed.stored["index"].name), dtype=dtype)
    parts = {kind: files.read(stored.name) for kind, stored in packed.stored.items() if kind != "state"}
    if form.layout == "fp8":
        assert form.block is not None
        return from_fp8(parts["codes"], parts["scales"], block=form.block, dtype=dtype)
    if form.layout.startswith("bnb-"):
        state = _read_state(packed, files)
        assert state is not None
        nested = None
        if "nested_scales" in parts:
            offset = float(state.get("nested_offset", 0.0))
            nested = Nested(parts["nested_scales"], parts["nested_map"], state.get("nested_blocksize", 256), offset)
        return from_bitsandbytes(
            parts["codes"],
            parts["scales"],
            parts["map"],
            shape=packed.shape,
            block_size=state["blocksize"],
            nested=nested,
            dtype=dtype,
        )
    is_divided = form.layout == "nvfp4"
    factor, divisor = (None, parts["global"]) if is_divided else (parts.get("global"), None)
    return from_fp4(parts["codes"], parts["scales"], factor=factor, divisor=divisor, dtype=dtype)
