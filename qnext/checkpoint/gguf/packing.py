"""Q8_0 and Q4_0 tensors of a GGUF file as packed weights of a folder: the same codes, the same scales.

Both are symmetric with an f16 scale for every 32 inputs, which is compressed-tensors' pack-quantized in groups of 32.
Other types have minima or scales of scales and are dequantised.

Legend: R rows, I inputs, N groups of inputs, W int32 words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qnext.checkpoint.files import TensorSpec
from qnext.checkpoint.gguf.block_types import KEPT_BITS, BlockType
from qnext.checkpoint.gguf.container import GgufFile
from qnext.checkpoint.gguf.names import Entry
from qnext.checkpoint.gguf.structure import scale_name
from qnext.checkpoint.names import disk_parts
from qnext.config import ModelConfig
from qnext.planning import parameter_shapes
from qnext.quant.formats import PackedGroup, compressed_tensors_config, compressed_tensors_specs
from qnext.quant.scheme import make_policy

GROUP_SIZE = 32
_EXPERT = re.compile(r"(.+\.experts\.)\d+(\..+)")


def packed_parameters(config: ModelConfig, file: GgufFile, entries: Iterable[Entry]) -> dict[str, BlockType]:
    """The parameters that stay packed: all their tensors in the file are of one of the two types, without a factor.

    Only those that `qnext quantize` would pack are; the embedding, small projections and mtp.fc are dequantised.
    """
    head = "keep" if config.tie_word_embeddings else "int8"
    policy = make_policy("int8-g32", head=head, is_tied=config.tie_word_embeddings)
    kinds: dict[str, set[BlockType]] = {}
    with_factor: set[str] = set()
    for entry in entries:
        kinds.setdefault(entry.parameter, set()).add(file.tensors[entry.name].block)
        if scale_name(entry.name) in file.tensors:
            with_factor.add(entry.parameter)
    packed: dict[str, BlockType] = {}
    for name, shape in parameter_shapes(config).items():
        part = disk_parts(name, shape)[0]
        block = next(iter(kinds[name]))
        if name in with_factor or len(kinds[name]) > 1 or block.name not in KEPT_BITS:
            continue
        if policy.scheme_of(part.name, part.shape) is not None:
            packed[name] = block
    return packed


def packed_plan(
    config: ModelConfig, plan: Mapping[str, TensorSpec], packed: Mapping[str, BlockType]
) -> dict[str, TensorSpec]:
    """`plan` with the tensors of packed weights in the place of the weights."""
    bits = {
        part.name: KEPT_BITS[packed[name].name]
        for name, shape in parameter_shapes(config).items()
        if name in packed
        for part in disk_parts(name, shape)
    }
    full: dict[str, TensorSpec] = {}
    for name, spec in plan.items():
        if name not in bits:
            full[name] = spec
            continue
        num_rows, num_inputs = spec.shape
        specs = compressed_tensors_specs(
            name.removesuffix(".weight"), (num_rows, num_inputs), bits=bits[name], group_size=GROUP_SIZE,
            scale_dtype=torch.float16,
        )  # fmt: skip
        full |= {key: TensorSpec(*value) for key, value in specs.items()}
    return full


def quantization_config(config: ModelConfig, packed: Mapping[str, BlockType]) -> dict[str, Any]:
    """How compressed-tensors describes the folder: the commoner width for every linear layer, the other by names."""
    bits: dict[str, int] = {}
    kept: list[str] = ["lm_head"] if config.tie_word_embeddings else []
    for name, shape in parameter_shapes(config).items():
        for part in disk_parts(name, shape):
            module = part.name.removesuffix(".weight")
            if name in packed:
                bits[module] = KEPT_BITS[packed[name].name]
            elif len(part.shape) == 2 and module != "model.embed_tokens":
                kept.append(module)
    common = Counter(bits.values()).most_common(1)[0][0]
    groups = [PackedGroup(common, GROUP_SIZE, ["Linear"])]
    for width in set(bits.values()) - {common}:
        groups.append(PackedGroup(width, GROUP_SIZE, _targets(bits, width)))
    return compressed_tensors_config(groups, ignore=kept)


def _targets(bits: Mapping[str, int], width: int) -> list[str]:
    """Names of the modules of `width` bits, the experts of a layer as one pattern."""
    targets: dict[str, None] = {}
    for module in (name for name, value in bits.items() if value == width):
        match = _EXPERT.fullmatch(module)
        if match is None:
            targets[module] = None
        else:
            targets[f"re:{re.escape(match[1])}\\d+{re.escape(match[2])}$"] = None
    return list(targets)
