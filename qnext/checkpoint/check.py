"""Does a folder hold exactly the tensors that its configuration describes, with sane values?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint import fp8
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import Part, disk_parts, is_leftover, scale_name
from qnext.config import ModelConfig, read_config
from qnext.planning import parameter_shapes

FLOAT_DTYPES = ("BF16", "F16", "F32")
_CHUNK = 1 << 24


class Target(NamedTuple):
    """Where a tensor of the disk goes: a parameter of the module, and which part of it."""

    parameter: str
    part: Part


class Layout(NamedTuple):
    """What a folder should hold."""

    config: ModelConfig
    is_fp8: bool
    targets: dict[str, Target]  # by name on disk


def read_layout(folder: Path, tensors: dict[str, TensorInfo]) -> Layout:
    """Configuration of a folder; where it is silent about MTP, the tensors that are there decide."""
    config = read_config(folder, has_mtp=any(name.startswith("mtp.") for name in tensors))
    targets = {
        part.name: Target(name, part)
        for name, shape in parameter_shapes(config).items()
        for part in disk_parts(name, shape)
    }
    return Layout(config, fp8.read_is_fp8(folder), targets)


def structure_problems(layout: Layout, tensors: dict[str, TensorInfo], folder: Path) -> Iterator[str]:
    """One line for each tensor that is missing, misshaped, of a wrong dtype, or surplus."""
    missing = [name for name in layout.targets if name not in tensors]
    if missing and all(name.startswith("mtp.") for name in missing):
        yield (
            f"{folder}: config.json asks for multi-token prediction (num_nextn_predict_layers = 1), but tensor "
            f"{missing[0]} is missing ({len(missing)} in all); 0 there loads without it"
        )
    else:
        yield from (f"{folder}: tensor {name} is missing" for name in missing)
    known = set(layout.targets)
    for name, target in layout.targets.items():
        if name not in tensors:
            continue
        yield from _tensor_problems(tensors[name], target.part.shape)
        if tensors[name].dtype == "F8_E4M3":
            known.add(scale_name(name))
            yield from _scale_problems(layout, tensors, tensors[name])
    if layout.config.tie_word_embeddings:
        # A tied head that was written all the same is compared with the embedding when values are read.
        known.add("lm_head.weight")
        if "lm_head.weight" in tensors:
            yield from _tensor_problems(
                tensors["lm_head.weight"], layout.targets["model.embed_tokens.weight"].part.shape
            )
    for name, info in tensors.items():
        if name not in known and not is_leftover(name):
            yield f"{info.file}: tensor {name} is surplus: config.json describes no such tensor"


def _tensor_problems(info: TensorInfo, shape: tuple[int, ...]) -> Iterator[str]:
    if info.shape != shape:
        yield f"{info.file}: tensor {info.name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
    if info.dtype not in (*FLOAT_DTYPES, "F8_E4M3"):
        yield f"{info.file}: tensor {info.name} has dtype {info.dtype}, which is no weight"


def _scale_problems(layout: Layout, tensors: dict[str, TensorInfo], info: TensorInfo) -> Iterator[str]:
    name = scale_name(info.name)
    if not layout.is_fp8:
        yield f"{info.file}: tensor {info.name} is F8_E4M3, but config.json has no quantization_config"
    elif len(info.shape) != 2:
        yield f"{info.file}: tensor {info.name} is F8_E4M3, but no matrix"
    elif name not in tensors:
        yield f"{info.file}: tensor {info.name} is F8_E4M3, but its scales {name} are missing"
    else:
        scale, shape = tensors[name], fp8.scale_shape(info.shape)
        if scale.shape != shape:
            yield f"{scale.file}: tensor {name} has shape {list(scale.shape)}, its weight asks for {list(shape)}"
        if scale.dtype not in fp8.SCALE_DTYPES:
            yield f"{scale.file}: tensor {name} has dtype {scale.dtype}, only F32 and BF16 are supported"


def value_problems(layout: Layout, files: TensorFiles) -> Iterator[str]:
    """One line for each tensor that holds a number which is not finite. Reads every byte, keeps none."""
    for name, info in files.tensors.items():
        yield from tensor_value_problems(layout, files, info)
        files.drop(name)


def tensor_value_problems(layout: Layout, files: TensorFiles, info: TensorInfo) -> Iterator[str]:
    tensor = files.read(info.name)
    if not is_finite(tensor):
        yield f"{info.file}: tensor {info.name} holds NaN or infinity"
    elif layout.is_fp8 and info.name.endswith(scale_name("")) and not is_finite(tensor.to(torch.float32) * 448.0):
        yield f"{info.file}: tensor {info.name} holds a scale beyond what FP8 weights can be multiplied by"
    is_tied_head = layout.config.tie_word_embeddings and info.name == "lm_head.weight"
    if is_tied_head and not torch.equal(tensor, files.read("model.embed_tokens.weight")):
        yield f"{info.file}: tensor lm_head.weight differs from the embedding, but config.json ties them"


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
