"""Experts become records, and plain again: the same codes and numbers bit for bit, whatever form they had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qnext.checkpoint import create_folder, load_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.gguf import export_gguf, import_gguf
from qnext.checkpoint.header import read_header
from qnext.checkpoint.names import disk_parts, parts_by_expert
from qnext.checkpoint.quantize import quantize_folder
from qnext.checkpoint.record_output import RecordWriter
from qnext.checkpoint.records import record_files
from qnext.checkpoint.rewrite import rewrite_folder
from qnext.diagnostics.folder import checkpoint_problems
from qnext.errors import UsageError
from qnext.ops import QuantizedWeight, Weight
from qnext.planning import list_parameters
from qnext.quant.scheme import make_policy
from tests.provenance import content_of, content_of_gguf

from .folders import CONFIGS, make_fp8
from .gguf.test_convert import KEYS
from .packed_folders import FORMS as PACKED_FORMS
from .packed_folders import Codes, packed_folder, weights_of
from .quantized import NEXT, save_random
from .record_folders import FORMS, PAGE, RECORD_CONFIG, RecordForm, record_folder
from .test_records import logits_of

INT4 = FORMS[3]
POLICY = make_policy("int4-g32", head=None, is_tied=False)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder's files, as they are."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        for name, info in read_header(path).items():
            found[name] = info.dtype, info.shape, raw[info.start : info.end]
    return found


def block_of(folder: Path) -> object:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def same_weights(folder: Path, other: Path) -> None:
    """Codes, scales and numbers, as models hold them."""
    one, two = (weights_of(load_model(each)) for each in (folder, other))
    for name, weight in one.items():
        tensors = [_tensors_of(each) for each in (weight, two[name])]
        assert len(tensors[0]) == len(tensors[1])
        assert all(map(torch.equal, *tensors)), name


def _tensors_of(weight: Tensor | Weight) -> list[Tensor]:
    """In the form of the disk, wherever they lie in memory."""
    if isinstance(weight, Tensor):
        return [weight]
    if len(weight.shape) == 3:
        return [tensor for expert in range(weight.shape[0]) for tensor in _tensors_of(weight[expert])]
    return weight.tensors


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_to_plain_and_back(tmp_path: Path, form: RecordForm) -> None:
    record_folder(tmp_path / "m", form)
    rewrite_folder(tmp_path / "m", tmp_path / "plain", with_records=False)
    assert not any(name.endswith("records") for name in stored(tmp_path / "plain"))
    same_weights(tmp_path / "m", tmp_path / "plain")
    rewrite_folder(tmp_path / "plain", tmp_path / "back", with_records=True)
    assert stored(tmp_path / "back") == stored(tmp_path / "m")
    assert torch.equal(logits_of(load_model(tmp_path / "back")), logits_of(load_model(tmp_path / "m")))


def test_quantised_with_records_is_quantised_without(tmp_path: Path) -> None:
    save_random(tmp_path / "m", NEXT, dtype=torch.bfloat16)
    reports = [
        quantize_folder(tmp_path / "m", tmp_path / name, policy=POLICY, with_records=name == "records")
        for name in ("plain", "records")
    ]
    assert reports[0].kinds == reports[1].kinds
    same_weights(tmp_path / "plain", tmp_path / "records")
    assert list(map(str, checkpoint_problems(read_layout(tmp_path / "records")))) == [
        f"{tmp_path / 'records'}: no tokenizer.json here, nor vocab.json with merges.txt"
    ]
    rewrite_folder(tmp_path / "records", tmp_path / "back", with_records=False)
    assert stored(tmp_path / "back") == stored(tmp_path / "plain")
    assert block_of(tmp_path / "back") == block_of(tmp_path / "plain")


def test_a_random_model_in_records_is_the_one_that_is_quantised(tmp_path: Path) -> None:
    save = {"seed": 3, "max_shard_bytes": 100_000}
    create_folder(NEXT, tmp_path / "m", **save)  # type: ignore[arg-type]
    create_folder(NEXT, tmp_path / "one", policy=POLICY, with_records=True, **save)  # type: ignore[arg-type]
    quantize_folder(tmp_path / "m", tmp_path / "two", policy=POLICY, with_records=True, max_shard_bytes=100_000)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


@pytest.mark.parametrize("max_shard_bytes", [1, 50_000, 10**9])
def test_records_stand_on_pages_behind_the_dense_part(tmp_path: Path, max_shard_bytes: int) -> None:
    create_folder(NEXT, tmp_path / "m", seed=3, policy=POLICY, with_records=True, max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()))
    assert len(shards) > 1
    first_with_records = min(file for name, file in index.items() if ".experts." in name)
    assert all((".experts." in name) == (file >= first_with_records) for name, file in index.items())
    for path in map((tmp_path / "m").joinpath, shards):
        infos = list(read_header(path).values())
        kinds = [info.name.endswith("records") for info in infos]
        assert kinds == sorted(kinds, reverse=True)  # records, then checksums
        assert all(info.start % PAGE == 0 for info in infos if info.name.endswith("records"))
    with safe_open(tmp_path / "m" / shards[-1], "pt") as file:  # the format's own library reads such a header
        assert set(file.keys()) == {name for name, shard in index.items() if shard == shards[-1]}
    assert all(each.is_aligned for each in record_files(read_layout(tmp_path / "m").records))


@pytest.mark.parametrize("number", [0, 1, 3, 5, 6, 7, 8, 9, 12])
def test_other_programs_folders_become_records(tmp_path: Path, number: int) -> None:
    """All but the first form have groups that the kernels do not read, or stay codes of another layout."""
    form = PACKED_FORMS[number]
    source = tmp_path / "m"
    packed_folder(source, form)
    try:
        rewrite_folder(source, tmp_path / "records", with_records=True)
    except UsageError as error:
        assert "its experts make no records" in str(error)  # groups of 8, or 48 outputs of down
        assert form.group_size == 8 or "48 outputs" in str(error)
    rewrite_folder(source, tmp_path / "plain", with_records=False)
    same_weights(source, tmp_path / "plain")


def test_fp8_becomes_records_of_numbers(tmp_path: Path) -> None:
    save_random(tmp_path / "m", NEXT)
    make_fp8(tmp_path / "m")
    rewrite_folder(tmp_path / "m", tmp_path / "records", with_records=True)
    assert block_of(tmp_path / "records")["rest"] is None  # type: ignore[index]
    same_weights(tmp_path / "m", tmp_path / "records")


def test_gguf_becomes_records_and_records_gguf(tmp_path: Path) -> None:
    save_random(tmp_path / "m", replace(NEXT, linear_value_head_dim=8))
    export_gguf(tmp_path / "m", tmp_path / "a.gguf", kind="q4_0", tokenizer_keys=KEYS)
    plain, records = tmp_path / "plain" / "m", tmp_path / "records" / "m"  # a GGUF file says its folder's name
    import_gguf(tmp_path / "a.gguf", plain)
    import_gguf(tmp_path / "a.gguf", records, with_records=True)
    same_weights(plain, records)
    rewrite_folder(plain, tmp_path / "again", with_records=True)
    assert stored(tmp_path / "again") == stored(records)
    for number, folder in enumerate((plain, records)):
        export_gguf(folder, tmp_path / f"{number}.gguf", kind="q4_0", tokenizer_keys=KEYS)
    assert content_of_gguf(tmp_path / "0.gguf") == content_of_gguf(tmp_path / "1.gguf")


def test_codes_become_numbers_where_that_is_asked_for(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4, plain=tmp_path / "plain")
    rewrite_folder(tmp_path / "m", tmp_path / "out", with_records=False, keeps_codes=False)
    assert block_of(tmp_path / "out") is None
    one, two = (weights_of(load_model(tmp_path / name, dequantize=True)) for name in ("m", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)  # type: ignore[arg-type]


def test_matrices_may_come_in_any_order(tmp_path: Path) -> None:
    """Bytes do not depend on it, and what has not come is missed."""
    folder = record_folder(tmp_path / "m", INT4)
    layout = read_layout(tmp_path / "m")
    parts = [part for info, part in parts_by_expert(list_parameters(layout.config).values()) if part.expert is not None]
    written: dict[tuple[str, int | None], bytes] = {}

    class Kept:
        def write(self, name: str, tensor: Tensor, *, row: int | None = None) -> None:
            assert (name, row) not in written
            written[name, row] = tensor.numpy().tobytes()

    assert layout.quantization is not None
    writer = RecordWriter(layout.config, layout.quantization.records)
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(2)).tolist()
    for number in order:
        weight = folder.experts[parts[number].name]
        assert isinstance(weight, Codes) and writer.takes(parts[number])
        codes = weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4)
        writer.add(Kept(), parts[number], QuantizedWeight(codes.to(torch.uint8), weight.scales, 4, 32))
    for name, (_, shape, raw) in stored(tmp_path / "m").items():
        if name.endswith(".records"):
            assert b"".join(written[name, row] for row in range(shape[0])) == raw
        elif name.endswith(".record_checksums"):
            assert written[name, None] == raw


def test_parts_of_an_expert_follow_each_other() -> None:
    infos = list_parameters(RECORD_CONFIG)
    found = list(parts_by_expert(infos.values()))
    assert sorted(part.name for _, part in found) == sorted(
        part.name for info in infos.values() for part in disk_parts(info)
    )
    assert all(part in disk_parts(info) for info, part in found)
    experts = [part.name.rpartition(".experts.")[2] for _, part in found if part.expert is not None]
    assert experts[:3] == ["0.gate_proj.weight", "0.up_proj.weight", "0.down_proj.weight"]
    assert len(experts) == 5 * 4 * 3


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (CONFIGS["dense"], "has no experts that could be records"),
        (replace(NEXT, moe_intermediate_size=24), None),  # floats lie in rows of any width
        (replace(NEXT, hidden_size=48), "its experts make no records: 48 outputs of down do not fill panels"),
    ],
)
def test_models_that_have_no_records(tmp_path: Path, config: object, told: str | None) -> None:
    policy = make_policy("int4-g64", head=None, is_tied=False)
    policy = replace(policy, scheme=replace(policy.scheme, group_size=16), head=None)
    create = {"seed": 1, "with_records": True, "policy": policy}
    if told is None:
        create_folder(config, tmp_path / "m", seed=1, with_records=True)  # type: ignore[arg-type]
        assert load_model(tmp_path / "m").config.moe_intermediate_size == 24
        return
    with pytest.raises(UsageError, match=told):
        create_folder(config, tmp_path / "m", **create)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()
