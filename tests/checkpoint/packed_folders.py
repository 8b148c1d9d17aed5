"""Tiny folders in every packed form. Packing is done here by plain arithmetic, not by the code under test."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext import ops
from qnext.checkpoint.names import disk_parts
from qnext.config import ModelConfig
from qnext.model import CausalLM, initialize
from qnext.planning import list_parameters

from .folders import CONFIGS, Change, SavedModel, edit_config

# Inner sizes are multiples of 16, the smallest group, and outputs of 8, the words of AWQ and GPTQ.
PACKED_CONFIG: ModelConfig = replace(
    CONFIGS["next"],
    hidden_size=48,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=16,
    num_experts=3,
    linear_value_head_dim=8,
)
_KEPT = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "in_proj_ba", "conv1d", "mtp.fc")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class PackedForm(NamedTuple):
    method: str
    layout: str
    bits: int
    group_size: int  # -1: one group of all inputs
    is_symmetric: bool = True

    def __str__(self) -> str:
        return f"{self.layout}-{self.bits}-{self.group_size}-{'sym' if self.is_symmetric else 'asym'}"


FORMS = [
    PackedForm("compressed-tensors", "pack-quantized", 4, 16),
    PackedForm("compressed-tensors", "pack-quantized", 4, -1, False),
    PackedForm("compressed-tensors", "pack-quantized", 8, -1),
    PackedForm("compressed-tensors", "pack-quantized", 8, 16, False),
    PackedForm("compressed-tensors", "int-quantized", 8, -1),
    PackedForm("compressed-tensors", "naive-quantized", 4, 8, False),
    PackedForm("awq", "awq", 4, 16, False),
    PackedForm("gptq", "gptq", 4, 16),
    PackedForm("gptq", "gptq", 8, -1, False),
    PackedForm("gptq", "gptq_v2", 4, 8, False),
    PackedForm("gptq", "gptq", 2, 16),
    PackedForm("gptq", "gptq", 2, 8, False),
    PackedForm("compressed-tensors", "pack-quantized", 2, 16, False),
]


class Codes(NamedTuple):
    codes: Tensor  # int64 [F, D], from 0
    scales: Tensor  # [F, G]
    zeros: Tensor  # int64 [F, G]
    bits: int

    def dequantize(self) -> Tensor:
        group_size = self.codes.shape[1] // self.scales.shape[1]
        zeros, scales = (t.repeat_interleave(group_size, dim=1) for t in (self.zeros, self.scales.float()))
        return (self.codes - zeros).float() * scales


def random_codes(shape: torch.Size, form: PackedForm, *, scale_dtype: torch.dtype, seed: int) -> Codes:
    """Numbers of about 0.02 in size."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if form.group_size == -1 else shape[1] // form.group_size
    codes = torch.randint(0, 2**form.bits, tuple(shape), generator=generator)
    scales = (torch.rand((shape[0], groups), generator=generator) + 0.5) * (0.04 / 2**form.bits)
    zeros = torch.full((shape[0], groups), 2 ** (form.bits - 1))
    if not form.is_symmetric:
        zeros = torch.randint(0, 2**form.bits, (shape[0], groups), generator=generator)
    return Codes(codes, scales.to(scale_dtype), zeros, form.bits)


def words(codes: Tensor, *, bits: int) -> Tensor:
    """int64 [..., N] -> int32 [..., ceil(N * bits / 32)], the first code in the lowest bits."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    values = (padded << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def pack(module: str, weight: Codes, form: PackedForm) -> dict[str, Tensor]:
    """The tensors of one weight on disk."""
    (num_outputs, num_inputs), bits, half = weight.codes.shape, weight.bits, 2 ** (weight.bits - 1)
    if form.layout == "pack-quantized":
        tensors = {
            "weight_packed": words(weight.codes, bits=bits),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor([num_outputs, num_inputs]),
        }
        if not form.is_symmetric:
            tensors["weight_zero_point"] = words(weight.zeros.T, bits=bits).T
    elif form.method == "compressed-tensors":
        tensors = {"weight": (weight.codes - half).to(torch.int8), "weight_scale": weight.scales}
        if not form.is_symmetric:
            tensors["weight_zero_point"] = (weight.zeros - half).to(torch.int8)
    elif form.method == "awq":

        def ordered(codes: Tensor) -> Tensor:
            return codes.unflatten(-1, (-1, 8))[..., torch.tensor(AWQ_ORDER)].flatten(-2)

        tensors = {
            "qweight": words(ordered(weight.codes.T), bits=4),
            "qzeros": words(ordered(weight.zeros.T), bits=4),
            "scales": weight.scales.T,
        }
    else:
        stored = weight.zeros if form.layout == "gptq_v2" else (weight.zeros - 1) % 2**bits
        tensors = {
            "qweight": words(weight.codes, bits=bits).T,
            "qzeros": words(stored.T, bits=bits),
            "scales": weight.scales.T,
            "g_idx": torch.arange(num_inputs) // (num_inputs // weight.scales.shape[1]),
        }
        tensors["g_idx"] = tensors["g_idx"].to(torch.int32)
    return {f"{module}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def quantization_config(form: PackedForm) -> dict[str, Any]:
    """As the programs that make such folders write it."""
    if form.method == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": form.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["mlp.gate", "shared_expert_gate", "in_proj_ba", "mtp.fc"],
        }
    if form.method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": form.bits,
            "group_size": form.group_size,
            "desc_act": False,
            "sym": form.is_symmetric,
            "checkpoint_format": form.layout,
            "lm_head": False,
            "damp_percent": 0.01,
            "dynamic": {r"-:.*mlp\.gate$": {}, "-:.*shared_expert_gate": {}, "-:.*in_proj_ba": {}, r"-:mtp\.fc": {}},
        }
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.is_symmetric,
        "dynamic": False,
        "actorder": None,
        "strategy": "channel" if form.group_size == -1 else "group",
        "observer": "minmax",
        "block_structure": None,
        "group_size": None if form.group_size == -1 else form.group_size,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form.layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "mtp.fc", r"re:.*mlp\.gate$", "re:.*shared_expert_gate", "re:.*in_proj_ba"],
    }


def is_packed_weight(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and name.endswith(".weight") and not any(mark in name for mark in _KEPT)


@cache
def _plain(dtype: torch.dtype) -> SavedModel:
    model = CausalLM(PACKED_CONFIG)
    initialize(model, seed=7)
    return SavedModel.of(model, dtype)


@cache
def _packed(form: PackedForm, dtype: torch.dtype, scale_dtype: torch.dtype) -> SavedModel:
    saved = _plain(dtype)
    tensors, expected = dict(saved.tensors), {}
    for seed, (name, tensor) in enumerate(sorted(saved.tensors.items())):
        if is_packed_weight(name, tensor):
            weight = random_codes(tensors.pop(name).shape, form, scale_dtype=scale_dtype, seed=seed)
            expected[name] = weight.dequantize()
            tensors.update(pack(name.removesuffix(".weight"), weight, form))
    return SavedModel(saved.side_files, tensors, expected)


def packed_folder(
    path: Path,
    form: PackedForm,
    *,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.float16,
    change: Change | None = None,
) -> dict[str, Tensor]:
    """Write a folder; returns what the packed weights stand for, in fp32, by name on disk."""
    expected = _packed(form, dtype, scale_dtype).write(path, change)
    edit_config(path, quantization_config=quantization_config(form))
    return expected


def weights_of(model: CausalLM) -> dict[str, Tensor | ops.Weight]:
    """Every weight under its parameter's name, whether it is a parameter or not."""
    found: dict[str, Tensor | ops.Weight] = {}
    for name in list_parameters(model.config):
        prefix, _, key = name.rpartition(".")
        found[name] = getattr(model.get_submodule(prefix), key)
    return found


def assert_holds(model: CausalLM, expected: dict[str, Tensor]) -> None:
    infos = list_parameters(model.config)
    num_packed = 0
    for name, weight in weights_of(model).items():
        values = ops.dequantize(weight, torch.float32)
        for part in disk_parts(infos[name]):
            if part.name in expected:
                assert torch.equal(values[part.place], expected[part.name]), part.name
                num_packed += 1
    assert num_packed == len(expected) > 20
