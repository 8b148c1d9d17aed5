"""A model folder becomes a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qnext.checkpoint.check import Layout, read_layout, structure_problems
from qnext.checkpoint.files import TORCH_DTYPES, TensorFiles
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import scale_name
from qnext.checkpoint.values import dequantize, is_finite, tensor_value_problems
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.model import CausalLM

Progress = Callable[[int, int], None]


@torch.no_grad()
def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    progress: Progress | None = None,
) -> CausalLM:
    """The model in a Hugging Face folder of safetensors files.

    `dtype` None keeps what is stored; FP8 weights become bfloat16. `progress` is called with bytes read and bytes in
    all. Files are mapped and their pages given back once copied, so memory stays near the weights alone. The model
    holds exactly what the folder describes: a missing, surplus, misshaped or (with `check_finite`) non-finite tensor
    raises CorruptCheckpoint naming file and tensor. Raises ModelNotFound where there is no model, ConfigError for a
    bad config.json, UsageError where a value does not fit in `dtype`.
    """
    with TensorFiles(folder) as files:
        layout = read_layout(files.folder, files.tensors)
        for problem in structure_problems(layout, files.tensors, files.folder):
            raise CorruptCheckpoint(problem)
        dtypes = _parameter_dtypes(layout, files.tensors, dtype)
        model = empty_model(layout.config, dtypes=dtypes, device=device)
        parameters = dict(model.named_parameters())
        total = sum(info.num_bytes for info in files.tensors.values())
        done = 0
        for name, info in files.tensors.items():
            if check_finite:
                for problem in tensor_value_problems(layout, files, info):
                    raise CorruptCheckpoint(problem)
            if name in layout.targets:
                target = layout.targets[name]
                _copy(files, info, parameters[target.parameter][target.part.place])
            files.drop(name)
            done += info.num_bytes
            if progress is not None:
                progress(done, total)
    return model


def empty_model(
    config: ModelConfig, *, dtypes: Mapping[str, torch.dtype] | torch.dtype, device: torch.device | str = "cpu"
) -> CausalLM:
    """A model whose parameters have storage on `device` but no values yet; a tied head stays tied."""
    with torch.device("meta"):
        model = CausalLM(config)
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[f"{prefix}.{key}"]
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            module._parameters[key] = made[id(parameter)]
    return model


def _copy(files: TensorFiles, info: TensorInfo, destination: Tensor) -> None:
    source = files.read(info.name)
    if source.dtype == torch.float8_e4m3fn:
        source = dequantize(source, files.read(scale_name(info.name)), dtype=destination.dtype)
    destination.copy_(source)
    if destination.dtype == torch.float16 and info.dtype != "F16" and not is_finite(destination):
        raise UsageError(f"{info.file}: tensor {info.name} holds numbers beyond the range of float16")


def _parameter_dtypes(
    layout: Layout, tensors: Mapping[str, TensorInfo], wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """dtype of each parameter. As stored, all matrices must agree, since one pass multiplies them all."""
    dtypes: dict[str, torch.dtype] = {}
    matrix: tuple[str, torch.dtype] | None = None
    for name, target in layout.targets.items():
        info = tensors[name]
        dtype = wanted or (torch.bfloat16 if info.dtype == "F8_E4M3" else TORCH_DTYPES[info.dtype])
        if len(info.shape) > 1:
            matrix = matrix or (name, dtype)
            if dtype != matrix[1]:
                raise CorruptCheckpoint(
                    f"{info.file}: tensor {name} has dtype {info.dtype}, unlike {matrix[0]} "
                    f"({tensors[matrix[0]].dtype}); a dtype must be asked for"
                )
        dtypes[target.parameter] = dtype
    return dtypes
