"""Folders whose experts are records: the same numbers as in ordinary folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.checkpoint import load_model
from qnext.checkpoint.check import read_layout, structure_problems
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.formats.forms import Form
from qnext.checkpoint.header import read_index
from qnext.checkpoint.names import disk_parts, expected_tensors
from qnext.checkpoint.records import record_files
from qnext.checkpoint.values import read_weight
from qnext.diagnostics.inventory import inventory_document, take_inventory
from qnext.errors import QnextWarning
from qnext.model import Batch, CausalLM
from qnext.planning import list_parameters

from .packed_folders import Codes, weights_of
from .record_folders import FORMS, PAGE, RecordForm, record_folder, record_of

INT4 = FORMS[3]


def numbers(weight: Tensor | Codes) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize()


def logits_of(model: CausalLM) -> Tensor:
    batch = Batch.from_lengths(torch.arange(20), [7, 13])
    with torch.no_grad():
        return model.logits(model(batch).hidden_TD)


@pytest.mark.filterwarnings("error::qnext.errors.QnextWarning")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_records_load_as_what_they_were_made_of(tmp_path: Path, form: RecordForm) -> None:
    folder = record_folder(tmp_path / "m", form, plain=tmp_path / "plain")
    model = load_model(tmp_path / "m")
    infos, weights = list_parameters(model.config), weights_of(model)
    num_found = 0
    for name, info in infos.items():
        if info.expert_axis is None:
            continue
        assert isinstance(weights[name], Tensor) == (not form.bits)
        values = ops.dequantize(weights[name], torch.float32)
        for part in disk_parts(info):
            assert torch.equal(values[part.place], numbers(folder.experts[part.name])), part.name
            num_found += 1
    assert num_found == len(folder.experts) == 5 * 3 * 4
    assert torch.equal(logits_of(model), logits_of(load_model(tmp_path / "plain")))


def test_matrices_of_a_record_may_differ_in_form(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4, down=RecordForm("bfloat16"), plain=tmp_path / "plain")
    assert torch.equal(logits_of(load_model(tmp_path / "m")), logits_of(load_model(tmp_path / "plain")))


@pytest.mark.parametrize("form", [FORMS[0], INT4, FORMS[4]], ids=str)
def test_every_weight_can_be_read_alone(tmp_path: Path, form: RecordForm) -> None:
    folder = record_folder(tmp_path / "m", form)
    layout = read_layout(tmp_path / "m").with_all_experts()
    assert list(structure_problems(layout)) == []
    with TensorFiles(layout.index) as files:
        for name, weight in folder.experts.items():
            assert torch.equal(read_weight(layout, files, name, dtype=torch.float32), numbers(weight)), name


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_reader_is_told_where_each_record_lies(tmp_path: Path, form: RecordForm) -> None:
    folder = record_folder(tmp_path / "m", form)
    files = record_files(read_layout(tmp_path / "m").records)
    assert [each.layer for each in files] == folder.layers
    for each in files:
        assert each.is_aligned and each.num_experts == 4
        for expert in range(4):
            stride = each.layout.stride
            found = each.path.read_bytes()[each.offset + expert * stride :][:stride]
            names = [f"{each.layer}.mlp.experts.{expert}.{key}_proj.weight" for key in ("gate", "up", "down")]
            assert found == record_of(*(folder.experts[name] for name in names), (form, form))


def test_records_that_begin_elsewhere_are_read_all_the_same(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4, plain=tmp_path / "plain", alignment=8)
    with pytest.warns(QnextWarning, match=r"00002.safetensors: tensor .*records begins within a page: it is read, but"):
        layout = read_layout(tmp_path / "m")
    assert all(each.offset % PAGE and not each.is_aligned for each in record_files(layout.records))
    assert torch.equal(logits_of(load_model(layout)), logits_of(load_model(tmp_path / "plain")))


def test_records_count_as_the_parameters_that_they_are(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4, plain=tmp_path / "plain")
    found, plain = (inventory_document(take_inventory(str(tmp_path / name))) for name in ("m", "plain"))
    assert found["parameters"] == plain["parameters"]
    assert found["packed"] == {"panels int4-g32": plain["packed"]["pack-quantized int4-g32"]}
    for part, in_experts in (("experts", 4), ("mtp", 1)):
        codes, scales = (in_experts * 4 * 3 * 96 * 64 // width for width in (2, 32))
        assert found["dtypes_by_part"][part]["U8"] == codes
        assert found["dtypes_by_part"][part]["F16"] == scales
    assert found["dtypes_by_part"]["attention"] == plain["dtypes_by_part"]["attention"]
    assert found["bytes"] == sum(info.num_bytes for info in read_index(tmp_path / "m").tensors.values())


def test_a_layout_lists_the_parts_of_records_only_when_it_is_asked_to(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4)
    layout = read_layout(tmp_path / "m")
    some, every = layout.with_experts_of(["model.layers.1"]), layout.with_all_experts()
    assert all(list(structure_problems(each)) == [] for each in (layout, some, every))
    experts = [
        {name.partition(".mlp.experts.")[0] for name in each.targets if ".experts." in name}
        for each in (layout, some, every)
    ]
    assert experts == [set(), {"model.layers.1"}, layout.records.keys()]
    assert len(some.index.tensors) == len(layout.index.tensors) - 1 + 4 * 3 * 2
    assert layout.num_bytes == some.num_bytes == every.num_bytes
    assert layout.packed_forms == some.packed_forms == every.packed_forms == {Form("panels", 4, 32)}
    assert every.with_all_experts() is every and every.targets.keys() == expected_tensors(layout.config).keys()
    for each in (layout, some, every):
        assert {each.part_of(name) for name in each.index.tensors if ".experts." in name} == {"experts", "mtp"}
