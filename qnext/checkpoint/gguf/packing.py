"""Q8_0 and Q4_0 tensors of a GGUF file as packed weights of a folder: the same codes, the same scales.

Both are symmetric with an f16 scale for every 32 inputs, which is compressed-tensors' pack-quantized in groups of 32.
Other types have minima or scales of scales and are dequantised.

Legend: R rows, I inputs, N groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from qnext.checkpoint.gguf.block_types import KEPT_BITS, BlockType
from qnext.checkpoint.gguf.container import GgufFile
from qnext.checkpoint.gguf.names import GgufEntry
from qnext.checkpoint.gguf.structure import scale_name
from qnext.checkpoint.names import disk_parts
from qnext.checkpoint.record_output import WeightForm
from qnext.checkpoint.record_values import code_form, matrix_form
from qnext.config import ModelConfig
from qnext.planning import list_parameters
from qnext.planning.expert_records import MatrixForm
from qnext.quant.scheme import make_policy

GROUP_SIZE = 32


def packed_parameters(config: ModelConfig, file: GgufFile, entries: Iterable[GgufEntry]) -> dict[str, BlockType]:
    """The parameters that stay packed: all their tensors in the file have one of the two types, without a factor.

    These are only parameters that `qnext quantize` would pack. The embedding, small projections and mtp.fc are
    dequantised.
    """
    head = "keep" if config.tie_word_embeddings else "int8"
    policy = make_policy("int8-g32", head=head, is_tied=config.tie_word_embeddings)
    kinds: dict[str, set[BlockType]] = {}
    with_factor: set[str] = set()
    for entry in entries:
        kinds.setdefault(entry.parameter.name, set()).add(file.tensors[entry.name].block)
        if scale_name(entry.name) in file.tensors:
            with_factor.add(entry.parameter.name)
    packed: dict[str, BlockType] = {}
    for name, info in list_parameters(config).items():
        block = next(iter(kinds[name]))
        if name in with_factor or len(kinds[name]) > 1 or block.name not in KEPT_BITS:
            continue
        if policy.scheme_of(info) is not None:
            packed[name] = block
    return packed


def weight_forms(
    config: ModelConfig, dtypes: Mapping[str, torch.dtype], packed: Mapping[str, BlockType]
) -> dict[str, WeightForm]:
    """What is written of each part, by name: `packed` parameters as their codes, the others in their dtype."""
    return {
        part.name: WeightForm(info, part, _form_of(packed[name]) if name in packed else matrix_form(dtypes[name]))
        for name, info in list_parameters(config).items()
        for part in disk_parts(info)
    }


def _form_of(block: BlockType) -> MatrixForm:
    return code_form(bits=KEPT_BITS[block.name], group_size=GROUP_SIZE, scale_dtype=torch.float16, has_zeros=False)
