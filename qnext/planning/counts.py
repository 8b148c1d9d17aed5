"""Parameters by part, and bytes of a configuration. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from qnext.config import ModelConfig
from qnext.planning.parameters import list_parameters

# Bytes of one element, under the names that torch and config.json use.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
KV_SCALE_BYTES = 4  # int8 keys and values: an fp32 scale per token and head


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of each part. `mtp` is the whole MTP module; the other parts are the trunk's and the head's.

    Attention and delta net include their inner norms, experts are the routed ones, and `head` is zero where it is
    tied to the embedding.
    """

    embedding: int
    head: int
    attention: int
    delta_net: int
    dense_mlp: int
    router: int
    experts: int
    shared_experts: int
    norms: int
    mtp: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def trunk(self) -> int:
        """Everything except the MTP module: what a model card calls the size of a model."""
        return self.total - self.mtp


@dataclass(frozen=True)
class ActiveCounts:
    """Weights that one token multiplies in the trunk. Embedding rows are looked up, not multiplied."""

    without_head: int
    with_head: int


@dataclass(frozen=True)
class StateBytes:
    """What the Gated DeltaNet layers keep per sequence, whatever its length."""

    recurrent: int
    conv: int

    @property
    def total(self) -> int:
        return self.recurrent + self.conv


def count_parameters(config: ModelConfig) -> ParameterCounts:
    counts = dict.fromkeys((field.name for field in fields(ParameterCounts)), 0)
    for info in list_parameters(config).values():
        counts[info.part] += prod(info.shape)
    return ParameterCounts(**counts)


def count_active(config: ModelConfig) -> ActiveCounts:
    """Active parameters per token. Of the routed experts only the chosen ones count."""
    counts = count_parameters(config)
    experts = counts.experts * config.num_experts_per_tok // config.num_experts if config.num_experts else 0
    without_head = counts.trunk - counts.embedding - counts.head - counts.experts + experts
    return ActiveCounts(without_head, without_head + config.vocab_size * config.hidden_size)


def weight_bytes(config: ModelConfig, *, dtype: str = "bfloat16") -> int:
    """Bytes of all parameters, MTP included, in one dtype."""
    return count_parameters(config).total * DTYPE_BYTES[dtype]


def kv_bytes_per_token(config: ModelConfig, *, dtype: str = "bfloat16", with_mtp: bool = False) -> int:
    """Bytes of keys and values per token over all full-attention layers. `with_mtp` adds those of the MTP layer."""
    layers = config.num_full_layers + (config.num_nextn_predict_layers if with_mtp else 0)
    head_bytes = config.head_dim * DTYPE_BYTES[dtype] + (KV_SCALE_BYTES if dtype == "int8" else 0)
    return layers * 2 * config.num_key_value_heads * head_bytes


def state_bytes_per_sequence(
    config: ModelConfig, *, state_dtype: str = "float32", conv_dtype: str = "float32"
) -> StateBytes:
    """Bytes of recurrent and convolution state per sequence over all Gated DeltaNet layers."""
    layers = config.num_linear_layers
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    conv = config.linear_conv_dim * max(config.linear_conv_kernel_dim - 1, 0)
    return StateBytes(layers * state * DTYPE_BYTES[state_dtype], layers * conv * DTYPE_BYTES[conv_dtype])


def distinct_experts(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """Experts of a layer that so many tokens use together, where each chooses evenly: others use fewer.

    >>> round(distinct_experts(512, 10, 4))
    39
    """
    if num_tokens == 1 or not num_experts:
        return experts_per_token
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** num_tokens)
