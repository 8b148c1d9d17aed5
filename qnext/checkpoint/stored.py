"""The tensors that make up a packed weight: names, sizes and dtypes, from headers alone. No torch.

Sources are those of `qnext.checkpoint.formats` and, for bitsandbytes, bitsandbytes/functional.py (QuantState).

Legend: F outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from qnext.checkpoint.formats.forms import Form
from qnext.checkpoint.header import ITEM_SIZES, TensorInfo
from qnext.checkpoint.names import scale_name as official_scale_name
from qnext.checkpoint.records import PANELS, SCALES, ZEROS
from qnext.planning.expert_records import PANEL

FP8_BLOCK = 128
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("BF16", "F16", "F32")
POWER_DTYPES = ("U8", "F8_E8M0")  # a power of two as its exponent plus 127
_ONE = ((1,), (), (1, 1))


class Stored(NamedTuple):
    """One tensor of a packed weight in the form that it must have on disk."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def scale_name(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The name of the scales of the FP8 weight `name`: weight_scale_inv in the official form, weight_scale
    elsewhere."""
    official = official_scale_name(name)
    return name + "_scale" if official not in tensors and name + "_scale" in tensors else official


def choose_fp8_block(
    info: TensorInfo, shape: tuple[int, int], claimed: tuple[int, int] | None, tensors: Mapping[str, TensorInfo]
) -> tuple[Form, str | None]:
    """The form of an FP8 weight, from the shape of its scales. `claimed` decides where several block sizes would fit.

    The scales are one number, a column, or a grid. For other shapes the result is a line that says what is wrong.
    """
    scales = tensors.get(scale_name(info.name, tensors))
    if scales is None:
        return Form("fp8", 8, block=claimed), None  # said when all tensors are looked for
    sizes = scales.shape
    if len(sizes) == 4 and sizes[1] == sizes[3] == 1:  # ModelOpt's blocks
        sizes = (sizes[0], sizes[2])
    grid = claimed if claimed is not None and min(claimed) > 0 else None
    if grid is not None and sizes == _grid(shape, grid):
        return Form("fp8", 8, block=grid), None
    if prod(sizes) == 1:
        return Form("fp8", 8, block=(1, 0) if claimed == (1, 0) and shape[0] == 1 else (0, 0)), None
    if sizes in ((shape[0],), (shape[0], 1)):
        return Form("fp8", 8, block=(1, 0)), None
    usual = (FP8_BLOCK, FP8_BLOCK)
    if grid is None and len(sizes) == 2 and 0 not in sizes:
        exact = (shape[0] // sizes[0], shape[1] // sizes[1])
        for block in (usual, exact):
            if sizes == _grid(shape, block):
                return Form("fp8", 8, block=block), None
    return Form("fp8", 8, block=grid or usual), (
        f"{scales.file}: tensor {scales.name} has shape {list(scales.shape)}, its weight asks for "
        f"{list(_grid(shape, grid or usual))}"
    )


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // max(1, block[0])), -(-shape[1] // max(1, block[1]))


def size_problem(info: TensorInfo, shape: tuple[int, int], form: Form) -> str | None:
    """Whether a matrix of this size can be packed in this form, before its tensors are examined."""
    num_outputs, num_inputs = shape
    if form.layout == "fp8" or form.layout.startswith("bnb-"):
        return None
    where = f"{info.file}: tensor {info.name}:"
    group_size = form.group_size or num_inputs
    if num_inputs % group_size:
        return f"{where} {num_inputs} inputs are no whole number of groups of {group_size}"
    if form.layout in ("awq", "gptq", "gptq_v2"):
        packed = (num_outputs,) if form.layout == "awq" else shape
        if any(size * form.bits % 32 for size in packed):
            return f"{where} a matrix of {list(shape)} does not fill words with codes of {form.bits} bits"
    if num_inputs * form.code_bits % 8:
        return f"{where} {num_inputs} codes of {form.bits} bits end inside a byte"
    return None


def stored_tensors(
    name: str, shape: tuple[int, int], form: Form, tensors: Mapping[str, TensorInfo]
) -> dict[str, Stored]:
    """The tensors by their content. Where several shapes have the same meaning, the shape that exists is required."""
    parts = _ModuleTensors(name, shape, tensors)
    if form.layout == "fp8":
        return _fp8(parts, form)
    if form.layout.startswith("bnb-"):
        return _bitsandbytes(parts, form)
    if not form.keeps_codes:
        return _fp4(parts, form)
    if form.layout in ("pack-quantized", "int-quantized"):
        return _compressed_tensors(parts, form)
    if form.layout == "panels":
        return _panels(parts, form)
    return _words(parts, form)


class _ModuleTensors:
    """Makes `Stored` for the tensors of one module."""

    def __init__(self, name: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> None:
        self.name = name
        self.module = name.removesuffix(".weight")
        self.shape = shape
        self.tensors = tensors

    def has(self, key: str) -> bool:
        return f"{self.module}.{key}" in self.tensors

    def of(self, key: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Stored:
        return self.named(f"{self.module}.{key}", dtypes, *shapes)

    def named(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Stored:
        """The first of `shapes` unless another one of them is there."""
        info = self.tensors.get(name)
        return Stored(name, info.shape if info is not None and info.shape in shapes else shapes[0], dtypes)


def _fp8(parts: _ModuleTensors, form: Form) -> dict[str, Stored]:
    outputs = parts.shape[0]
    block = form.block or (FP8_BLOCK, FP8_BLOCK)
    if block == (0, 0):
        shapes: tuple[tuple[int, ...], ...] = (*_ONE, (1, 1, 1, 1))
    elif block == (1, 0):
        shapes = ((outputs, 1), (outputs,))
    else:
        rows, columns = _grid(parts.shape, block)
        shapes = ((rows, columns), (rows, 1, columns, 1))
    name = scale_name(parts.name, parts.tensors)
    return {
        "codes": parts.named(parts.name, FP8_DTYPES, parts.shape),
        "scales": parts.named(name, (*SCALE_DTYPES, *POWER_DTYPES), *shapes),
    }


def _fp4(parts: _ModuleTensors, form: Form) -> dict[str, Stored]:
    outputs, inputs = parts.shape
    assert form.group_size is not None
    scales = (outputs, inputs // form.group_size)
    codes = (outputs, inputs // 2)
    if form.layout == "mxfp4":
        return {
            "codes": parts.of("weight_packed", ("U8",), codes),
            "scales": parts.of("weight_scale", POWER_DTYPES, scales),
        }
    is_modelopt = form.layout == "nvfp4-modelopt"
    return {
        "codes": parts.of("weight" if is_modelopt else "weight_packed", ("U8",), codes),
        "scales": parts.of("weight_scale", ("F8_E4M3",), scales),
        "global": parts.of("weight_scale_2" if is_modelopt else "weight_global_scale", SCALE_DTYPES, *_ONE),
    }


def _bitsandbytes(parts: _ModuleTensors, form: Form) -> dict[str, Stored]:
    name, tensors = parts.name, parts.tensors
    if form.layout == "bnb-int8":
        outputs = parts.shape[0]
        stored = {
            "codes": parts.named(name, ("I8",), parts.shape),
            "scales": parts.of("SCB", ("F32", "F16", "BF16"), (outputs,), (outputs, 1)),
        }
        if parts.has("weight_format"):
            stored["format"] = parts.of("weight_format", ("U8",), (), (1,))
        return stored
    codes, absmax = tensors[name], tensors[f"{name}.absmax"]
    num_bytes = -(-prod(parts.shape) // 2)
    # The bytes may be stored as numbers of any dtype (bnb_4bit_quant_storage).
    length = num_bytes // ITEM_SIZES[codes.dtype]
    count = (absmax.shape[0],) if len(absmax.shape) == 1 else (prod(parts.shape) // 64,)
    stored = {
        "codes": parts.named(name, (codes.dtype,), (length, 1), (1, length), (length,)),
        "scales": parts.named(f"{name}.absmax", ("F32", "U8"), count),
        "map": parts.named(f"{name}.quant_map", ("F32",), (16,)),
    }
    state = f"{name}.quant_state.bitsandbytes__{form.layout.removeprefix('bnb-')}"
    size = tensors[state].shape if state in tensors and len(tensors[state].shape) == 1 else (1,)
    stored["state"] = parts.named(state, ("U8",), size)
    if absmax.dtype == "U8":
        nested = tensors.get(f"{name}.nested_absmax")
        size = nested.shape if nested is not None and len(nested.shape) == 1 else (-(-count[0] // 256),)
        stored["nested_scales"] = parts.named(f"{name}.nested_absmax", ("F32",), size)
        stored["nested_map"] = parts.named(f"{name}.nested_quant_map", ("F32",), (256,))
    return stored


def _compressed_tensors(parts: _ModuleTensors, form: Form) -> dict[str, Stored]:
    outputs, inputs = parts.shape
    groups = inputs // (form.group_size or inputs)
    one_scale = (((outputs, 1), (outputs,), *_ONE)) if groups == 1 else ((outputs, groups),)
    stored = {"scales": parts.of("weight_scale", SCALE_DTYPES, *one_scale)}
    if form.layout == "pack-quantized":
        stored["codes"] = parts.of("weight_packed", ("I32",), (outputs, _num_words(inputs, form)))
        stored["shape"] = parts.of("weight_shape", ("I64", "I32"), (2,))
    else:
        stored["codes"] = parts.named(parts.name, ("I8",), parts.shape)
    if not form.is_symmetric or parts.has("weight_zero_point"):
        zeros = parts.of("weight_zero_point", ("I8",), *one_scale)
        info = parts.tensors.get(zeros.name)
        if form.layout == "pack-quantized" and (info is None or info.dtype != "I8"):
            zeros = parts.of("weight_zero_point", ("I32",), (_num_words(outputs, form), groups))
        stored["zeros"] = zeros
    if parts.has("weight_g_idx"):
        stored["index"] = parts.of("weight_g_idx", ("I32", "I64"), (inputs,))
    return stored


def _panels(parts: _ModuleTensors, form: Form) -> dict[str, Stored]:
    outputs, inputs = parts.shape
    assert form.group_size is not None
    scales = (outputs // PANEL, inputs // form.group_size, PANEL)
    stored = {
        "codes": parts.of(PANELS, ("U8",), (outputs // PANEL, PANEL * inputs * form.bits // 8)),
        "scales": parts.of(SCALES, SCALE_DTYPES, scales),
    }
    if not form.is_symmetric:
        stored["zeros"] = parts.of(ZEROS, ("U8",), scales)
    return stored


def _words(parts: _ModuleTensors, form: Form) -> dict[str, Stored]:
    """AWQ and GPTQ."""
    outputs, inputs = parts.shape
    groups = inputs // (form.group_size or inputs)
    is_awq = form.layout == "awq"
    codes = (inputs, _num_words(outputs, form)) if is_awq else (_num_words(inputs, form), outputs)
    stored = {
        "codes": parts.of("qweight", ("I32",), codes),
        "zeros": parts.of("qzeros", ("I32",), (groups, _num_words(outputs, form))),
        "scales": parts.of("scales", SCALE_DTYPES, (groups, outputs)),
    }
    if parts.has("g_idx"):
        stored["index"] = parts.of("g_idx", ("I32", "I64"), (inputs,))
    return stored


def _num_words(count: int, form: Form) -> int:
    return -(-count * form.bits // 32)
