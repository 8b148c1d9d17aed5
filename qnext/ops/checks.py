"""Checks that every backend makes: shapes that do not fit together are a ValueError.

Numbers that are out of range, for instance of a token or a slot, are an IndexError, which the kernels raise themselves.
Legend: T tokens, D hidden or inputs, F outputs or expert width, E experts, X and Y widths of projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.records import AttentionWeights, DeltaWeights, ExpertsLora, Rope
from qnext.ops.weights import Weight


def check_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"tensors of shapes {list(a.shape)} and {list(b.shape)} do not fit together")


def check_linear(x_TD: Tensor, weight_FD: Tensor | Weight) -> None:
    if x_TD.shape[-1] != weight_FD.shape[-1]:
        raise ValueError(f"rows of {x_TD.shape[-1]} numbers do not fit a weight of {weight_FD.shape[-1]} inputs")


def check_norm(x: Tensor, weight_D: Tensor) -> None:
    if x.shape[-1:] != weight_D.shape:
        raise ValueError(f"rows of {x.shape[-1]} numbers do not fit a norm of {list(weight_D.shape)}")


def check_experts(x_TD: Tensor, gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight) -> None:
    gate_up, down = list(gate_up_E2FD.shape), list(down_EDF.shape)
    num_experts, hidden, width = down
    if gate_up != [num_experts, 2 * width, hidden] or x_TD.shape[1] != hidden:
        raise ValueError(f"experts of shapes {gate_up} and {down} do not fit rows of {x_TD.shape[1]}")


def check_lora(gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight, lora: ExpertsLora) -> None:
    num_experts, places = down_EDF.shape[0], lora.places_E
    count = num_experts if places is None else int(places.max()) + 1
    for name, part, weight in (("gate_up", lora.gate_up, gate_up_E2FD), ("down", lora.down, down_EDF)):
        if part is None:
            continue
        outputs, inputs = weight.shape[1:]
        rank = part.A.shape[1]
        shared, own = (part.A, part.B) if name == "gate_up" else (part.B, part.A)
        fits = part.A.shape[1:] == (rank, inputs) and part.B.shape[1:] == (outputs, rank)
        if not fits or len(own) != count or len(shared) not in (1, count):
            raise ValueError(f"factors {list(part.A.shape)}, {list(part.B.shape)} do not fit {count} experts' {name}")
    if places is not None and (places.shape != (num_experts,) or places.dtype != torch.int64):
        raise ValueError(f"places of {list(places.shape)} {places.dtype} do not number {num_experts} experts")


def check_route(logits_TE: Tensor, top_k: int, load_E: Tensor | None, chosen_TA: Tensor | None) -> None:
    num_tokens, num_experts = logits_TE.shape
    if not 0 < top_k <= num_experts:
        raise ValueError(f"cannot choose {top_k} of {num_experts} experts")
    if load_E is not None and (load_E.shape != (num_experts,) or load_E.dtype != torch.int64):
        raise ValueError(f"a load of {list(load_E.shape)} {load_E.dtype} does not count {num_experts} experts")
    if chosen_TA is not None and (chosen_TA.shape != (num_tokens, top_k) or chosen_TA.dtype != torch.int64):
        raise ValueError(f"a choice of {list(chosen_TA.shape)} {chosen_TA.dtype} is not {top_k} experts of each token")


def check_put_rows(rows_TD: Tensor, index_T: Tensor, table_ND: Tensor) -> None:
    if rows_TD.shape[1:] != table_ND.shape[1:] or index_T.shape != rows_TD.shape[:1]:
        shapes = [list(x.shape) for x in (rows_TD, index_T, table_ND)]
        raise ValueError(f"rows, places and a table of shapes {shapes} do not fit together")


def check_attention(
    q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, weights: AttentionWeights, rope: Rope, packing: Packing
) -> None:
    num_tokens, head_dim, half = packing.num_tokens, weights.head_dim, rope.cos.shape[1]
    num_kv_heads, of_query = k_TY.shape[1] // head_dim, head_dim * (2 if weights.has_gate else 1)
    num_heads = q_TX.shape[1] // of_query
    keys, angles = (num_tokens, num_kv_heads * head_dim), (num_tokens, half)
    _expect(k_TY.shape == keys == v_TY.shape, "keys and values", keys)
    fits = num_heads > 0 and num_heads % num_kv_heads == 0
    _expect(fits and q_TX.shape == (num_tokens, num_heads * of_query), "queries", (num_tokens, num_heads * of_query))
    _expect(rope.cos.shape == angles == rope.sin.shape and 2 * half <= head_dim, "cos and sin", angles)
    _expect(weights.k_norm_weight_K.shape == (head_dim,), "norm weights", (head_dim,))
    if not weights.scale > 0.0:
        raise ValueError(f"scale must be positive, not {weights.scale}")


def check_delta(qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, packing: Packing) -> None:
    num_tokens, num_heads, value_dim = len(qkvz_TX), weights.num_heads, weights.value_head_dim
    num_key_heads, key_dim, num_channels = weights.num_key_heads, weights.key_head_dim, len(weights.conv_weight_C1W)
    if (
        num_heads % num_key_heads
        or num_channels != 2 * num_key_heads * key_dim + num_heads * value_dim
        or qkvz_TX.shape[1] != num_channels + num_heads * value_dim
        or ba_TY.shape != (num_tokens, 2 * num_heads)
        or len(weights.dt_bias_H) != num_heads
        or num_tokens != packing.num_tokens
    ):
        raise ValueError(
            f"projections {tuple(qkvz_TX.shape)} and {tuple(ba_TY.shape)} do not fit {num_key_heads} key heads of "
            f"{key_dim}, {num_heads} value heads of {value_dim} and {num_channels} channels"
        )


def _expect(fits: bool, name: str, shape: tuple[int, ...]) -> None:
    if not fits:
        raise ValueError(f"{name} do not have the shape {list(shape)}")
