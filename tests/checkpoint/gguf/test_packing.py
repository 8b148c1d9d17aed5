"""Q8_0 and Q4_0 keep codes and scales on their way into a folder."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qnext.checkpoint import load_model
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.gguf import export_gguf, import_gguf, read_gguf
from qnext.checkpoint.gguf.block_types import BLOCK_TYPES
from qnext.checkpoint.gguf.container import GgufSpec
from qnext.checkpoint.gguf.names import gguf_entries
from qnext.checkpoint.gguf.packing import packed_parameters
from qnext.checkpoint.gguf.writer import GgufWriter, new_file
from qnext.checkpoint.names import expected_tensors
from qnext.checkpoint.quantize import quantize_folder
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.quant.formats import from_pack_quantized
from qnext.quant.scheme import make_policy
from tests.checkpoint.folders import rewrite

from .files import GGUF_CONFIGS
from .test_convert import KEYS, folder_of, poke


def numbers_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a folder in fp32, unpacked by the reader of the layout."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    groups = config.get("config_groups", {})
    numbers: dict[str, torch.Tensor] = {}
    with TensorFiles(folder) as files:
        for name in files.tensors:
            module = name.removesuffix(".weight_packed")
            if module != name:
                shape = files.read(f"{module}.weight_shape").tolist()
                scales, codes = files.read(f"{module}.weight_scale"), files.read(name)
                bits = codes.shape[1] * 32 // shape[1]
                assert bits in {group["weights"]["num_bits"] for group in groups.values()}
                weight = from_pack_quantized(codes, scales, num_inputs=shape[1], bits=bits)
                assert list(weight.shape) == shape
                numbers[f"{module}.weight"] = weight.dequantize()
            elif not name.endswith(("_scale", "_shape")):
                numbers[name] = files.read(name).float().clone()
    return numbers


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["next", "next tied", "moe", "dense"])
def test_packed_weights_are_the_numbers_of_the_file(tmp_path: Path, name: str, kind: str) -> None:
    folder = folder_of(tmp_path / "m", name)
    export_gguf(folder, tmp_path / "m.gguf", kind=kind, tokenizer_keys=KEYS)
    report = import_gguf(tmp_path / "m.gguf", tmp_path / "packed", max_shard_bytes=40_000)
    plain = import_gguf(tmp_path / "m.gguf", tmp_path / "plain", dtype=torch.float32, dequantize=True)
    assert len(report.packed) >= 6
    assert sorted(report.packed + report.dequantized) == sorted(plain.dequantized)
    packed, expected = numbers_of(tmp_path / "packed"), numbers_of(tmp_path / "plain")
    assert packed.keys() == expected.keys() == expected_tensors(GGUF_CONFIGS[name]).keys()
    exact = 0
    with TensorFiles(tmp_path / "packed") as files:
        for weight, values in expected.items():
            module = weight.removesuffix(".weight")
            if weight in files.tensors:
                assert torch.allclose(packed[weight], values, rtol=2.0**-8, atol=1e-7), weight
            else:
                assert torch.equal(packed[weight], values), weight
                scales = files.tensors[f"{module}.weight_scale"]
                assert (scales.dtype, scales.shape[1] * 32) == ("F16", values.shape[1])
                exact += 1
    assert exact >= 6


def mixed_file(folder: Path, work: Path) -> Path:
    """Down projections in eight bits, all else in four, one gate unlike its up."""
    export_gguf(folder, work / "a.gguf", kind="f32", tokenizer_keys=KEYS)
    source = read_gguf(work / "a.gguf")
    data = {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(work / "a.gguf").tensors}
    export_gguf(folder, work / "b.gguf", kind="q4_0", tokenizer_keys=KEYS)
    blocks = {name: tensor.block for name, tensor in read_gguf(work / "b.gguf").tensors.items()}
    q8_0 = blocks["output.weight"]
    for name in blocks:
        if ("ffn_down_exps" in name or name == "blk.0.ffn_gate_exps.weight") and blocks[name].num_items > 1:
            blocks[name] = q8_0
    with new_file(work / "mixed.gguf") as file:
        writer = GgufWriter(
            file, source.keys, {name: GgufSpec(block, source.tensors[name].shape) for name, block in blocks.items()}
        )
        for name, block in blocks.items():
            packed = gguf.quants.quantize(data[name], gguf.GGMLQuantizationType[block.name])
            writer.write(name, [np.ascontiguousarray(packed).tobytes()])
    return work / "mixed.gguf"


def test_two_widths_in_one_file(tmp_path: Path) -> None:
    config = GGUF_CONFIGS["moe"]
    path = mixed_file(folder_of(tmp_path / "m", "moe"), tmp_path)
    file = read_gguf(path)
    packed = packed_parameters(config, file, gguf_entries(config))
    # Gate and up are one parameter: of two types, neither stays packed.
    assert "model.layers.0.mlp.experts.gate_up_proj" not in packed
    assert packed["model.layers.1.mlp.experts.gate_up_proj"].name == "Q4_0"
    assert packed["model.layers.0.mlp.experts.down_proj"].name == "Q8_0"
    import_gguf(path, tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    groups = {group["weights"]["num_bits"]: group["targets"] for group in written["config_groups"].values()}
    assert set(groups) == {4, 8}
    assert ["Linear"] in groups.values()
    import_gguf(path, tmp_path / "plain", dtype=torch.float32, dequantize=True)
    actual, expected = numbers_of(tmp_path / "packed"), numbers_of(tmp_path / "plain")
    for name, values in expected.items():
        assert torch.allclose(actual[name], values, rtol=2.0**-8, atol=1e-7), name
    assert "model.layers.0.mlp.gate" in written["ignore"]


def test_an_infinite_scale_is_refused(tmp_path: Path) -> None:
    export_gguf(folder_of(tmp_path / "m"), tmp_path / "m.gguf", kind="q8_0", tokenizer_keys=KEYS)
    name = "blk.0.ffn_down_shexp.weight"
    assert name in import_gguf(tmp_path / "m.gguf", tmp_path / "ok").packed
    with pytest.raises(CorruptCheckpoint, match=f"m.gguf: tensor {name}: holds NaN or infinity"):
        import_gguf(poke(tmp_path / "m.gguf", name, b"\0\x7c"), tmp_path / "back")


def test_other_types_are_dequantised(tmp_path: Path) -> None:
    """Any bytes of Q5_1, with scales that are numbers, come back as the reference reads them."""
    folder = folder_of(tmp_path / "m", "dense")
    export_gguf(folder, tmp_path / "a.gguf", kind="f32", tokenizer_keys=KEYS)
    source = read_gguf(tmp_path / "a.gguf")
    data = {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    rng = np.random.default_rng(2)
    name, block = "blk.1.attn_output.weight", BLOCK_TYPES["Q5_1"]
    raw = rng.integers(0, 256, (64, 96 // 32, block.num_bytes), dtype=np.uint8)
    raw[..., :4] = rng.standard_normal((64, 3, 2)).astype(np.float16).view(np.uint8)
    specs = {n: GgufSpec(block if n == name else t.block, t.shape) for n, t in source.tensors.items()}
    assert specs[name].shape == (64, 96)
    with new_file(tmp_path / "m.gguf") as file:
        writer = GgufWriter(file, source.keys, specs)
        for n in specs:
            writer.write(n, [raw.tobytes() if n == name else data[n].tobytes()])
    report = import_gguf(tmp_path / "m.gguf", tmp_path / "back", dtype=torch.float32)
    assert (report.packed, report.dequantized) == ((), (name,))
    expected = gguf.quants.dequantize(raw.reshape(64, -1), gguf.GGMLQuantizationType.Q5_1)
    with TensorFiles(tmp_path / "back") as files:
        assert np.array_equal(files.read("model.layers.1.self_attn.o_proj.weight").numpy(), expected)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_packed_folder_is_exported_code_by_code(tmp_path: Path, kind: str) -> None:
    """GGUF to packed folder to GGUF: the bytes of every packed tensor are the same; so are the numbers of the model."""
    export_gguf(folder_of(tmp_path / "m"), tmp_path / "a.gguf", kind=kind, tokenizer_keys=KEYS)
    report = import_gguf(tmp_path / "a.gguf", tmp_path / "packed")
    export_gguf(tmp_path / "packed", tmp_path / "b.gguf", kind=kind, tokenizer_keys=KEYS)
    first, second = ({t.name: t for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in "ab")
    for name in report.packed:
        assert first[name].tensor_type == second[name].tensor_type, name
        assert np.array_equal(first[name].data, second[name].data), name
    # In a wider type the codes are others and the numbers the same.
    for other in ("q8_0", "f32"):
        export_gguf(tmp_path / "packed", tmp_path / f"{other}.gguf", kind=other, tokenizer_keys=KEYS)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{other}.gguf").tensors}
        for name in report.packed:
            numbers = [gguf.quants.dequantize(t.data, t.tensor_type).reshape(-1) for t in (first[name], tensors[name])]
            assert np.array_equal(*numbers), (name, other)
    load_model(tmp_path / "packed")
    numbers_there = numbers_of(tmp_path / "packed")["model.layers.0.mlp.shared_expert.down_proj.weight"]
    assert np.array_equal(numbers_there.numpy(), _values(first["blk.0.ffn_down_shexp.weight"]))


def _values(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def packed_folder(tmp_path: Path, scheme: str) -> Path:
    """Quantised by the package itself, to the nearest code."""
    policy = make_policy(scheme, head=None, is_tied=False)
    quantize_folder(folder_of(tmp_path / "m"), tmp_path / "q", policy=policy, is_calibrated=False)
    return tmp_path / "q"


@pytest.mark.parametrize(("scheme", "block"), [("int4-g32", "Q4_0"), ("int4-g64", "Q4_0"), ("int8-g32", "Q8_0")])
def test_our_own_schemes_fit(tmp_path: Path, scheme: str, block: str) -> None:
    folder = packed_folder(tmp_path, scheme)
    export_gguf(folder, tmp_path / "q.gguf", kind="q4_0", tokenizer_keys=KEYS)
    tensor = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}[
        "blk.0.ffn_down_shexp.weight"
    ]
    assert tensor.tensor_type.name == block
    numbers = numbers_of(folder)["model.layers.0.mlp.shared_expert.down_proj.weight"]
    assert np.array_equal(_values(tensor), numbers.numpy())


@pytest.mark.parametrize(("value", "error"), [(torch.inf, CorruptCheckpoint), (1e6, UsageError)])
def test_bad_scales_of_a_folder(tmp_path: Path, value: float, error: type[Exception]) -> None:
    folder = packed_folder(tmp_path, "int8-g32")
    name = "model.layers.0.mlp.shared_expert.down_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight_scale"][3, 1] = value

    rewrite(folder, change)
    with pytest.raises(error, match=name):
        export_gguf(folder, tmp_path / "q.gguf", kind="q8_0", tokenizer_keys=KEYS)
    assert not (tmp_path / "q.gguf").exists()
