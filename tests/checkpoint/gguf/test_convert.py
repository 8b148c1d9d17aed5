"""Folders through GGUF files and back, against the reference's reader, rounding and table of types."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.gguf import EXPORT_TYPES, export_gguf, import_gguf, read_gguf
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.model import CausalLM, initialize
from tests.checkpoint.folders import make_fp8
from tests.config.folder import read_config

from .files import GGUF_CONFIGS, Raw, arrays_of, write_arrays

KEYS = {"tokenizer.ggml.model": "gpt2"}


def model_of(name: str) -> CausalLM:
    """Every parameter disturbed, so that no norm weight or bias is a constant."""
    model = CausalLM(GGUF_CONFIGS[name])
    initialize(model, seed=7)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def folder_of(path: Path, name: str = "next", dtype: torch.dtype = torch.bfloat16) -> Path:
    save_model(model_of(name), path, dtype=dtype, max_shard_bytes=60_000)
    return path


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with TensorFiles(folder) as files:
        return {name: files.read(name).clone() for name in files.tensors}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("name", GGUF_CONFIGS)
def test_bf16_round_trip_is_exact(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "m", name)
    export_gguf(folder, tmp_path / "m.gguf", kind="bf16", tokenizer_keys=KEYS)
    report = import_gguf(tmp_path / "m.gguf", tmp_path / "back", max_shard_bytes=50_000)
    assert report == (torch.bfloat16, (), (), ())
    assert_same(tensors_of(tmp_path / "back"), tensors_of(folder))
    assert read_config(tmp_path / "back") == GGUF_CONFIGS[name]
    load_model(tmp_path / "back")


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_other_floats_round_trip(tmp_path: Path, kind: str) -> None:
    """What is stored as w + 1 comes back within half a step of fp32 below 2, and A_log within two roundings."""
    dtype = {"f16": torch.float16, "f32": torch.float32}[kind]
    folder = folder_of(tmp_path / "m", dtype=dtype)
    export_gguf(folder, tmp_path / "m.gguf", kind=kind, tokenizer_keys=KEYS)
    report = import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert report == (dtype, (), (), ())
    actual, expected = tensors_of(tmp_path / "back"), tensors_of(folder)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        changes = name.endswith("A_log") or ("norm" in name and not name.endswith("linear_attn.norm.weight"))
        assert actual[name].dtype == dtype
        if not changes:
            assert torch.equal(actual[name], tensor), name
        else:
            assert (actual[name] - tensor).abs().max() <= 2.0**-23 * tensor.abs().max().clamp(min=1.0), name


def test_small_numbers_beside_the_one(tmp_path: Path) -> None:
    """bf16 norm weights survive the sum with 1 in fp32 down to 2^-16; below, the error is at most 2^-24."""
    weights = torch.cat([2.0 ** torch.arange(-30.0, 1.0), -(2.0 ** torch.arange(-30.0, 0.0))]) * 1.59375
    exact = weights.to(torch.bfloat16).float()
    restored = ((exact + 1) - 1).to(torch.bfloat16).float()
    is_large = exact.abs() >= 2.0**-16
    assert torch.equal(restored[is_large], exact[is_large])
    assert (restored - exact).abs().max() <= 2.0**-24


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["next", "next tied", "moe", "dense"])
def test_quantised_files(tmp_path: Path, name: str, kind: str) -> None:
    """Every tensor holds the reference's rounding of what the fp32 file holds, and is imported as those numbers."""
    folder = folder_of(tmp_path / "m", name)
    export_gguf(folder, tmp_path / "f32.gguf", kind="f32", tokenizer_keys=KEYS)
    export_gguf(folder, tmp_path / "q.gguf", kind=kind, tokenizer_keys=KEYS)
    plain = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    assert reader.fields["general.file_type"].contents() == {"q8_0": 7, "q4_0": 2}[kind]
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        block = tensor.tensor_type
        counts[block.name] = counts.get(block.name, 0) + 1
        assert np.array_equal(
            tensor.data.view(np.uint8), gguf.quants.quantize(plain[tensor.name].data, block).view(np.uint8)
        )
        head = "token_embd.weight" if name == "next tied" else "output.weight"
        if block.name not in ("F32", "BF16"):
            assert block.name == ("Q8_0" if tensor.name == head else kind.upper()), tensor.name
        if any(part in tensor.name for part in ("norm", "ssm_ba", "ssm_a", "ssm_dt", "conv1d", "gate_inp")):
            assert block.name == "F32", tensor.name
    assert counts[kind.upper()] >= 6
    report = import_gguf(tmp_path / "q.gguf", tmp_path / "back", dtype=torch.float32, dequantize=True)
    assert not report.packed
    assert len(report.dequantized) == sum(counts.get(block, 0) for block in ("Q8_0", "Q4_0"))
    assert not report.rounded
    # The imported folder, written again without quantising, holds the same numbers.
    export_gguf(tmp_path / "back", tmp_path / "again.gguf", kind="f32", tokenizer_keys=KEYS)
    again = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(again[tensor.name].data.shape)
        if tensor.tensor_type.name == "F32":
            assert np.allclose(values, again[tensor.name].data, rtol=2e-7, atol=1.2e-7), tensor.name
        else:
            assert np.array_equal(values, again[tensor.name].data), tensor.name


def test_small_matrices_in_fp32_stay_so(tmp_path: Path) -> None:
    """Routers and convolutions of an fp32 folder beside bf16 matrices."""
    folder = folder_of(tmp_path / "m", dtype=torch.float32)
    export_gguf(folder, tmp_path / "m.gguf", kind="bf16", tokenizer_keys=KEYS)
    report = import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert report.dtype == torch.bfloat16
    assert not report.rounded
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    for name, tensor in after.items():
        is_fine = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight", "conv1d.weight"))
        if tensor.dim() > 1:
            assert tensor.dtype == (torch.float32 if is_fine else torch.bfloat16), name
            assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    assert after["model.layers.0.linear_attn.A_log"].dtype == torch.float32
    load_model(tmp_path / "back")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["next", "next tied", "moe"])
def test_what_a_quantised_file_keeps_in_fp32_stays_so(tmp_path: Path, name: str, kind: str) -> None:
    """Routers, shared gates, convolutions and ssm_ba come back bit for bit, and the model loads."""
    folder = folder_of(tmp_path / "m", name, torch.float32)
    export_gguf(folder, tmp_path / "m.gguf", kind=kind, tokenizer_keys=KEYS)
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    parts = ("mlp.gate.weight", "shared_expert_gate.weight", "conv1d.weight", "in_proj_ba.weight")
    fine = [each for each in after if each.endswith(parts)]
    assert fine
    for each in fine:
        assert torch.equal(after[each], before[each]), each
    model = load_model(tmp_path / "back")
    routers = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert {router.dtype for router in routers} == {torch.float32}


def test_a_matrix_that_is_rounded_is_reported(tmp_path: Path) -> None:
    """Large matrices in fp16 and fp32, which together become bfloat16; what stays fine is not among them."""
    folder = folder_of(tmp_path / "m", "moe", torch.float32)
    export_gguf(folder, tmp_path / "m.gguf", kind="f16", tokenizer_keys=KEYS)
    tensors: dict[str, np.ndarray | Raw] = {}
    for name, data in arrays_of(tmp_path / "m.gguf").items():
        is_head = name == "output.weight"
        tensors[name] = Raw("F16", data.shape, data) if data.dtype == np.float16 and not is_head else data.astype("f4")
    write_arrays(tmp_path / "f.gguf", read_gguf(tmp_path / "m.gguf").keys, tensors)
    report = import_gguf(tmp_path / "f.gguf", tmp_path / "back")
    assert {"output.weight", "token_embd.weight", "blk.0.attn_q.weight"} <= set(report.rounded)
    assert not any("gate_inp" in name or "norm" in name for name in report.rounded)


def test_forms_of_other_tools(tmp_path: Path) -> None:
    """Gate and up in one tensor, in_proj_qkvz as it is, leading dimensions of one left out."""
    config = GGUF_CONFIGS["next"]
    folder = folder_of(tmp_path / "m")
    export_gguf(folder, tmp_path / "m.gguf", kind="f32", tokenizer_keys=KEYS)
    tensors = arrays_of(tmp_path / "m.gguf")
    with TensorFiles(folder) as files:
        for i in range(config.num_hidden_layers + 1):
            block = f"blk.{i}."
            halves = [tensors.pop(f"{block}ffn_{half}_exps.weight") for half in ("gate", "up")]
            tensors[f"{block}ffn_gate_up_exps.weight"] = np.concatenate(halves, axis=1)
            shared = f"{block}ffn_gate_inp_shexp.weight"
            tensors[shared] = tensors[shared].reshape(-1)
            if f"{block}attn_gate.weight" in tensors:
                del tensors[f"{block}attn_gate.weight"], tensors[f"{block}attn_qkv.weight"]
                whole = files.read(f"model.layers.{i}.linear_attn.in_proj_qkvz.weight")
                tensors[f"{block}ssm_in.weight"] = whole.float().numpy()
    write_arrays(tmp_path / "other.gguf", read_gguf(tmp_path / "m.gguf").keys, tensors)
    import_gguf(tmp_path / "other.gguf", tmp_path / "back", dtype=torch.bfloat16)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(folder))


def test_fp8_folders_are_dequantised(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", dtype=torch.float32)
    make_fp8(folder)
    expected = {name: t.detach() for name, t in load_model(folder, dtype=torch.bfloat16).named_parameters()}
    export_gguf(folder, tmp_path / "m.gguf", kind="bf16", tokenizer_keys=KEYS)
    import_gguf(tmp_path / "m.gguf", tmp_path / "back", dtype=torch.bfloat16)
    actual = dict(load_model(tmp_path / "back", dtype=torch.bfloat16).named_parameters())
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    for convert in (
        lambda progress: export_gguf(folder, tmp_path / "m.gguf", kind="q8_0", tokenizer_keys=KEYS, progress=progress),
        lambda progress: import_gguf(tmp_path / "m.gguf", tmp_path / "back", progress=progress),
    ):
        calls: list[tuple[int, int]] = []
        convert(lambda done, total, calls=calls: calls.append((done, total)))
        done = [call[0] for call in calls]
        assert done == sorted(done)
        assert calls[-1][0] == calls[-1][1] > 0


# --- what is refused ------------------------------------------------------------------------------------------


def poke(path: Path, name: str, raw: bytes) -> Path:
    """Overwrite the first bytes of a tensor of a GGUF file."""
    start = read_gguf(path).tensors[name].start
    with path.open("r+b") as file:
        file.seek(start)
        file.write(raw)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("exported")
    export_gguf(folder_of(root / "m"), root / "m.gguf", kind="q8_0", tokenizer_keys=KEYS)
    return (root / "m.gguf").read_bytes()


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("blk.0.ffn_down_shexp.weight", b"\0\x7c", "holds NaN or infinity"),  # an infinite scale
        ("blk.0.attn_norm.weight", b"\0\0\xc0\x7f", "holds NaN or infinity"),
        ("blk.0.ssm_a", b"\0\0\x80\x3f", "must be negative"),
    ],
)
def test_bad_numbers_in_a_file(tmp_path: Path, exported: bytes, name: str, raw: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(exported)
    with pytest.raises(CorruptCheckpoint, match=f"m.gguf: tensor {name}: {message}"):
        import_gguf(poke(path, name, raw), tmp_path / "back")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_a_tensor_of_another_name(tmp_path: Path, exported: bytes) -> None:
    path = tmp_path / "m.gguf"
    assert exported.count(b"blk.0.ssm_out.weight") == 1
    path.write_bytes(exported.replace(b"blk.0.ssm_out.weight", b"blk.0.ssm_xxx.weight"))
    with pytest.raises(CorruptCheckpoint, match=r"tensor blk\.0\.ssm_out\.weight is missing"):
        import_gguf(path, tmp_path / "back")


def test_numbers_beyond_the_type(tmp_path: Path) -> None:
    model = model_of("dense")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = 5e6
    save_model(model, tmp_path / "m", dtype=torch.float32)
    for kind in ("f16", "q8_0", "q4_0"):
        message = f"tensor model.layers.1.mlp.up_proj.weight holds numbers beyond the range of {kind.upper()}"
        if kind == "q8_0":  # its scale, a 127th of the number, just fits
            export_gguf(tmp_path / "m", tmp_path / "q.gguf", kind=kind, tokenizer_keys=KEYS)
            continue
        with pytest.raises(UsageError, match=message):
            export_gguf(tmp_path / "m", tmp_path / f"{kind}.gguf", kind=kind, tokenizer_keys=KEYS)
    export_gguf(tmp_path / "m", tmp_path / "f32.gguf", kind="f32", tokenizer_keys=KEYS)
    with pytest.raises(UsageError, match=r"tensor blk.1.ffn_up.weight holds numbers beyond the range of torch.float16"):
        import_gguf(tmp_path / "f32.gguf", tmp_path / "back", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f32.gguf", "m", "q.gguf"]


def test_nan_in_a_folder(tmp_path: Path) -> None:
    model = model_of("dense")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = torch.nan
    save_model(model, tmp_path / "m")
    with pytest.raises(CorruptCheckpoint, match=r"tensor model.layers.1.mlp.up_proj.weight holds NaN"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="bf16", tokenizer_keys=KEYS)


def test_all_types_of_the_option_are_known() -> None:
    for block, file_type in EXPORT_TYPES.values():
        name = gguf.LlamaFileType(file_type).name
        assert name in (f"MOSTLY_{block}", f"ALL_{block}")
