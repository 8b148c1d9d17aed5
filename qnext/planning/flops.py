"""Floating-point operations by part: of a token, of a prompt, and of training. No torch.

A multiply-add counts two. Matrices count by the list of parameters, so no size is written twice. Norms, activations,
softmax and rotations are left out. Attention is causal: token t of a sequence sees t + 1 tokens, itself included.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from math import prod
from typing import Literal

from qnext.config import ModelConfig
from qnext.planning.parameters import Kind, list_parameters

# The delta rule token by token (decoding, and the native kernels), or in chunks that a GPU or training computes.
DeltaForm = Literal["recurrent", "chunked"]
DELTA_CHUNK = 64  # tokens
FORWARD_PASSES, RECOMPUTED_PASSES = 3, 4  # of training: forward, two of backward, and forward again

_PART_OF_KIND = {
    **dict.fromkeys((Kind.QUERY, Kind.KEY, Kind.VALUE, Kind.ATTENTION_OUT), "attention_projections"),
    **dict.fromkeys((Kind.DELTA_QKVZ, Kind.DELTA_BA, Kind.CONVOLUTION, Kind.DELTA_OUT), "delta_projections"),
    **dict.fromkeys((Kind.MLP_GATE, Kind.MLP_UP, Kind.MLP_DOWN), "dense_mlp"),
    Kind.ROUTER: "router",
    **dict.fromkeys((Kind.EXPERTS_GATE_UP, Kind.EXPERTS_DOWN), "experts"),
    **dict.fromkeys((Kind.SHARED_GATE, Kind.SHARED_UP, Kind.SHARED_DOWN, Kind.SHARED_SCALE), "shared_experts"),
    Kind.MTP_FC: "mtp",
}


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of each part. `mtp` is the whole MTP module, its own pass through the head included."""

    attention_projections: float = 0
    attention_core: float = 0
    delta_projections: float = 0
    delta_core: float = 0
    router: float = 0
    experts: float = 0
    shared_experts: float = 0
    dense_mlp: float = 0
    head: float = 0
    mtp: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def without_head(self) -> float:
        """Of the trunk's layers."""
        return self.total - self.head - self.mtp

    @property
    def cores(self) -> float:
        """Of the parts that multiply no weights, but what sequences carry."""
        return self.attention_core + self.delta_core

    def times(self, factor: float) -> ForwardFlops:
        return ForwardFlops(**{field.name: factor * getattr(self, field.name) for field in fields(self)})


def token_flops(
    config: ModelConfig, *, context: float, form: DeltaForm = "recurrent", with_mtp: bool = False
) -> ForwardFlops:
    """Of one token that sees `context` tokens, itself included; of many, on average."""
    parts: Counter[str] = Counter()
    mtp = 0
    for info in list_parameters(config).values():
        part = _PART_OF_KIND.get(info.kind)
        if part is None:
            continue
        numbers = prod(info.shape)
        if info.expert_axis is not None:
            numbers = numbers * config.num_experts_per_tok // config.num_experts
        if info.part == "mtp":
            mtp += 2 * numbers
        else:
            parts[part] += 2 * numbers
    head = 2 * config.vocab_size * config.hidden_size
    attention = 4 * config.num_attention_heads * config.head_dim * context
    return ForwardFlops(
        **parts,
        attention_core=config.num_full_layers * attention,
        delta_core=config.num_linear_layers * _delta_core(config, form),
        head=head,
        mtp=mtp + attention + head if with_mtp and config.num_nextn_predict_layers else 0,
    )


def _delta_core(config: ModelConfig, form: DeltaForm) -> float:
    """Of a layer and token.

    Token by token, for each number of the state: decay 1, read 2, write 2, read out 2. In chunks of C tokens: the
    passes between chunks 6 K V, the products inside one 2 C (3 K + 2 V), the triangular system 2 C^2 / 3.
    """
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    if form == "recurrent":
        return 7 * heads * key * value
    inside = 2 * DELTA_CHUNK * (3 * key + 2 * value) + 2 * DELTA_CHUNK**2 / 3
    return heads * (6 * key * value + inside)


def prefill_flops(
    config: ModelConfig, num_tokens: int, *, start: int = 0, form: DeltaForm = "recurrent"
) -> ForwardFlops:
    """Of all `num_tokens` tokens of a prompt behind `start` others. The head computes the last token alone."""
    per_token = token_flops(config, context=start + (num_tokens + 1) / 2, form=form)
    each = {field.name: num_tokens * getattr(per_token, field.name) for field in fields(per_token)}
    return ForwardFlops(**{**each, "head": per_token.head})


def training_flops(config: ModelConfig, *, sequence_length: int, recomputes: bool = False) -> ForwardFlops:
    """Of a token in training, MTP included where the model has it: forward, and backward of twice that; with
    `recomputes` forward once more, because activations were not kept."""
    forward = token_flops(config, context=(sequence_length + 1) / 2, form="chunked", with_mtp=True)
    return forward.times(RECOMPUTED_PASSES if recomputes else FORWARD_PASSES)


def forward_flops_per_token(config: ModelConfig, *, context: int, with_head: bool = True) -> float:
    """Of the trunk for one token that sees `context` tokens, itself included."""
    found = token_flops(config, context=context)
    return found.total if with_head else found.without_head


def training_compute_ratio(
    one: ModelConfig,
    other: ModelConfig,
    *,
    sequence_length: int,
    tokens: float = 1.0,
    other_tokens: float = 1.0,
    with_mtp: bool = True,
) -> float:
    """How much arithmetic pretraining `one` on `tokens` takes, over that of `other` on `other_tokens`.

    A ratio of operations, not of hours: machines reach another share of their peak on each of the two.
    """
    context = (sequence_length + 1) / 2
    ours, theirs = (
        token_flops(config, context=context, form="chunked", with_mtp=with_mtp).total for config in (one, other)
    )
    return ours * tokens / (theirs * other_tokens)
