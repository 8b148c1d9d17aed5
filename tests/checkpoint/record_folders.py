"""Folders whose experts are records, made by plain arithmetic and not by the code under test.

Legend: F outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qnext.checkpoint import save_model
from qnext.checkpoint.files import TensorFiles
from qnext.config import ModelConfig
from qnext.model import CausalLM, initialize

from .folders import CONFIGS, edit_config
from .packed_folders import Codes, PackedForm, pack, quantization_config, random_codes

# Inner sizes are multiples of 32; layers and MTP have four experts.
RECORD_CONFIG: ModelConfig = replace(
    CONFIGS["next"],
    hidden_size=64,
    moe_intermediate_size=96,
    shared_expert_intermediate_size=32,
    num_experts=4,
    linear_value_head_dim=16,
)
PAGE = 4096


class RecordForm(NamedTuple):
    """A dtype of plain numbers, or codes."""

    dtype: str  # of the numbers, or of the scales
    bits: int = 0
    group_size: int = 0
    has_zeros: bool = False

    def __str__(self) -> str:
        return f"int{self.bits}-g{self.group_size}-{self.dtype}{'-zeros' * self.has_zeros}" if self.bits else self.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def described(self) -> dict[str, Any]:
        if not self.bits:
            return {"dtype": self.dtype}
        described = {"dtype": f"int{self.bits}", "group_size": self.group_size, "scale_dtype": self.dtype}
        return described | {"has_zeros": self.has_zeros}


FORMS = [
    RecordForm("float32"),
    RecordForm("bfloat16"),
    RecordForm("float16"),
    RecordForm("float16", 4, 32),
    RecordForm("bfloat16", 4, 16, True),
    RecordForm("float32", 8, 32),
    RecordForm("float16", 8, 32, True),
]


class Folder(NamedTuple):
    """What a folder was made of, by name on disk: plain numbers, or codes."""

    experts: dict[str, Tensor | Codes]
    layers: list[str]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def in_panels(values_FG: Tensor, per_word: int = 1) -> Tensor:
    """[F, G] -> [F / 16, G / per_word, 16, per_word]"""
    return values_FG.unflatten(0, (-1, 16)).unflatten(2, (-1, per_word)).transpose(1, 2)


def matrix_parts(weights: list[Tensor | Codes], form: RecordForm) -> list[bytes]:
    """Of the matrices below each other."""
    if not form.bits:
        return [b"".join(raw(weight) for weight in weights if isinstance(weight, Tensor))]
    codes, scales, zeros = (
        torch.cat([getattr(weight, key) for weight in weights]) for key in ("codes", "scales", "zeros")
    )
    words = in_panels(codes, 8 if form.bits == 4 else 4)
    if form.bits == 4:
        words = words[..., :4] | (words[..., 4:] << 4)
    parts = [raw(words.to(torch.uint8)), raw(in_panels(scales))]
    return [*parts, raw(in_panels(zeros).to(torch.uint8))] if form.has_zeros else parts


def record_of(
    gate: Tensor | Codes, up: Tensor | Codes, down: Tensor | Codes, forms: tuple[RecordForm, RecordForm]
) -> bytes:
    record = b""
    for part in [*matrix_parts([gate, up], forms[0]), *matrix_parts([down], forms[1])]:
        record += bytes(-len(record) % 64) + part
    return record + bytes(-len(record) % PAGE)


def save_aligned(tensors: dict[str, Tensor], path: Path, *, alignment: int = PAGE) -> None:
    """A safetensors file whose data begins at a multiple of `alignment`."""
    names = {torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32"}
    names |= {torch.bfloat16: "BF16", torch.float16: "F16"}
    entries, position = {}, 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % alignment)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(map(raw, tensors.values())))


def record_folder(
    path: Path,
    form: RecordForm,
    *,
    down: RecordForm | None = None,
    config: ModelConfig = RECORD_CONFIG,
    dtype: torch.dtype = torch.bfloat16,
    alignment: int = PAGE,
    plain: Path | None = None,
    change: Callable[[dict[str, Tensor], dict[str, Tensor]], object] | None = None,
) -> Folder:
    """Write a folder: dense tensors in one shard, records in the next.

    In `plain` the same numbers are written as an ordinary folder. `change` is let loose on the dense tensors and on
    those of the records before they are written.
    """
    forms = (form, form if down is None else down)
    model = CausalLM(config)
    initialize(model, seed=7)
    save_model(model, path, dtype=dtype)
    with TensorFiles(path) as files:
        tensors = {name: files.read(name) for name in files.tensors}
    (path / "model.safetensors").unlink()
    experts: dict[str, Tensor | Codes] = {}
    for seed, name in enumerate(sorted(name for name in tensors if ".experts." in name)):
        each = forms[name.endswith("down_proj.weight")]
        shape = tensors[name].shape
        if each.bits:
            like = PackedForm("", "", each.bits, each.group_size, not each.has_zeros)
            experts[name] = random_codes(shape, like, scale_dtype=each.torch_dtype, seed=seed)
        else:
            experts[name] = tensors[name].to(each.torch_dtype)
        del tensors[name]
    layers = sorted({name.partition(".mlp.")[0] for name in experts}, key=lambda name: (name.startswith("mtp"), name))
    records: dict[str, Tensor] = {}
    for layer in layers:
        found = [
            record_of(*(experts[f"{layer}.mlp.experts.{e}.{key}_proj.weight"] for key in ("gate", "up", "down")), forms)
            for e in range(config.num_experts)
        ]
        stacked = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(found), -1).copy()
        records[f"{layer}.mlp.experts.records"] = torch.from_numpy(stacked)
        records[f"{layer}.mlp.experts.record_checksums"] = torch.tensor([zlib.crc32(record) for record in found])
    if plain is not None:
        _write_plain(plain, path, tensors, experts, forms)
    if change is not None:
        change(tensors, records)
    save_aligned(tensors, path / "model-00001-of-00002.safetensors", alignment=8)
    ordered = dict(sorted(records.items(), key=lambda item: item[1].dim(), reverse=True))
    save_aligned(ordered, path / "model-00002-of-00002.safetensors", alignment=alignment)
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(records, "model-00002-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    group = {"gate_up": forms[0].described(), "down": forms[1].described(), "layers": layers}
    block = {"quant_method": "expert-records", "version": 1, "groups": [group], "rest": None}
    edit_config(path, quantization_config=block)
    return Folder(experts, layers)


def _write_plain(
    path: Path,
    like: Path,
    dense: dict[str, Tensor],
    experts: dict[str, Tensor | Codes],
    forms: tuple[RecordForm, RecordForm],
) -> None:
    """The same numbers as compressed-tensors and plain floats have them."""
    path.mkdir()
    for name in ("config.json", "generation_config.json"):
        (path / name).write_bytes((like / name).read_bytes())
    tensors = dict(dense)
    for name, weight in experts.items():
        form = forms[name.endswith("down_proj.weight")]
        if isinstance(weight, Tensor):
            tensors[name] = weight
        else:
            packed = PackedForm("compressed-tensors", "pack-quantized", form.bits, form.group_size, not form.has_zeros)
            tensors |= pack(name.removesuffix(".weight"), weight, packed)
    save_aligned(tensors, path / "model.safetensors", alignment=8)
    coded = [form for form in forms if form.bits]
    if coded:
        form = coded[0]
        packed = PackedForm("compressed-tensors", "pack-quantized", form.bits, form.group_size, not form.has_zeros)
        block = quantization_config(packed)
        block["config_groups"]["group_0"]["targets"] = [r"re:.*\.experts\.\d+\..*"]
        edit_config(path, quantization_config=block)
