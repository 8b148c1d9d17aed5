"""Tiny models of every family, and ways to damage their folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from qnext.checkpoint import save_model
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.header import read_header
from qnext.config import ModelConfig, preset
from qnext.model import CausalLM, initialize

BLOCK = 128


def tiny_configs() -> dict[str, ModelConfig]:
    """One config per family and ablation, no two sizes equal where the architecture allows it."""
    qnext = replace(
        preset("nano-5m"),
        vocab_size=300,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        partial_rotary_factor=0.5,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
        tie_word_embeddings=False,
        intermediate_size=40,
    )
    dense = replace(
        preset("qwen3-32b").with_layers(2),
        vocab_size=310,
        hidden_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_size=56,
        bos_token_id=None,
        eos_token_id=3,
    )
    return {
        "next": qnext,
        "next tied": replace(qnext, tie_word_embeddings=True, eos_token_id=(5, 4)),
        "next, dense layer": replace(qnext, mlp_only_layers=(1,), num_nextn_predict_layers=0),
        "moe": replace(dense, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20),
        "moe tied": replace(
            dense, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, tie_word_embeddings=True
        ),
        "dense": dense,
        "dense tied": replace(dense, tie_word_embeddings=True),
    }


CONFIGS = tiny_configs()


def tiny_model(name: str = "next", *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Initialised, and then every parameter disturbed, so that no norm weight or bias is a constant."""
    model = CausalLM(CONFIGS[name])
    initialize(model, seed=7)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.to(dtype)


def tiny_folder(path: Path, name: str = "next", *, max_shard_bytes: int = 60_000) -> Path:
    """A folder of several shards."""
    path.mkdir(parents=True, exist_ok=True)
    for file, content in _files_of(name, max_shard_bytes).items():
        (path / file).write_bytes(content)
    return path


@cache
def _files_of(name: str, max_shard_bytes: int) -> dict[str, bytes]:
    """Made once: many tests start from the same folder."""
    with TemporaryDirectory() as root:
        save_model(tiny_model(name), Path(root) / "m", max_shard_bytes=max_shard_bytes)
        return {path.name: path.read_bytes() for path in (Path(root) / "m").iterdir()}


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes a key."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def write_file(path: Path, header: str | bytes, data: bytes, *, length: int | None = None) -> Path:
    """A safetensors file with any header, true or not."""
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


Change = Callable[[dict[str, Tensor]], object]


def rewrite(folder: Path, change: Change) -> None:
    """Merge all shards into one file, after `change` was let loose on the tensors."""
    tensors = read_tensors(folder)
    change(tensors)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    with TensorFiles(folder) as files:
        return {name: files.read(name).clone() for name in files.tensors}


class SavedModel(NamedTuple):
    """A folder in memory: many tests start from the same one. `expected` is what packed weights stand for, in fp32."""

    side_files: dict[str, bytes]
    tensors: dict[str, Tensor]
    expected: dict[str, Tensor]

    @classmethod
    def of(cls, model: CausalLM, dtype: torch.dtype) -> SavedModel:
        with TemporaryDirectory() as root:
            folder = Path(root) / "m"
            save_model(model, folder, dtype=dtype)
            side_files = {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" not in path.name}
            return cls(side_files, read_tensors(folder), {})

    def write(self, folder: Path, change: Change | None = None) -> dict[str, Tensor]:
        """A folder of one file, after `change` was let loose on the tensors; returns what is expected of it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.side_files.items():
            (folder / name).write_bytes(content)
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        if change is not None:
            change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return dict(self.expected)


def poke(folder: Path, name: str, value: Tensor) -> None:
    """Overwrite the first element of a tensor in its file."""
    info = read_header(shard_of(folder, name))[name]
    raw = value.reshape(1).view(torch.uint8).numpy().tobytes()
    with info.file.open("r+b") as file:
        file.seek(info.start)
        file.write(raw)


def quantize_block(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 weight, scales): each block of 128 x 128 has its largest magnitude on 448. One block at a time."""
    out_dim, in_dim = weight_OI.shape
    scales = torch.empty(-(-out_dim // BLOCK), -(-in_dim // BLOCK))
    quantized = torch.empty(out_dim, in_dim, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            block = weight_OI[rows, columns].float()
            scales[i, j] = block.abs().max() / 448.0
            quantized[rows, columns] = (block / scales[i, j]).to(torch.float8_e4m3fn)
    return quantized, scales


def make_fp8(folder: Path, *, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Turn a folder into the official FP8 form; returns the dequantised weights in fp32, by name on disk."""
    expected: dict[str, Tensor] = {}
    kept = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "in_proj_ba", "conv1d", "mtp.fc")

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name].to(torch.bfloat16)
            if tensors[name].dim() != 2 or any(mark in name for mark in kept):
                continue
            tensors[name], scales = quantize_block(tensors[name])
            scales = scales.to(scale_dtype)
            tensors[name + "_scale_inv"] = scales
            expanded = torch.kron(scales.float(), torch.ones(BLOCK, BLOCK))
            rows, columns = tensors[name].shape
            expected[name] = tensors[name].float() * expanded[:rows, :columns]

    rewrite(folder, change)
    edit_config(
        folder,
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        },
    )
    return expected
