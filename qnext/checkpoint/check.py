"""Does a folder hold exactly the tensors that its configuration describes? Read from headers alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qnext.checkpoint.header import TensorInfo, load_json
from qnext.checkpoint.names import Part, disk_parts, is_leftover, scale_name
from qnext.config import ModelConfig, read_config
from qnext.errors import ConfigError
from qnext.planning import parameter_shapes

FLOAT_DTYPES = ("BF16", "F16", "F32")
SCALE_DTYPES = ("F32", "BF16")
FP8_BLOCK = 128


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
    return Layout(config, _read_is_fp8(folder), targets)


def structure_problems(layout: Layout, tensors: dict[str, TensorInfo], folder: Path) -> Iterator[str]:
    """One line for each tensor that is missing, misshaped, of a wrong dtype, or surplus."""
    missing = [name for name in layout.targets if name not in tensors]
    if missing and all(name.startswith("mtp.") for name in missing):
        is_absent = not any(name.startswith("mtp.") for name in tensors)
        yield (
            f"{folder}: config.json asks for multi-token prediction (num_nextn_predict_layers = 1), but tensor "
            f"{missing[0]} is missing{'; set it to 0 to load the model without' if is_absent else ''}"
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
        scale, shape = tensors[name], _scale_shape(info.shape)
        if scale.shape != shape:
            yield f"{scale.file}: tensor {name} has shape {list(scale.shape)}, its weight asks for {list(shape)}"
        if scale.dtype not in SCALE_DTYPES:
            yield f"{scale.file}: tensor {name} has dtype {scale.dtype}, only F32 and BF16 are supported"


def _read_is_fp8(folder: Path) -> bool:
    """Whether config.json declares the official FP8 form; ConfigError names any other quantization."""
    path = folder / "config.json"
    block = load_json(path.read_bytes(), path).get("quantization_config")
    if block is None:
        return False
    if not isinstance(block, dict):
        raise ConfigError(f"{path}: quantization_config: must be an object or null")
    method = block.get("quant_method")
    if method != "fp8":
        raise ConfigError(f"{path}: quantization_config.quant_method: {method!r} is not supported, only 'fp8'")
    for key, allowed in (
        ("fmt", ("e4m3", None)),
        ("activation_scheme", ("dynamic", None)),
        ("weight_block_size", ([FP8_BLOCK, FP8_BLOCK],)),
    ):
        if block.get(key) not in allowed:
            raise ConfigError(
                f"{path}: quantization_config.{key}: {block.get(key)!r} is not supported, only {allowed[0]!r}"
            )
    return True


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the block scales of an [O, I] weight."""
    out_dim, in_dim = shape
    return -(-out_dim // FP8_BLOCK), -(-in_dim // FP8_BLOCK)
