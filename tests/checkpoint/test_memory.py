"""Loading needs the memory of the weights and a little more, and takes files piece by piece."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import files as files_module
from qnext.checkpoint import load_model, packed_values
from qnext.checkpoint.files import ShardWriter, TensorFiles, TensorSpec
from qnext.checkpoint.names import disk_parts
from qnext.checkpoint.save import write_config
from qnext.config import ModelConfig, preset
from qnext.errors import CorruptCheckpoint
from qnext.ops import dequantize
from qnext.planning import list_parameters

from .folders import edit_config, make_fp8, tiny_folder
from .packed_folders import FORMS, PackedForm, is_packed_weight, packed_folder, quantization_config

needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of memory")

_MEASURE = """
import sys
import torch
from qnext.checkpoint import load_model
from qnext.model import held_bytes
from qnext.ops import set_num_threads

def high_water():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

set_num_threads(2)
before = high_water()
model = load_model(sys.argv[1])
growth = high_water() - before
print(held_bytes(model), growth, "torch._dynamo" in sys.modules)
"""


def _int4_folder(folder: Path, config: ModelConfig) -> None:
    """Random codes in groups of 32; the embedding and what else is no packed weight in bf16."""
    folder.mkdir()
    plan: dict[str, TensorSpec] = {}
    for info in list_parameters(config).values():
        for part in disk_parts(info):
            module, size = part.name.removesuffix(".weight"), tuple(part.shape)
            if is_packed_weight(part.name, torch.empty(size, device="meta")):
                plan[f"{module}.weight_packed"] = TensorSpec(torch.int32, (size[0], size[1] // 8))
                plan[f"{module}.weight_scale"] = TensorSpec(torch.bfloat16, (size[0], size[1] // 32))
                plan[f"{module}.weight_shape"] = TensorSpec(torch.int64, (2,))
            else:
                plan[part.name] = TensorSpec(torch.bfloat16, size)
    writer = ShardWriter(folder, plan)
    for name, spec in plan.items():
        if name.endswith("_shape"):
            packed = plan[name.removesuffix("_shape") + "_packed"].shape
            writer.write(name, torch.tensor([packed[0], packed[1] * 8]))
        elif spec.dtype == torch.int32:
            writer.write(name, torch.randint(-(2**31), 2**31, spec.shape, dtype=torch.int32))
        else:
            writer.write(name, torch.rand(spec.shape).to(torch.bfloat16))
    writer.finish()
    write_config(folder, config, dtype=torch.bfloat16)
    form = PackedForm("compressed-tensors", "pack-quantized", 4, 32)
    edit_config(folder, quantization_config=quantization_config(form))


@needs_proc
def test_loading_takes_the_memory_of_the_weights(tmp_path: Path) -> None:
    """Over 1,000 tensors of a few pages, whose surroundings a kernel maps too, and two of 50 MB."""
    config = dataclasses.replace(
        preset("nano-5m").with_layers(2),
        vocab_size=50_000,
        hidden_size=512,
        num_experts=160,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        tie_word_embeddings=False,
    )
    _int4_folder(tmp_path / "m", config)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "m")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    weights, growth = int(output[0]), int(output[1])
    assert weights > 180_000_000
    assert weights <= growth < weights + 40_000_000
    assert output[2] == "False", "loading imported torch's compiler: 80 MB and seconds"


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "PIECE_BYTES", 4 << 20)
    numbers = torch.arange(9_000_001, dtype=torch.int32)
    plan = {"b": TensorSpec(torch.int32, (9_000_001,)), "empty": TensorSpec(torch.int32, (0, 3))}
    writer = ShardWriter(tmp_path, plan)
    writer.write("b", numbers)
    writer.write("empty", numbers[:0].view(0, 3))
    writer.finish()
    with TensorFiles(tmp_path) as files:
        sizes = []
        for piece, expected in zip(files.pieces("b"), numbers.split(files.piece_items("b")), strict=True):
            assert torch.equal(piece, expected)
            sizes.append(len(piece))
        assert sizes == [1 << 20] * 8 + [9_000_001 - (8 << 20)]
        place = torch.empty_like(numbers)
        assert len({piece.untyped_storage().data_ptr() for piece in files.pieces("b", into=place)}) == 1
        assert torch.equal(place, numbers)
        assert torch.equal(files.read_rows("b", 8_999_990, 9_000_001), numbers[-11:])
        assert [piece.numel() for piece in files.pieces("empty")] == [0]


def test_unaligned_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "PIECE_BYTES", 8)
    header = json.dumps(
        {
            "a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [5], "data_offsets": [1, 21]},
        }
    ).encode()
    numbers = torch.tensor([1.5, -2.0, 3.0, 4.0, 5.0])
    raw = len(header).to_bytes(8, "little") + header + b"\0" + numbers.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    with TensorFiles(tmp_path) as files:
        assert [piece.tolist() for piece in files.pieces("b")] == [[1.5, -2.0], [3.0, 4.0], [5.0]]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files_module, packed_values):
        monkeypatch.setattr(module, "PIECE_BYTES", 256)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_weights_in_pieces(tmp_path: Path, form: PackedForm) -> None:
    expected = packed_folder(tmp_path / "m", form)
    name = "model.layers.0.linear_attn.in_proj_qkvz"
    loaded = load_model(tmp_path / "m").get_submodule(name).weight
    blocks = -(-expected[f"{name}.weight"].shape[0] // 64)
    assert blocks > 1, "a matrix that fits in one block shows nothing"
    assert torch.equal(dequantize(loaded, torch.float32), expected[f"{name}.weight"])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_plain_and_fp8_weights_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    folder = tiny_folder(tmp_path / "m")
    make_fp8(folder)
    in_pieces = load_model(folder, dtype=dtype)
    monkeypatch.undo()
    for (name, ours), whole in zip(
        in_pieces.named_parameters(), load_model(folder, dtype=dtype).parameters(), strict=True
    ):
        assert torch.equal(ours, whole), name


@pytest.mark.usefixtures("small_pieces")
def test_the_last_piece_is_checked_too(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    with TensorFiles(folder) as files:
        info = files.tensors["lm_head.weight"]
    with info.file.open("r+b") as file:
        file.seek(info.end - info.num_bytes // info.shape[0] // info.shape[1])
        file.write(torch.tensor(float("inf")).numpy().tobytes())
    with pytest.raises(CorruptCheckpoint, match=r"lm_head.weight holds NaN or infinity"):
        load_model(folder)
