"""Layers whose records lie in memory as they lie on disk: read in one go, without taking them apart."""

from __future__ import annotations

import torch

from qnext import ops
from qnext.checkpoint.check import Layout
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.records import ExpertRecords, parts_of
from qnext.checkpoint.values import tensor_value_problems
from qnext.errors import CorruptCheckpoint
from qnext.planning.expert_records import RecordLayout
from qnext.residency.store import record_matrices


class RecordTables:
    """Room for the coded experts of some layers, and their weights by parameter name."""

    def __init__(self, layers: list[ExpertRecords]) -> None:
        self.weights: dict[str, ops.RecordWeight] = {}
        self._tables: list[tuple[ExpertRecords, ops.ExpertTable]] = []
        for layer in layers:
            table = ops.ExpertTable(layer.num_experts, layer.layout.stride)
            gate_up, down = (ops.RecordWeight(matrix, table) for matrix in record_matrices(layer.layout))
            self.weights[f"{layer.layer}.mlp.experts.gate_up_proj"] = gate_up
            self.weights[f"{layer.layer}.mlp.experts.down_proj"] = down
            self._tables.append((layer, table))
        ops.touch(table.memory_EB for _, table in self._tables)

    @staticmethod
    def serve(layout: Layout, *, but: set[str]) -> list[ExpertRecords]:
        """The layers that can lie so, except those named. None without native kernels, which alone read panels."""
        if ops.instruction_set() is None:
            return []
        found = [each for layer, each in layout.records.items() if layer not in but]
        return [each for each in found if not (each.layout.gate_up.is_float or each.layout.down.is_float)]

    @property
    def num_bytes(self) -> int:
        return sum(table.memory_EB.nbytes for _, table in self._tables)

    def read(self, layout: Layout, files: TensorFiles, *, check_finite: bool) -> None:
        """Fill the room. Raises CorruptCheckpoint for a record that is not what its checksum says, or (with
        `check_finite`) whose scales are no finite numbers."""
        for layer, table in self._tables:
            files.read_bytes(layer.records, 0, layer.records.num_bytes, into=table.memory_EB.view(-1))
            sums = files.read_bytes(layer.checksums, 0, layer.checksums.num_bytes).view(torch.int64)
            for expert, expected in enumerate(sums.tolist()):
                if ops.crc32(table.record(expert)) != expected:
                    name = layer.records.name
                    raise CorruptCheckpoint(
                        f"{layer.records.file}: tensor {name}: record {expert} is not what its checksum says"
                    )
            table.stamps = sums.clone()
            if check_finite:
                _check_scales(layout, layer, table)


def _check_scales(layout: Layout, layer: ExpertRecords, table: ops.ExpertTable) -> None:
    if all(_is_sound(layer.layout, matrix, table) for matrix in ("gate_up", "down")):
        return
    listed = layout.with_experts_of([layer.layer])  # which one it is
    with TensorFiles(listed.index) as files:
        for part in parts_of(layer):
            for problem in tensor_value_problems(listed, files, part, check_finite=True):
                raise CorruptCheckpoint(problem)


def _is_sound(layout: RecordLayout, matrix: str, table: ops.ExpertTable) -> bool:
    """Whether the scales of all experts are finite, and their zeros are codes."""
    form = layout.form_of(matrix)
    scales, zeros = layout.part(matrix, "scales"), layout.part(matrix, "zeros")
    assert scales is not None
    of_scales = table.memory_EB[:, scales.start : scales.end].contiguous()
    if not ops.are_finite(of_scales.view(getattr(torch, form.scale_dtype))):
        return False
    return zeros is None or int(table.memory_EB[:, zeros.start : zeros.end].max()) < 1 << form.bits
