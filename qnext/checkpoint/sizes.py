"""Sizes that the names and shapes of tensors show, for keys that a config.json leaves out. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qnext.checkpoint.tensor_info import TensorInfo
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION

_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.(.*)")
_WEIGHTS = ("BF16", "F16", "F32", "F8_E4M3")
_CHUNK = 1 << 20


def sizes_of(tensors: Mapping[str, TensorInfo], *, is_tied: bool) -> dict[str, Any]:
    """Values of those keys of config.json that the tensors of a folder decide.

    `is_tied` is what config.json says about the head. Only where it is true are embedding and head compared, number by
    number.
    """
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is not None:
            # bitsandbytes may keep its bytes as numbers of any dtype.
            is_weight = info.dtype in _WEIGHTS and f"{name}.absmax" not in tensors
            shape = info.shape if is_weight else ()
            layers.setdefault(int(match[1]), {})[match[2]] = shape
    found = _of_embedding(tensors, is_tied=is_tied)
    if sorted(layers) == list(range(len(layers))) and layers:
        found["num_hidden_layers"] = len(layers)
        found["layer_types"] = [
            LINEAR_ATTENTION if any(key.startswith("linear_attn.") for key in keys) else FULL_ATTENTION
            for keys in (layers[i] for i in range(len(layers)))
        ]
        found["mlp_only_layers"] = [i for i in layers if any(key.startswith("mlp.gate_proj.") for key in layers[i])]
        found["mlp_only_layers"].sort()
    experts = [
        int(key.split(".")[2])
        for keys in layers.values()
        for key in keys
        if key.startswith("mlp.experts.") and key.split(".")[2].isdigit()
    ]
    if experts:
        found["num_experts"] = max(experts) + 1
    shapes: dict[str, tuple[int, ...]] = {}
    for keys in layers.values():
        shapes.update({key: shape for key, shape in keys.items() if shape})
    found.update(_of_layers(shapes))
    return found


def _of_embedding(tensors: Mapping[str, TensorInfo], *, is_tied: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    embedding = tensors.get("model.embed_tokens.weight")
    head = tensors.get("lm_head.weight")
    if embedding is None or len(embedding.shape) != 2:
        return found
    rows, found["hidden_size"] = embedding.shape
    if head is None or head.shape[:1] == (rows,):
        found["vocab_size"] = rows
    if not any(name.startswith("lm_head.") for name in tensors):
        found["tie_word_embeddings"] = True
    elif is_tied and head is not None and not _are_equal(head, embedding):
        found["tie_word_embeddings"] = False
    return found


def _of_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | bool]:
    """From the tensors of layers, by their names inside a layer."""
    found: dict[str, int | bool] = {}
    for key, (name, axis) in {
        "head_dim": ("self_attn.q_norm.weight", 0),
        "intermediate_size": ("mlp.gate_proj.weight", 0),
        "moe_intermediate_size": ("mlp.experts.0.gate_proj.weight", 0),
        "shared_expert_intermediate_size": ("mlp.shared_expert.gate_proj.weight", 0),
        "linear_num_value_heads": ("linear_attn.A_log", 0),
        "linear_value_head_dim": ("linear_attn.norm.weight", 0),
        "linear_conv_kernel_dim": ("linear_attn.conv1d.weight", 2),
    }.items():
        if len(shapes.get(name, ())) > axis:
            found[key] = shapes[name][axis]
    head_dim = found.get("head_dim", 0)
    for key, name, axis in (
        ("num_attention_heads", "self_attn.o_proj.weight", 1),
        ("num_key_value_heads", "self_attn.k_proj.weight", 0),
    ):
        shape = shapes.get(name, ())
        if head_dim and len(shape) == 2 and shape[axis] % head_dim == 0:
            found[key] = shape[axis] // head_dim
    if shapes:
        found["attention_bias"] = "self_attn.q_proj.bias" in shapes
    return found


def _are_equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.num_bytes
        while left:
            size = min(left, _CHUNK)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True
