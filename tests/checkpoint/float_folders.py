"""Tiny folders whose weights are floats of few bits, or bitsandbytes' codes. Packed here by plain arithmetic.

Layouts: compressed-tensors 0.20 (whose own compressors are asked in tests/quant/test_float_formats.py), ModelOpt's
unified checkpoints (weight, weight_scale, weight_scale_2, input_scale), transformers' FineGrainedFP8Config, and
bitsandbytes' QuantState (functional.py: as_dict, packed=True).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.model import CausalLM, initialize

from .folders import Change, SavedModel, edit_config
from .packed_folders import PACKED_CONFIG, is_packed_weight

# Inner sizes are multiples of 32, the group of MXFP4, and no whole blocks of 128.
FLOAT_CONFIG: ModelConfig = replace(
    PACKED_CONFIG, hidden_size=160, shared_expert_intermediate_size=32, linear_num_value_heads=8
)
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Packed = tuple[dict[str, Tensor], Tensor]  # tensors after the module's name, and what they stand for in fp32


def fp8(
    weight: Tensor,
    *,
    rows: int = 0,
    columns: int = 0,
    scale_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float8_e4m3fn,
    key: str = "weight_scale",
    shape: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> Packed:
    """Blocks of `rows` by `columns`, 0 for all of them, each with its largest magnitude near the largest code."""
    rows, columns = rows or weight.shape[0], columns or weight.shape[1]
    grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scales = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            block = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scales[i, j] = block.abs().max() / torch.finfo(dtype).max
    if scale_dtype == torch.uint8:
        exponents = torch.ceil(torch.log2(scales)).clamp(-126, 127)
        stored, scales = (exponents + 127).to(torch.uint8), torch.exp2(exponents)
    else:
        stored = scales.to(scale_dtype)
        scales = stored.float()
    wide = torch.kron(scales, torch.ones(rows, columns))[: weight.shape[0], : weight.shape[1]]
    codes = (weight / wide).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    return {"weight": codes, key: shape(stored)}, codes.float() * wide


def fp4_codes(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest E2M1 codes of weight / scales (by group), one to a byte, and the same two to a byte, low first."""
    scaled = weight.unflatten(1, (scales.shape[1], -1)) / scales[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(-1).flatten(1)
    return codes, (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)


def nvfp4(weight: Tensor, *, is_modelopt: bool) -> Packed:
    maxima = weight.unflatten(1, (-1, 16)).abs().amax(-1)
    factor = (weight.abs().max() / (6 * 448)).reshape(1)
    stored = (maxima / 6 / factor).to(torch.float8_e4m3fn)
    if is_modelopt:
        scales = stored.float() * factor
        rest = {"weight_scale_2": factor.reshape(()), "input_scale": torch.tensor(0.01)}
    else:
        scales = stored.float() / (1 / factor)
        rest = {"weight_global_scale": 1 / factor, "input_global_scale": torch.tensor([3.0])}
    codes, packed = fp4_codes(weight, torch.where(scales == 0, 1.0, scales))
    values = (E2M1[codes].unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
    return {"weight" if is_modelopt else "weight_packed": packed, "weight_scale": stored, **rest}, values


def mxfp4(weight: Tensor) -> Packed:
    exponents = torch.floor(torch.log2(weight.unflatten(1, (-1, 32)).abs().amax(-1).clamp(min=1e-30))) - 2
    scales = torch.exp2(exponents)
    codes, packed = fp4_codes(weight, scales)
    values = (E2M1[codes].unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
    return {"weight_packed": packed, "weight_scale": (exponents + 127).to(torch.uint8)}, values


def bitsandbytes_4bit(weight: Tensor, *, kind: str, is_nested: bool, storage: torch.dtype = torch.uint8) -> Packed:
    """The matrix in one row, the higher nibble first; any table of 16 numbers will do for a reader."""
    table = torch.linspace(-1, 1, 16).pow(3) if kind == "nf4" else E2M1 / 6
    flat, block_size = weight.flatten(), 64
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    maxima = padded.abs().amax(1).clamp(min=1e-8)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block_size,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    rest = {}
    if is_nested:
        offset = float(maxima.mean())
        nested_map = torch.linspace(-1, 1, 256)
        centred = torch.nn.functional.pad(maxima - offset, (0, -len(maxima) % 256)).view(-1, 256)
        nested = centred.abs().amax(1).clamp(min=1e-8)
        codes = ((centred / nested[:, None])[..., None] - nested_map).abs().argmin(-1)
        stored = codes.flatten()[: len(maxima)].to(torch.uint8)
        maxima = (nested_map[codes] * nested[:, None]).flatten()[: len(maxima)] + offset
        rest = {"weight.nested_absmax": nested, "weight.nested_quant_map": nested_map}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        stored = maxima
    codes = ((padded / maxima[:, None])[..., None] - table).abs().argmin(-1)
    values = (table[codes] * maxima[:, None]).flatten()[: len(flat)].view(weight.shape)
    codes = codes.flatten()[: len(flat)]
    packed = ((codes[::2] << 4) | codes[1::2]).to(torch.uint8).view(storage)[:, None]
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": packed,
        "weight.absmax": stored,
        "weight.quant_map": table,
        **rest,
        f"weight.quant_state.bitsandbytes__{kind}": text,
    }, values


def bitsandbytes_8bit(weight: Tensor) -> Packed:
    maxima = weight.abs().amax(1)
    codes = (weight / maxima[:, None] * 127).round().to(torch.int8)
    stored = {"weight": codes, "SCB": maxima, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, codes.float() * (maxima / 127)[:, None]


def int8_per_tensor(weight: Tensor) -> Packed:
    scale = weight.abs().max() / 127
    codes = (weight / scale).round().to(torch.int8)
    tensors = {"weight": codes, "weight_scale": scale.reshape(1), "input_scale": torch.tensor([0.1])}
    return tensors, codes.float() * scale


def compressed(format: str, bits: int, kind: str, strategy: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {
        "targets": ["Linear"],
        "output_activations": None,
        "input_activations": {"num_bits": 8, "type": kind, "dynamic": True, "strategy": "token", "symmetric": True},
        "weights": {
            "num_bits": bits,
            "type": kind,
            "symmetric": True,
            "strategy": strategy,
            "dynamic": False,
            "observer": "minmax",
            "observer_kwargs": {},
            **weights,
        },
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": "0.12.2",
        "transform_config": {},
        "sparsity_config": {},
        "ignore": ["lm_head", "mtp.fc", r"re:.*mlp\.gate$", "re:.*shared_expert_gate", "re:.*in_proj_ba"],
    }


class FloatForm(NamedTuple):
    """A form: how one weight is packed, what config.json says, and what `inspect` calls it."""

    pack: Callable[[Tensor], Packed]
    config: dict[str, Any] | None
    shown: str


_OFFICIAL = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_INV = "weight_scale_inv"
_BNB = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
}


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": {"name": "modelopt", "version": "0.33.1"},
        "ignore": ["lm_head", "*mlp.gate", "model.layers.*.shared_expert_gate"],
    }


def float_forms() -> dict[str, FloatForm]:
    """Every form that is read, as its writers configure it, and siblings of it."""
    forms = {
        "official": (lambda w: fp8(w, rows=128, columns=128, key=_INV), _OFFICIAL, "fp8 128x128"),
        "official, other blocks": (
            lambda w: fp8(w, rows=64, columns=128, key=_INV, scale_dtype=torch.bfloat16),
            {**_OFFICIAL, "weight_block_size": [64, 128]},
            "fp8 64x128",
        ),
        "official, powers of two": (
            lambda w: fp8(
                w,
                rows=128,
                columns=128,
                key=_INV,
                scale_dtype=torch.uint8,
                shape=lambda s: s.view(torch.float8_e8m0fnu),
            ),
            {**_OFFICIAL, "scale_fmt": "ue8m0", "fmt": "e4m3"},
            "fp8 128x128",
        ),
        "one scale, static": (
            lambda w: fp8(w, key=_INV, shape=lambda s: s.reshape(())),
            {
                "quant_method": "fp8",
                "activation_scheme": "static",
                "weight_block_size": None,
                "modules_to_not_convert": None,
            },
            "fp8 tensor",
        ),
        "E5M2": (
            lambda w: fp8(w, dtype=torch.float8_e5m2, shape=lambda s: s.reshape(1)),
            {"quant_method": "fp8", "fmt": "e5m2", "ignored_layers": ["lm_head"]},
            "fp8 tensor",
        ),
        "fbgemm": (lambda w: fp8(w, rows=1), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8 ch"),
        "FP8-dynamic": (
            lambda w: fp8(w, rows=1, scale_dtype=torch.bfloat16),
            compressed("float-quantized", 8, "float", "channel"),
            "fp8 channel",
        ),
        "FP8 of vectors": (
            lambda w: fp8(w, rows=1, scale_dtype=torch.float16, shape=lambda s: s[:, 0]),
            compressed("naive-quantized", 8, "float", "channel"),
            "fp8 channel",
        ),
        "FP8, one scale": (
            lambda w: fp8(w, shape=lambda s: s[0]),
            compressed("float-quantized", 8, "float", "tensor"),
            "fp8 tensor",
        ),
        "FP8-block": (
            lambda w: fp8(w, rows=128, columns=128, scale_dtype=torch.bfloat16),
            compressed("float-quantized", 8, "float", "block", block_structure=[128, 128]),
            "fp8 128x128",
        ),
        "FP8 in groups": (
            lambda w: fp8(w, rows=1, columns=16),
            compressed("float-quantized", 8, "float", "group", group_size=16),
            "fp8 g16",
        ),
        "MXFP8": (
            lambda w: fp8(w, rows=1, columns=32, scale_dtype=torch.uint8),
            compressed("mxfp8-quantized", 8, "float", "group", group_size=32, scale_dtype="torch.uint8"),
            "fp8 g32",
        ),
        "NVFP4": (
            lambda w: nvfp4(w, is_modelopt=False),
            compressed("nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16),
            "nvfp4 g16",
        ),
        "MXFP4": (mxfp4, compressed("mxfp4-pack-quantized", 4, "float", "group", group_size=32), "mxfp4 g32"),
        "W8A8, one scale": (int8_per_tensor, compressed("int-quantized", 8, "int", "tensor"), "int-quantized int8"),
        "ModelOpt FP8": (
            lambda w: _with(fp8(w, shape=lambda s: s.reshape(())), input_scale=torch.tensor(0.5)),
            _modelopt("FP8"),
            "fp8 tensor",
        ),
        "ModelOpt FP8 blocks": (
            lambda w: fp8(w, rows=128, columns=128, shape=lambda s: s[:, None, :, None]),
            _modelopt("FP8_PB_WO"),
            "fp8 128x128",
        ),
        "ModelOpt NVFP4": (lambda w: nvfp4(w, is_modelopt=True), _modelopt("NVFP4"), "nvfp4-modelopt g16"),
        "NVFP4 without a word": (lambda w: nvfp4(w, is_modelopt=True), None, "nvfp4-modelopt g16"),
        "FP8 without a word": (lambda w: fp8(w, rows=1), None, "fp8 channel"),
        "nf4, nested": (lambda w: bitsandbytes_4bit(w, kind="nf4", is_nested=True), _BNB, "bnb-nf4 g64"),
        "nf4": (lambda w: bitsandbytes_4bit(w, kind="nf4", is_nested=False), {"load_in_4bit": True}, "bnb-nf4 g64"),
        "nf4 stored as bf16": (
            lambda w: bitsandbytes_4bit(w, kind="nf4", is_nested=True, storage=torch.bfloat16),
            {**_BNB, "bnb_4bit_quant_storage": "bfloat16"},
            "bnb-nf4 g64",
        ),
        "fp4": (
            lambda w: bitsandbytes_4bit(w, kind="fp4", is_nested=True),
            {**_BNB, "bnb_4bit_quant_type": "fp4"},
            "bnb-fp4 g64",
        ),
        "int8": (bitsandbytes_8bit, {**_BNB, "load_in_4bit": False, "load_in_8bit": True}, "bnb-int8 int8"),
    }
    return {name: FloatForm(*form) for name, form in forms.items()}


def _with(packed: Packed, **more: Tensor) -> Packed:
    return {**packed[0], **more}, packed[1]


@cache
def _plain() -> SavedModel:
    model = CausalLM(FLOAT_CONFIG)
    initialize(model, seed=7)
    return SavedModel.of(model, torch.bfloat16)


@cache
def _packed(pack: Callable[[Tensor], Packed]) -> SavedModel:
    saved = _plain()
    tensors, expected = dict(saved.tensors), {}
    for name, weight in sorted(saved.tensors.items()):
        if is_packed_weight(name, weight):
            parts, expected[name] = pack(tensors.pop(name).float())
            module = name.removesuffix(".weight")
            tensors.update({f"{module}.{key}": tensor.contiguous() for key, tensor in parts.items()})
    return SavedModel(saved.side_files, tensors, expected)


def float_folder(path: Path, form: FloatForm, *, change: Change | None = None) -> dict[str, Tensor]:
    """Write a folder in bfloat16; returns what the packed weights stand for, in fp32, by name on disk."""
    expected = _packed(form.pack).write(path, change)
    edit_config(path, quantization_config=form.config)
    return expected
