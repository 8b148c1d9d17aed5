"""Experts become records while a folder is written, expert by expert.

Legend: E experts, F expert width, B bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qnext.checkpoint.files import TensorSpec
from qnext.checkpoint.formats.forms import RecordForms
from qnext.checkpoint.names import Part
from qnext.checkpoint.record_values import checksum, write_rows
from qnext.checkpoint.records import checksums_name, records_name
from qnext.config import ModelConfig
from qnext.errors import UsageError
from qnext.ops import QuantizedWeight
from qnext.planning import Kind, ParameterInfo
from qnext.planning.expert_records import PAGE, MatrixForm, RecordLayout


class WeightForm(NamedTuple):
    """What is written of one part of a parameter."""

    parameter: ParameterInfo
    part: Part
    form: MatrixForm


class TensorWriter(Protocol):
    """What ShardWriter is."""

    def write(self, name: str, tensor: Tensor, *, row: int | None = None) -> None: ...


def _record_forms(forms: Iterable[WeightForm]) -> dict[str, RecordForms]:
    """What the records of each layer with experts hold; all experts of a layer have one form."""
    found: dict[str, dict[Kind, MatrixForm]] = {}
    for parameter, part, form in forms:
        if part.expert is not None:
            layer = found.setdefault(part.name.partition(".mlp.experts.")[0], {})
            assert layer.setdefault(parameter.kind, form) == form, part.name
    return {layer: RecordForms(each[Kind.EXPERTS_GATE_UP], each[Kind.EXPERTS_DOWN]) for layer, each in found.items()}


class _OpenRecord:
    """A record of which some rows are missing."""

    def __init__(self, layout: RecordLayout) -> None:
        self.bytes_B = torch.zeros(layout.stride, dtype=torch.uint8)
        self.num_missing = 2 * layout.expert_width + layout.hidden_size


class RecordWriter:
    """Takes matrices of experts in any order, and writes each record when it is whole.

    Records that are begun are in memory, so an expert's matrices should follow each other. Raises ValueError for forms
    that make no record of these sizes.
    """

    def __init__(self, config: ModelConfig, forms: Mapping[str, RecordForms]) -> None:
        sizes = config.hidden_size, config.moe_intermediate_size
        self._layouts = {layer: RecordLayout(*sizes, *each) for layer, each in forms.items()}
        self._unfinished: dict[tuple[str, int], _OpenRecord] = {}
        self._checksums_E = {layer: torch.zeros(config.num_experts, dtype=torch.int64) for layer in forms}
        self._num_missing = dict.fromkeys(forms, config.num_experts)

    @property
    def forms(self) -> dict[str, RecordForms]:
        """By name of the layer."""
        return {layer: RecordForms(layout.gate_up, layout.down) for layer, layout in self._layouts.items()}

    def specs(self) -> dict[str, TensorSpec]:
        """What will be written, by name."""
        found: dict[str, TensorSpec] = {}
        for layer, layout in self._layouts.items():
            num_experts = len(self._checksums_E[layer])
            found[records_name(layer)] = TensorSpec(torch.uint8, (num_experts, layout.stride), PAGE)
            found[checksums_name(layer)] = TensorSpec(torch.int64, (num_experts,))
        return found

    def takes(self, part: Part) -> bool:
        """Whether a tensor of the disk is part of a record."""
        return part.expert is not None and part.name.partition(".mlp.experts.")[0] in self._layouts

    def add(self, writer: TensorWriter, part: Part, weight: Tensor | QuantizedWeight) -> None:
        """One matrix of an expert: what the part is on disk."""
        assert part.expert is not None
        layer = part.name.partition(".mlp.experts.")[0]
        layout = self._layouts[layer]
        record = self._unfinished.get((layer, part.expert))
        if record is None:
            record = self._unfinished[layer, part.expert] = _OpenRecord(layout)
        first = 0 if part.rows is None else part.rows[0]
        write_rows(record.bytes_B, layout, "down" if part.rows is None else "gate_up", weight, first)
        record.num_missing -= weight.shape[0]
        if record.num_missing:
            return
        del self._unfinished[layer, part.expert]
        writer.write(records_name(layer), record.bytes_B[None], row=part.expert)
        self._checksums_E[layer][part.expert] = checksum(record.bytes_B)
        self._num_missing[layer] -= 1
        if not self._num_missing[layer]:
            writer.write(checksums_name(layer), self._checksums_E[layer])


def record_writer(config: ModelConfig, forms: Iterable[WeightForm], *, name: object) -> RecordWriter:
    """For all experts of a model. Raises UsageError, naming the source, where they make no records."""
    found = _record_forms(forms)
    if not found:
        raise UsageError(f"{name}: has no experts that could be records")
    try:
        return RecordWriter(config, found)
    except ValueError as error:
        raise UsageError(f"{name}: its experts make no records: {error}") from None
