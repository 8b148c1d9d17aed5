"""A model folder becomes a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.checkpoint.check import FLOAT_DTYPES, Layout, read_layout, structure_problems
from qnext.checkpoint.files import TORCH_DTYPES, TensorFiles
from qnext.checkpoint.finite import is_finite
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.packed import PackedWeight
from qnext.checkpoint.packed_values import is_in_order, packed_blocks
from qnext.checkpoint.values import not_finite, read_weight, tensor_value_problems
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint, UsageError, warn
from qnext.model import CausalLM
from qnext.planning import parameter_shapes

Progress = Callable[[int, int], None]
# What the model reads as tensors: a gate is small, and its last bits choose experts.
_ROUTER = ".mlp.gate.weight"
_ALWAYS_PLAIN = (_ROUTER, ".shared_expert_gate.weight")


class Codes(NamedTuple):
    """What must be known to make room for a quantised parameter."""

    shape: tuple[int, ...]
    bits: int
    group_size: int
    scale_dtype: torch.dtype
    has_zeros: bool


@torch.no_grad()
def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> CausalLM:
    """The model in a Hugging Face folder of safetensors files.

    `dtype` None keeps what is stored, tensor by tensor; FP8 weights become bfloat16. Integer weights
    (compressed-tensors, AWQ, GPTQ) keep their codes, on the CPU, as a QuantizedWeight or a PanelWeight in the place
    of the parameter, unless `dequantize` asks for tensors; gates always become tensors. `progress` is called with
    bytes read and bytes in all. Tensors are read into their place, or by pieces, so memory stays near the weights
    alone.

    A missing, surplus, misshaped or (with `check_finite`) non-finite tensor raises CorruptCheckpoint naming file and
    tensor. Raises ModelNotFound where there is no model, ConfigError for a config.json that contradicts itself,
    NotSupported for a form that is not read, UsageError where a value does not fit in `dtype` or codes are wanted on
    another device. Warns of what is passed over.
    """
    with TensorFiles(folder) as files:
        layout = read_layout(files.folder, files.tensors)
        for problem in structure_problems(layout, files.tensors, files.folder):
            raise CorruptCheckpoint(problem)
        codes = {} if dequantize else _quantized_parameters(layout, files)
        if codes and torch.device(device).type != "cpu":
            raise UsageError(
                f"{files.folder}: integer weights are computed on the CPU only; dequantize to use {device}"
            )
        dtypes = _parameter_dtypes(layout, files.tensors, dtype, set(codes))
        model = empty_model(layout.config, dtypes=dtypes, device=device, quantized=codes)
        total = sum(info.num_bytes for info in files.tensors.values())
        done = 0
        for name, info in files.tensors.items():
            role = layout.roles.get(name)
            if role is None and name in layout.targets:
                _copy(layout, files, name, model, check_finite)
            elif role is None:
                _check(layout, files, name, check_finite)
            elif role.kind == "codes":
                # The small tensors of a packed weight are read with its codes, wherever they lie.
                for wanted in layout.packed[role.weight].stored.values():
                    _check(layout, files, wanted.name, check_finite)
                _copy(layout, files, role.weight, model, check_finite)
            done += info.num_bytes
            if progress is not None:
                progress(done, total)
    return model


def empty_model(
    config: ModelConfig,
    *,
    dtypes: Mapping[str, torch.dtype] | torch.dtype,
    device: torch.device | str = "cpu",
    quantized: Mapping[str, Codes] | None = None,
) -> CausalLM:
    """A model whose parameters have storage on `device` but no values yet; a tied head stays tied.

    The parameters in `quantized` become plain attributes: room for codes, filled by ops.write_quantized.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    made: dict[int, nn.Parameter] = {}
    storage: list[Tensor] = []
    for prefix, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if quantized and f"{prefix}.{key}" in quantized:
                # A module refuses anything but a Parameter under the name of one.
                del module._parameters[key]
                weight = _empty_codes(quantized[f"{prefix}.{key}"])
                setattr(module, key, weight)
                storage += weight.tensors
                continue
            if id(parameter) not in made:
                dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[f"{prefix}.{key}"]
                made[id(parameter)] = nn.Parameter(ops.empty_huge(parameter.shape, dtype=dtype, device=device))
                storage.append(made[id(parameter)])
            module._parameters[key] = made[id(parameter)]
    ops.touch(storage)
    return model


def _check(layout: Layout, files: TensorFiles, name: str, check_finite: bool) -> None:
    for problem in tensor_value_problems(layout, files, files.tensors[name], check_finite=check_finite):
        raise CorruptCheckpoint(problem)


def _empty_codes(codes: Codes) -> ops.QuantizedWeight | ops.PanelWeight:
    return ops.empty_quantized(
        codes.shape,
        bits=codes.bits,
        group_size=codes.group_size,
        scale_dtype=codes.scale_dtype,
        has_zeros=codes.has_zeros,
    )


def _copy(layout: Layout, files: TensorFiles, name: str, model: CausalLM, check_finite: bool) -> None:
    """One weight of the disk, by name, into its place. A plain one is checked on the way, others were."""
    parameter, part = layout.targets[name]
    prefix, _, key = parameter.rpartition(".")
    destination = getattr(model.get_submodule(prefix), key)
    if not isinstance(destination, Tensor):
        row = 0 if part.rows is None else part.rows[0]
        packed = layout.packed[name]
        for first, rows in packed_blocks(packed, files):
            ops.write_quantized(destination, rows, expert=part.expert, row=row + first)
        return
    place = destination.data[part.place]
    if name in layout.packed:
        place.copy_(read_weight(layout, files, name, dtype=place.dtype))
    else:
        is_final = place.dtype == TORCH_DTYPES[files.tensors[name].dtype] and place.device.type == "cpu"
        parts = place.view(-1).split(files.piece_items(name))
        for to, piece in zip(parts, files.pieces(name, into=place if is_final else None), strict=True):
            if check_finite and not is_finite(piece):
                raise CorruptCheckpoint(not_finite(files.tensors[name]))
            if not is_final:
                to.copy_(piece)
    is_half = name in files.tensors and files.tensors[name].dtype == "F16"
    if place.dtype == torch.float16 and not is_half and not is_finite(place):
        stored = layout.packed[name].stored["codes"].name if name in layout.packed else name
        raise UsageError(f"{files.tensors[stored].file}: tensor {stored} holds numbers beyond the range of float16")


def _quantized_parameters(layout: Layout, files: TensorFiles) -> dict[str, Codes]:
    """The parameters that stay codes: those of one form in all parts, with their groups in order.

    The rest of what is packed in integers becomes tensors, and a warning says how many.
    """
    forms: dict[str, set[Codes | None]] = {}
    has_integers: set[str] = set()
    shapes = parameter_shapes(layout.config)
    for name, target in layout.targets.items():
        packed = layout.packed.get(name)
        codes = None
        if packed is not None and packed.form.keeps_codes:
            has_integers.add(target.parameter)
            if is_in_order(packed, files):
                codes = _codes_of(packed, shapes[target.parameter], files.tensors)
        forms.setdefault(target.parameter, set()).add(codes)
    found = {name: next(iter(each)) for name, each in forms.items() if len(each) == 1}
    kept = {name: codes for name, codes in found.items() if codes is not None and not name.endswith(_ALWAYS_PLAIN)}
    numbers = [name for name in sorted(has_integers - kept.keys()) if not name.endswith(_ALWAYS_PLAIN)]
    if numbers:
        warn(
            f"{files.folder}: {numbers[0]}{f' and {len(numbers) - 1} more' if numbers[1:] else ''}: numbers instead of "
            "codes in memory, since parts differ in form or columns are in activation order (desc_act)"
        )
    return kept


def _codes_of(packed: PackedWeight, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> Codes:
    scale_dtype = TORCH_DTYPES[tensors[packed.stored["scales"].name].dtype]
    if packed.form.layout == "bnb-int8":
        scale_dtype = torch.float32
    return Codes(shape, packed.form.code_bits, packed.group_size, scale_dtype, not packed.form.is_symmetric)


def _parameter_dtypes(
    layout: Layout, tensors: Mapping[str, TensorInfo], wanted: torch.dtype | None, quantized: set[str]
) -> dict[str, torch.dtype]:
    """dtype of each parameter but those in `quantized`: as stored, the widest where its parts differ.

    Packed weights that become tensors take the embedding's, or bfloat16 where that is packed too. A `wanted` dtype
    leaves a router as it is that is stored wider than the embedding: somebody kept the last bits that choose experts.
    """
    embedding = _stored_dtype(tensors.get("model.embed_tokens.weight"))
    dtypes: dict[str, torch.dtype] = {}
    for name, target in layout.targets.items():
        parameter = target.parameter
        if parameter in quantized:
            continue
        stored = embedding if name in layout.packed else _stored_dtype(tensors[name])
        is_wide_router = parameter.endswith(_ROUTER) and torch.promote_types(stored, embedding) != embedding
        if wanted is not None:
            stored = torch.promote_types(stored, wanted) if is_wide_router else wanted
        dtypes[parameter] = torch.promote_types(dtypes.get(parameter, stored), stored)
    return dtypes


def _stored_dtype(info: TensorInfo | None) -> torch.dtype:
    """What is packed becomes bfloat16."""
    return torch.bfloat16 if info is None or info.dtype not in FLOAT_DTYPES else TORCH_DTYPES[info.dtype]
