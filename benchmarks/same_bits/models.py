"""Random models, as folders that either commit writes and reads for itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from same_bits.digests import folder_digest
from same_bits.house import command_line, find

import numpy as np

NUM_CONFIGURATIONS = 20
FORMS = ("float32", "bfloat16", "int4-g32")
LINEAR, FULL = "linear_attention", "full_attention"


def is_grouped(index: int) -> bool:
    """Whether the sizes are whole groups of 32, so that matrices can be quantised and every kernel runs."""
    return index % 4 != 3


def forms_of(index: int) -> tuple[str, ...]:
    return FORMS if is_grouped(index) else FORMS[:2]


def random_fields(index: int) -> dict[str, Any]:
    """The numbers of one configuration; every ablation and every kind of layer comes up among twenty."""
    rng = random.Random(f"configuration {index}")
    grouped = is_grouped(index)

    def size(whole: tuple[int, ...], odd: tuple[int, ...]) -> int:
        return rng.choice(whole if grouped else odd)

    num_layers = rng.randint(2, 5)
    interval = rng.randint(2, 4)
    layer_types = (
        tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(num_layers)),
        (LINEAR,) * num_layers,
        (FULL,) * num_layers,
        tuple(rng.choice((FULL, LINEAR)) for _ in range(num_layers)),
        tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(interval)),
    )[index % 5]
    num_kv_heads, num_key_heads = rng.choice((1, 2)), rng.choice((1, 2, 3))
    fields: dict[str, Any] = {
        "vocab_size": rng.randint(90, 130),
        "hidden_size": size((64, 96, 128), (40, 48, 52)),
        "layer_types": layer_types,
        "num_attention_heads": num_kv_heads * rng.choice((1, 2, 3)),
        "num_key_value_heads": num_kv_heads,
        "head_dim": size((32, 64), (8, 16, 24)),
        "partial_rotary_factor": rng.choice((0.25, 0.5, 1.0)),
        "rope_theta": rng.choice((1e4, 1e6)),
        "max_position_embeddings": 512,
        "attention_bias": rng.random() < 0.25,
        "attention_output_gate": rng.random() < 0.8,
        "intermediate_size": size((96, 160), (52, 28)),
        "norm_topk_prob": rng.random() < 0.7,
        "rms_norm_eps": rng.choice((1e-6, 1e-5)),
        "zero_centered_norm": rng.random() < 0.8,
        "tie_word_embeddings": rng.random() < 0.25,
        "num_nextn_predict_layers": int(index % 3 != 1),
        "mtp_uses_final_norm": rng.random() < 0.7,
        "initializer_range": rng.choice((0.1, 0.15, 0.25)),
        "eos_token_id": 3,
    }
    if LINEAR in layer_types:
        fields |= {
            "linear_num_key_heads": num_key_heads,
            "linear_num_value_heads": num_key_heads * rng.choice((1, 2)),
            "linear_key_head_dim": size((16, 32), (7, 8, 20)),
            "linear_value_head_dim": size((32, 64), (5, 12, 20)),
            "linear_conv_kernel_dim": rng.choice((2, 4, 4, 5)),
        }
    if rng.random() < 0.75:
        num_experts = rng.choice((4, 5, 8, 17))
        fields |= {
            "num_experts": num_experts,
            "num_experts_per_tok": rng.randint(1, min(4, num_experts)),
            "moe_intermediate_size": size((32, 64), (9, 20)),
            "shared_expert_intermediate_size": rng.choice((0, size((32, 64), (11, 28)))),
            "decoder_sparse_step": rng.choice((1, 1, 2)),
            "mlp_only_layers": rng.choice(((), (), (1,))),
        }
    return fields


def make_folders(index: int, parent: Path, *, wants_yarn: bool) -> tuple[dict[str, Path], dict[str, Any]]:
    """A folder for each form, fp32 and bf16 sharing one, and the digests of their files."""
    import torch

    fields = random_fields(index)
    if wants_yarn:
        scaling = find("YarnScaling", "qnext.config")
        fields["rope_scaling"] = scaling(factor=4.0, original_max_position_embeddings=128)
    config = find("ModelConfig", "qnext.config")(**fields)
    folder = parent / f"model-{index}"
    find("create_folder", "qnext.checkpoint")(config, folder, seed=index, dtype=torch.float32)
    digests: dict[str, Any] = {"as made": folder_digest(folder)}
    _enliven(folder / "model.safetensors", index)
    folders = {"float32": folder, "bfloat16": folder}
    if is_grouped(index):
        folders["int4-g32"] = parent / f"model-{index}-int4"
        command_line("quantize", folder, folders["int4-g32"], "--scheme", "int4-g32")
        digests["int4-g32"] = folder_digest(folders["int4-g32"])
    return folders, digests


def _enliven(file: Path, index: int) -> None:
    """Norms, biases and time constants get values that are not trivial. In some models each token all but decides the
    next one, in trunk and MTP layer alike, so that drafts are often right."""
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(index)
    tensors = {name: values.copy() for name, values in sorted(load_file(file).items())}

    def noise(values: np.ndarray, scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(values.shape)).astype(np.float32)

    for name, values in tensors.items():
        if name.endswith(".bias") or "norm" in name.rsplit(".", 2)[-2]:
            values += noise(values, 0.3)
        elif name.endswith("A_log"):
            values[:] = noise(values, 1.0)
        elif name.endswith("conv1d.weight"):
            values[:] = noise(values, 0.5)
    if "mtp.fc.weight" in tensors and index % 2 == 0:
        for name, values in tensors.items():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                values *= 0.1
        tensors["model.embed_tokens.weight"] *= 4
        fc = tensors["mtp.fc.weight"]
        fc[:] = 0
        fc[:, : fc.shape[0]] = np.eye(fc.shape[0], dtype=np.float32)
        tensors["mtp.norm.weight"][:] = tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
