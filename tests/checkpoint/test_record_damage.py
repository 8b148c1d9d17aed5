"""Damaged folders of records: each fault is told with its file, tensor and expert, by loading and by verify."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import Capture, run
from torch import Tensor

from qnext.checkpoint import load_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.header import read_header
from qnext.errors import ConfigError, CorruptCheckpoint, NotSupported, QnextWarning

from .folders import edit_config
from .record_folders import FORMS, RecordForm, record_folder
from .test_records import logits_of

INT4, ZEROS, PLAIN = FORMS[3], FORMS[4], FORMS[1]
RECORDS = "model.layers.2.mlp.experts.records"
CHECKSUMS = "model.layers.2.mlp.experts.record_checksums"
SHARD = "model-00002-of-00002.safetensors"
Change = Callable[[dict[str, Tensor], dict[str, Tensor]], object]


def edited(edit: Callable[[Tensor], object], *, expert: int = 3) -> Change:
    """One record is changed, and its checksum with it."""

    def change(dense: dict[str, Tensor], records: dict[str, Tensor]) -> None:
        edit(records[RECORDS][expert])
        records[CHECKSUMS][expert] = zlib.crc32(records[RECORDS][expert].numpy().tobytes())

    return change


def put(values: Tensor, place: int) -> Callable[[Tensor], object]:
    return lambda record_B: record_B[place : place + values.nbytes].copy_(values.view(-1).view(torch.uint8))


def replaced(name: str, values: Callable[[Tensor], Tensor]) -> Change:
    return lambda dense, records: records.update({name: values(records[name])})


def flipped(records: dict[str, Tensor], name: str, *place: int) -> None:
    records[name][place] ^= 1


# of int4-g32-float16, hidden 64 and width 96: gate and up codes, then scales, then codes and scales of down
GATE_UP_CODES = 2 * 96 * 64 // 2
GATE_UP_SCALES = 2 * 96 * 2 * 2
DOWN_SCALES = GATE_UP_CODES + GATE_UP_SCALES + 64 * 96 // 2
# of int4-g16-bfloat16 with zeros
ZEROS_OF_UP = GATE_UP_CODES + 2 * 96 * 4 * 2 + 96 * 4

STRUCTURE: dict[str, tuple[RecordForm, Change, str]] = {
    "no records": (
        INT4,
        lambda dense, records: records.pop(RECORDS),
        f"tensor {RECORDS} is missing",
    ),
    "no checksums": (
        INT4,
        lambda dense, records: records.pop(CHECKSUMS),
        f"tensor {CHECKSUMS} is missing",
    ),
    "records of a layer that there is not": (
        INT4,
        lambda dense, records: records.update({"model.layers.9.mlp.experts.records": records[RECORDS]}),
        r"model\.layers\.9\.mlp\.experts\.records is surplus",
    ),
    "an expert beside the records": (
        INT4,
        lambda dense, records: dense.update({"model.layers.2.mlp.experts.4.up_proj.weight": torch.zeros(96, 64)}),
        r"experts\.4\.up_proj\.weight is surplus",
    ),
    "a record too few": (
        INT4,
        replaced(RECORDS, lambda values: values[:-1].clone()),
        rf"{SHARD}: tensor {RECORDS} has shape \[3, 12288\], config\.json asks for \[4, 12288\]",
    ),
    "a stride of another form": (
        INT4,
        replaced(RECORDS, lambda values: values[:, :-4096].clone()),
        rf"{SHARD}: tensor {RECORDS} has shape \[4, 8192\], config\.json asks for \[4, 12288\]",
    ),
    "records without rows": (
        INT4,
        replaced(RECORDS, lambda values: values.flatten()),
        rf"{SHARD}: tensor {RECORDS} has shape \[49152\]",
    ),
    "records in wider numbers": (
        INT4,
        replaced(RECORDS, lambda values: torch.zeros(4, 12288, dtype=torch.int32)),
        rf"{SHARD}: tensor {RECORDS} has dtype I32, not U8",
    ),
    "a checksum too many": (
        INT4,
        replaced(CHECKSUMS, lambda values: values.repeat(2)),
        rf"{SHARD}: tensor {CHECKSUMS} has shape \[8\], config\.json asks for \[4\]",
    ),
    "checksums in narrower numbers": (
        INT4,
        replaced(CHECKSUMS, lambda values: values.to(torch.int32)),
        rf"{SHARD}: tensor {CHECKSUMS} has dtype I32, not I64",
    ),
}

VALUES: dict[str, tuple[RecordForm, Change, str]] = {
    "a code": (
        INT4,
        lambda dense, records: flipped(records, RECORDS, 2, 77),
        rf"{SHARD}: tensor {RECORDS}: record 2 is not what its checksum says",
    ),
    "what is behind the last part": (
        INT4,
        lambda dense, records: flipped(records, RECORDS, 0, 12287),
        rf"{SHARD}: tensor {RECORDS}: record 0 is not what its checksum says",
    ),
    "a plain number": (
        PLAIN,
        lambda dense, records: flipped(records, RECORDS, 1, 5),
        rf"{SHARD}: tensor {RECORDS}: record 1 is not what its checksum says",
    ),
    "a checksum": (
        INT4,
        lambda dense, records: flipped(records, CHECKSUMS, 3),
        rf"{SHARD}: tensor {RECORDS}: record 3 is not what its checksum says",
    ),
    "a checksum beyond 32 bits": (
        INT4,
        replaced(CHECKSUMS, lambda values: values + (1 << 32)),
        rf"{SHARD}: tensor {RECORDS}: record 0 is not what its checksum says",
    ),
    "a scale of gate that is no number": (
        INT4,
        edited(put(torch.tensor([torch.nan]).half(), GATE_UP_CODES)),
        rf"{SHARD}: tensor model\.layers\.2\.mlp\.experts\.3\.gate_proj\.weight_panel_scale holds NaN or infinity",
    ),
    "an infinite scale of up": (
        INT4,
        edited(put(torch.tensor([torch.inf]).half(), GATE_UP_CODES + GATE_UP_SCALES - 2), expert=0),
        rf"{SHARD}: tensor model\.layers\.2\.mlp\.experts\.0\.up_proj\.weight_panel_scale holds NaN or infinity",
    ),
    "a scale of down that is no number": (
        INT4,
        edited(put(torch.tensor([torch.nan]).half(), DOWN_SCALES)),
        rf"{SHARD}: tensor model\.layers\.2\.mlp\.experts\.3\.down_proj\.weight_panel_scale holds NaN or infinity",
    ),
    "a zero that is no code": (
        ZEROS,
        edited(put(torch.tensor([16], dtype=torch.uint8), ZEROS_OF_UP)),
        rf"{SHARD}: tensor model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight_panel_zeros holds zeros beyond 4 bits",
    ),
    "a plain number that is none": (
        PLAIN,
        edited(put(torch.tensor([-torch.inf]).bfloat16(), 96 * 64 * 2)),
        rf"{SHARD}: tensor model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", [*STRUCTURE, *VALUES])
def test_damage_is_named(tmp_path: Path, capsys: Capture, name: str) -> None:
    form, change, told = {**STRUCTURE, **VALUES}[name]
    record_folder(tmp_path / "m", form, change=change)
    with pytest.raises(CorruptCheckpoint, match=told):
        load_model(tmp_path / "m")
    found = run(capsys, "verify", tmp_path / "m", "--json")
    problems = json.loads(found.out)["problems"]
    assert found.code == 5
    assert any(re.search(told, line) for line in problems) and len(problems) <= 5, problems
    assert run(capsys, "inspect", tmp_path / "m").code == (5 if name in STRUCTURE else 0)


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4)
    path = tmp_path / "m" / SHARD
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptCheckpoint, match=rf"{SHARD}: truncated inside tensor .*record_checksums"):
        load_model(tmp_path / "m")


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4)
    layout = read_layout(tmp_path / "m")
    path = tmp_path / "m" / SHARD
    with path.open("r+b") as file:
        file.truncate(read_header(path)[RECORDS].start + 10)
    with pytest.raises(CorruptCheckpoint, match=rf"{SHARD}: truncated while tensor model.layers.0.*checksums was read"):
        load_model(layout)


def test_mtp_whose_records_are_missing_is_left_out(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4)
    whole = load_model(tmp_path / "m")
    record_folder(tmp_path / "n", INT4, change=lambda dense, records: records.pop("mtp.layers.0.mlp.experts.records"))
    with pytest.warns(QnextWarning, match="multi-token prediction is incomplete"):
        model = load_model(tmp_path / "n")
    assert whole.config.num_nextn_predict_layers == 1 and model.config.num_nextn_predict_layers == 0
    assert torch.equal(logits_of(model), logits_of(whole))


def block_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"version": 2}, NotSupported, "quantization_config.version: 2 is not supported, only 1"),
        ({"version": None}, ConfigError, "quantization_config.version: missing"),
        ({"groups": []}, ConfigError, "quantization_config.groups: must be a list of objects"),
        ({"groups": {}}, ConfigError, "quantization_config.groups: must be a list of objects"),
        ({"groups": [3]}, ConfigError, r"quantization_config.groups\[0\]: must be an object"),
        ({"rest": {"quant_method": "expert-records"}}, ConfigError, "expert-records within expert-records"),
        ({"rest": {"quant_method": "aqlm"}}, NotSupported, "rest.quant_method: 'aqlm' is not supported"),
        ({"rest": 3}, ConfigError, "quantization_config.rest: must be an object"),
        ({"layers": ["model.layers.0", "model.layers.0"]}, ConfigError, r"groups\[0\].layers: must name layers, each"),
        ({"layers": []}, ConfigError, r"groups\[0\].layers: must name layers, each once"),
        ({"layers": "all"}, ConfigError, r"groups\[0\].layers: must be a list of names"),
        (
            {"gate_up": {"dtype": "int3"}},
            NotSupported,
            r"groups\[0\].gate_up.dtype: 'int3' is not supported, only 'int4'",
        ),
        ({"down": None}, ConfigError, r"groups\[0\].down: must be an object"),
        ({"down": {"dtype": "int4", "scale_dtype": "float16"}}, ConfigError, "down.group_size: .* positive, not 0"),
        ({"down": {"dtype": "int4", "group_size": 32}}, ConfigError, "down.scale_dtype: missing, only 'float32'"),
        (
            {"down": {"dtype": "int4", "group_size": 24, "scale_dtype": "float16"}},
            CorruptCheckpoint,
            "groups of 24 inputs",
        ),
        (
            {"down": {"dtype": "int4", "group_size": 64, "scale_dtype": "float16"}},
            CorruptCheckpoint,
            "96 inputs of down",
        ),
        (
            {"down": {"dtype": "int8", "group_size": 32, "scale_dtype": "float16"}},
            CorruptCheckpoint,
            r"asks for \[4, 16384\]",
        ),
        ({"layers": ["model.layers.0"]}, CorruptCheckpoint, "quantization_config does not say what it is"),
    ],
)
def test_a_description_that_is_damaged_is_told(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], told: str
) -> None:
    folder = tmp_path / "m"
    record_folder(folder, INT4)
    block = block_of(folder)
    for key, value in change.items():
        (block if key in block else block["groups"][0])[key] = value
    edit_config(folder, quantization_config=block)
    with pytest.raises(error, match=told):
        load_model(folder)


def test_records_that_nobody_describes_are_told(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4)
    edit_config(tmp_path / "m", quantization_config=None)
    with pytest.raises(CorruptCheckpoint, match=r"experts.records: quantization_config does not say what it is"):
        load_model(tmp_path / "m")


def test_keys_that_are_not_known_are_named(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4)
    edit_config(tmp_path / "m", quantization_config={**block_of(tmp_path / "m"), "shuffled": True})
    with pytest.warns(QnextWarning, match="quantization_config: shuffled: not known here"):
        load_model(tmp_path / "m")
