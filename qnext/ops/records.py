"""Arguments and results of ops that belong together.

Legend: T tokens, N sequences, D hidden, F expert width, H value heads, J key heads, K and V key and value head dims,
C channels of the convolution, W its width, R rotated dims.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qnext.ops.weights import Weight


class Rope(NamedTuple):
    """Rotations of the tokens, each [T, R / 2] fp32."""

    cos: Tensor
    sin: Tensor


class Norm(NamedTuple):
    """An RMSNorm of rows: see ops.rms_norm."""

    weight_D: Tensor
    eps: float
    zero_centered: bool


class NormedLinears(NamedTuple):
    """Rows after their norm, and their products with some matrices."""

    rows_TD: Tensor
    products: tuple[Tensor, ...]


class AttentionWeights(NamedTuple):
    """Gated attention between its projections: how queries and keys are normalised per head, gated and scaled."""

    q_norm_weight_K: Tensor
    k_norm_weight_K: Tensor
    eps: float
    zero_centered: bool  # norms multiply by 1 + weight
    has_gate: bool  # each head of q holds its query dims and then its gate dims
    scale: float  # of scores

    @property
    def head_dim(self) -> int:
        return self.q_norm_weight_K.shape[0]


class DeltaInputs(NamedTuple):
    """The inputs of the gated delta rule, token by token. Queries and keys have length one; see
    ops.gated_delta_rule."""

    q_TJK: Tensor
    k_TJK: Tensor
    v_THV: Tensor
    g_TH: Tensor  # log decay, at most 0
    beta_TH: Tensor  # in [0, 1]


class DeltaOutput(NamedTuple):
    o_THV: Tensor  # in the dtype of v
    state_NHKV: Tensor  # after the last token of each sequence, fp32, or fp64 for fp64 inputs


class DeltaWeights(NamedTuple):
    """Gated DeltaNet between its projections: convolution, gates and norm."""

    conv_weight_C1W: Tensor
    A_log_H: Tensor
    dt_bias_H: Tensor
    norm_weight_V: Tensor
    eps: float  # of the norm
    num_key_heads: int
    key_head_dim: int

    @property
    def num_heads(self) -> int:
        """Of values: H."""
        return self.A_log_H.shape[0]

    @property
    def value_head_dim(self) -> int:
        return self.norm_weight_V.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:4]


class ConvOutput(NamedTuple):
    y_TC: Tensor
    state_NWC: Tensor  # [N, W - 1, C] the last inputs of each sequence, oldest first


class Routing(NamedTuple):
    weights_TA: Tensor  # [T, top_k] fp32
    experts_TA: Tensor  # [T, top_k] int64


class NormedRoute(NamedTuple):
    """Rows after their norm, and the experts that their logits choose."""

    rows_TD: Tensor
    logits_TE: Tensor
    routing: Routing


class SharedExpert(NamedTuple):
    """An expert that every token passes through; each weight is a tensor or quantised."""

    gate_proj_FD: Tensor | Weight
    up_proj_FD: Tensor | Weight
    down_proj_DF: Tensor | Weight
    gate_1D: Tensor | None  # its output is scaled by sigmoid(gate x), or by one

    @property
    def weights(self) -> tuple[Tensor | Weight, Tensor | Weight, Tensor | Weight]:
        return self.gate_proj_FD, self.up_proj_FD, self.down_proj_DF


class MadeByShared(NamedTuple):
    """What a shared expert made of each token, and what scales that: sigmoid(gate x), or one."""

    x_TD: Tensor
    rows_TD: Tensor
    gate_1D: Tensor | None


class LowRank(NamedTuple):
    """A change of a matrix: scale * B A. Stacked for experts, where a stack of one matrix is shared by all of them."""

    A: Tensor  # [R, D] or [K or 1, R, D]
    B: Tensor  # [F, R] or [K or 1, F, R]
    scale: float


class ExpertsLora(NamedTuple):
    """Low-rank changes of routed experts. Only A of gate_up and B of down may be shared."""

    gate_up: LowRank | None
    down: LowRank | None
    places_E: Tensor | None = None  # int64: each expert's place in the stacks, ascending, or -1; None: its own number

    @property
    def parts(self) -> tuple[LowRank | None, LowRank | None]:
        return self.gate_up, self.down
