"""A tiny model whose matrices have inputs in groups of 32, and what a quantised folder of it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qnext.checkpoint import save_model
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.load import empty_model
from qnext.checkpoint.names import disk_parts
from qnext.config import ModelConfig
from qnext.model import CausalLM, initialize
from qnext.planning import list_parameters

from .folders import CONFIGS

# value heads * value dim = 96, heads * head dim = 96: inner sizes differ from one another and from the hidden size
NEXT = replace(
    CONFIGS["next"],
    hidden_size=64,
    linear_value_head_dim=16,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=96,
    max_position_embeddings=128,
    initializer_range=0.06,
)
DENSE = replace(CONFIGS["dense"], hidden_size=64, intermediate_size=160, initializer_range=0.06)


def save_random(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype = torch.float32, embedding_rank: int | None = None
) -> Path:
    """With `embedding_rank` the inputs of the first layers lie in few directions, as those of trained models do."""
    model = CausalLM(config)
    initialize(model, seed=5)
    if embedding_rank is not None:
        generator = torch.Generator().manual_seed(6)
        factors = [
            torch.randn(shape, generator=generator)
            for shape in ((config.vocab_size, embedding_rank), (embedding_rank, config.hidden_size))
        ]
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(factors[0] @ factors[1])
    save_model(model.to(dtype), folder, max_shard_bytes=200_000)
    return folder


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the disk by the name it has unquantised, unpacked by arithmetic on the words."""
    found: dict[str, Tensor] = {}
    with TensorFiles(folder) as files:
        for name in files.tensors:
            if name.endswith(("_scale", "_shape")):
                continue
            values = files.read(name).clone()
            if name.endswith("_packed"):
                name = name.removesuffix("_packed")
                scale, shape = files.read(name + "_scale"), files.read(name + "_shape").tolist()
                bits = values.shape[1] * 32 // shape[1]
                shifts = torch.arange(0, 32, bits, dtype=torch.int32)
                codes = ((values[..., None] >> shifts) & (2**bits - 1)).flatten(1) - 2 ** (bits - 1)
                values = codes.float() * scale.float().repeat_interleave(shape[1] // scale.shape[1], dim=1)
            found[name] = values
    return found


def model_of(folder: Path, config: ModelConfig) -> CausalLM:
    """The whole model in fp32, from dequantised weights."""
    weights = stored_weights(folder)
    model = empty_model(config, dtypes=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, info in list_parameters(config).items():
            for part in disk_parts(info):
                parameters[name][part.place] = weights[part.name].float()
    return model
