"""Whether a GGUF file holds the tensors that its keys describe, and what happens to its other tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

from qnext.checkpoint.gguf.container import GgufFile, GgufTensor
from qnext.checkpoint.gguf.names import GgufEntry
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint, NotSupported, warn

_BLOCK = re.compile(r"blk\.(\d+)\..+")
# Tensors that llama.cpp's architectures of the family do not multiply by: tables of rotary frequencies, and factors
# for activations in few bits.
_WITHOUT_EFFECT = re.compile(r"(.+\.)?(rope_freqs|rope_factors_long|rope_factors_short|attn_rot_embd)(\.weight)?")
_INPUT_SCALE = ".input_scale"
_SHOWN = 4


def scale_name(name: str) -> str:
    """The tensor that holds a factor for the weight `name`, or one for each of its experts, where a file has it."""
    return name.removesuffix(".weight") + ".scale"


def check_structure(file: GgufFile, config: ModelConfig, entries: Iterable[GgufEntry]) -> None:
    """Every tensor of `entries` exists with its shape, and no other tensor would have to be multiplied by.

    Raises CorruptCheckpoint for what is missing or contradicts the keys, NotSupported for unknown tensors.
    """
    known: set[str] = set()
    for entry in entries:
        known |= {entry.name, scale_name(entry.name)}
        tensor = file.tensors.get(entry.name)
        if tensor is None:
            raise CorruptCheckpoint(f"{file.path}: tensor {entry.name} is missing")
        # Some tools drop dimensions of one, some add them.
        if _without_ones(tensor.shape) != _without_ones(entry.stored_shape):
            raise CorruptCheckpoint(
                f"{tensor.path}: tensor {entry.name} has shape {list(tensor.shape)}, "
                f"the keys ask for {list(entry.stored_shape)}"
            )
        scale = file.tensors.get(scale_name(entry.name))
        if scale is not None and prod(scale.shape) not in (1, entry.stored_shape[0] if len(entry.shape) == 3 else 1):
            raise CorruptCheckpoint(f"{scale.path}: tensor {scale.name} has shape {list(scale.shape)}")
    surplus = [file.tensors[name] for name in sorted(file.tensors.keys() - known)]
    passed_over = [tensor.name for tensor in surplus if _is_passed_over(file, config, tensor)]
    if passed_over:
        more = f" and {len(passed_over) - _SHOWN} more" if len(passed_over) > _SHOWN else ""
        warn(f"{file.path}: tensors are ignored: {', '.join(passed_over[:_SHOWN])}{more}")


def _is_passed_over(file: GgufFile, config: ModelConfig, tensor: GgufTensor) -> bool:
    """Whether the user should hear of it. Raises for a tensor that would change what the model computes."""
    if tensor.name.endswith(_INPUT_SCALE):
        return False
    if _WITHOUT_EFFECT.fullmatch(tensor.name):
        return True
    match = _BLOCK.fullmatch(tensor.name)
    if match is not None and int(match[1]) >= config.num_hidden_layers:
        # Of a layer of multi-token prediction that is not whole, of which the user has heard, or that has an embedding
        # and a head of its own.
        if f"blk.{match[1]}.nextn.eh_proj.weight" in file.tensors:
            return config.num_nextn_predict_layers > 0
        if int(match[1]) >= config.num_hidden_layers + config.num_nextn_predict_layers:
            raise CorruptCheckpoint(
                f"{tensor.path}: tensor {tensor.name} is surplus: the keys describe {config.num_hidden_layers} blocks"
            )
    raise NotSupported(f"{tensor.path}: tensor {tensor.name} is unknown; it may change what the model computes")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
