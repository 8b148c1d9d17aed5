"""Experts that lie in records, one aligned run of bytes each: found in the headers, and seen as their parts. No torch.

A layer of records is two tensors, `<layer>.mlp.experts.records` (U8 [E, stride]) and `.record_checksums` (I64 [E], the
CRC-32 of each record). Whoever reads numbers sees the parts of each expert under names of their own, as runs of the
same bytes; there are 150,000 of them in the 80B. How a record is laid out is planning.expert_records' affair.

Legend: E experts, F outputs, D inputs.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from qnext.checkpoint.formats.forms import RecordForms
from qnext.checkpoint.header import CheckpointIndex, TensorInfo
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint
from qnext.planning import Kind, list_parameters
from qnext.planning.expert_records import PAGE, PANEL, RecordFile, RecordLayout

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Name of the last piece of a part's name, after that of its module.
PANELS, SCALES, ZEROS = "weight_panels", "weight_panel_scale", "weight_panel_zeros"


class ExpertRecords(NamedTuple):
    """The records of one layer: `records` is the tensor [E, stride], `checksums` the one beside it."""

    layer: str  # model.layers.0
    records: TensorInfo
    checksums: TensorInfo
    layout: RecordLayout

    @property
    def num_experts(self) -> int:
        return self.records.shape[0]

    @property
    def is_aligned(self) -> bool:
        """Whether records can be read past the page cache."""
        return self.records.start % PAGE == 0


class RecordView(NamedTuple):
    """An index in which checksums belong to their records, and what is wrong with those that are not, one line each."""

    checkpoint: CheckpointIndex
    num_bytes: int  # of all tensors
    records: dict[str, ExpertRecords]  # by name of the layer
    unlisted: dict[str, ExpertRecords]  # those of them that are not seen as their parts
    problems: list[str]
    disputed: frozenset[str]  # layers that a line of `problems` is about


def records_name(layer: str) -> str:
    return f"{layer}.mlp.experts.records"


def checksums_name(layer: str) -> str:
    return f"{layer}.mlp.experts.record_checksums"


def expert_layers(config: ModelConfig) -> list[str]:
    """Names of the layers that have experts, MTP's last."""
    infos = list_parameters(config).values()
    return [info.name.partition(".mlp.")[0] for info in infos if info.kind is Kind.EXPERTS_DOWN]


def view_records(index: CheckpointIndex, config: ModelConfig, forms: Mapping[str, RecordForms]) -> RecordView:
    """`forms` says of each layer what its records hold. A layer of MTP whose records are missing is left as it is."""
    found: dict[str, ExpertRecords] = {}
    problems: dict[str, str] = {}
    for layer in expert_layers(config):
        records, checksums = (index.tensors.get(name(layer)) for name in (records_name, checksums_name))
        if layer not in forms:
            if records is not None:
                problems[layer] = f"{records.file}: tensor {records.name}: quantization_config does not say what it is"
            continue
        if records is None or checksums is None:
            if not layer.startswith("mtp."):
                name = records_name(layer) if records is None else checksums_name(layer)
                problems[layer] = f"{index.folder}: tensor {name} is missing"
            continue
        problem = _problem(records, checksums, config, forms[layer])
        if problem is None:
            layout = RecordLayout(config.hidden_size, config.moe_intermediate_size, *forms[layer])
            found[layer] = ExpertRecords(layer, records, checksums, layout)
        else:
            problems[layer] = problem
    hidden = {checksums_name(layer) for layer in (*found, *problems)} | {records_name(layer) for layer in problems}
    tensors = {name: info for name, info in index.tensors.items() if name not in hidden}
    num_bytes = sum(info.num_bytes for info in index.tensors.values())
    return RecordView(
        index._replace(tensors=tensors), num_bytes, found, found, list(problems.values()), frozenset(problems)
    )


def list_parts(view: RecordView, layers: Collection[str]) -> RecordView:
    """The same with the records of some layers seen as their parts."""
    by_name = {view.unlisted[layer].records.name: view.unlisted[layer] for layer in layers}
    tensors: dict[str, TensorInfo] = {}
    for name, info in view.checkpoint.tensors.items():
        if name in by_name:
            tensors |= {part.name: part for part in parts_of(by_name[name])}
        else:
            tensors[name] = info
    unlisted = {layer: each for layer, each in view.unlisted.items() if layer not in layers}
    return view._replace(checkpoint=view.checkpoint._replace(tensors=tensors), unlisted=unlisted)


def _problem(records: TensorInfo, checksums: TensorInfo, config: ModelConfig, forms: RecordForms) -> str | None:
    """What is wrong with the tensors of a layer, from headers alone."""
    try:
        layout = RecordLayout(config.hidden_size, config.moe_intermediate_size, *forms)
    except ValueError as error:
        return f"{records.file}: tensor {records.name}: {error}"
    for info, shape, dtypes in (
        (records, (config.num_experts, layout.stride), ("U8",)),
        (checksums, (config.num_experts,), ("I64",)),
    ):
        if info.shape != shape:
            return f"{info.file}: tensor {info.name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
        if info.dtype not in dtypes:
            return f"{info.file}: tensor {info.name} has dtype {info.dtype}, not {' or '.join(dtypes)}"
    return None


def parts_of(records: ExpertRecords) -> Iterator[TensorInfo]:
    """Every expert's parts in the order of their bytes, as tensors that lie where they lie."""
    slots = list(_slots(records.layout))
    name, file, begin = f"{records.layer}.mlp.experts", records.records.file, records.records.start
    for expert in range(records.num_experts):
        first = begin + expert * records.layout.stride
        for slot in slots:
            yield TensorInfo(
                f"{name}.{expert}.{slot.key}", slot.dtype, slot.shape, file, first + slot.start, first + slot.end
            )


class _Slot(NamedTuple):
    """A part of a record, or a projection's half of it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _slots(layout: RecordLayout) -> Iterator[_Slot]:
    key: str
    shape: tuple[int, ...]
    for part in layout.parts:
        form = layout.form_of(part.matrix)
        num_outputs, num_inputs = layout.shape_of(part.matrix)
        projections = ("gate_proj", "up_proj") if part.matrix == "gate_up" else ("down_proj",)
        outputs, size = num_outputs // len(projections), part.num_bytes // len(projections)
        num_panels = outputs // PANEL
        if form.is_float:
            key, dtype, shape = "weight", DTYPES[form.dtype], (outputs, num_inputs)
        elif part.kind == "values":
            key, dtype, shape = PANELS, "U8", (num_panels, size // num_panels)
        else:
            key, dtype = (SCALES, DTYPES[form.scale_dtype]) if part.kind == "scales" else (ZEROS, "U8")
            shape = (num_panels, num_inputs // form.group_size, PANEL)
        for i, projection in enumerate(projections):
            start = part.start + i * size
            yield _Slot(f"{projection}.{key}", dtype, shape, start, start + size)


def record_files(layout_records: Mapping[str, ExpertRecords]) -> list[RecordFile]:
    """Of each layer, with the checksums, for a reader that opens the files itself."""
    found = []
    for layer, each in layout_records.items():
        with each.checksums.file.open("rb") as file:
            file.seek(each.checksums.start)
            raw = file.read(each.checksums.num_bytes)
        if len(raw) < each.checksums.num_bytes:
            raise CorruptCheckpoint(f"{each.checksums.file}: truncated while tensor {each.checksums.name} was read")
        sums = struct.unpack(f"<{each.num_experts}q", raw)
        found.append(RecordFile(layer, each.records.file, each.records.start, each.layout, sums))
    return found
