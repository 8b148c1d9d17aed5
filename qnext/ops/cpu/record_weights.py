"""Experts that lie in records, one per expert: all in memory, or on disk and in memory as far as there is room.

Legend: E experts, F outputs, D inputs, B bytes of a record.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qnext.ops.cpu.kernels import kernels
from qnext.ops.cpu.panels import KIND_OF_BITS, KIND_OF_FLOAT, SCALE_KINDS
from qnext.ops.memory import empty_huge
from qnext.ops.panel_order import codes_from_panels, groups_from_panels
from qnext.ops.quantized import QuantizedWeight


class RecordMatrix(NamedTuple):
    """A matrix [F, D] in a record: floats in rows, or codes in panels with their scales; places in bytes from the
    start of the record."""

    shape: tuple[int, int]
    dtype: torch.dtype  # of the floats, or of the scales
    bits: int  # of a code; 0 for floats
    group_size: int
    values_at: int
    scales_at: int = 0
    zeros_at: int | None = None

    def read(self, record_B: Tensor) -> Tensor | QuantizedWeight:
        """The matrix of one record, in the form of the disk. Floats share the record's memory."""
        num_outputs, num_inputs = self.shape
        if not self.bits:
            return self._part(record_B, self.values_at, num_outputs * num_inputs, self.dtype).view(self.shape)
        panels, groups = num_outputs // 16, (num_outputs // 16, num_inputs // self.group_size, 16)
        codes = self._part(record_B, self.values_at, num_outputs * num_inputs * self.bits // 8, torch.uint8)
        scales = self._part(record_B, self.scales_at, groups[0] * groups[1] * 16, self.dtype).view(groups)
        zeros = None
        if self.zeros_at is not None:
            zeros = groups_from_panels(
                self._part(record_B, self.zeros_at, groups[0] * groups[1] * 16, torch.uint8).view(groups)
            )
        return QuantizedWeight(
            codes_from_panels(codes.view(panels, -1), num_inputs=num_inputs, bits=self.bits),
            groups_from_panels(scales),
            self.bits,
            self.group_size,
            zeros,
        )

    def _part(self, record_B: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
        return record_B[start : start + count * dtype.itemsize].view(dtype)


class Records(Protocol):
    """Where the records of a layer are."""

    @property
    def num_experts(self) -> int: ...

    stamps: Tensor | None
    """Their checksums: what tells their content without reading it."""

    def record(self, expert: int) -> Tensor:
        """The bytes of one, valid until the next is asked for."""

    def give_to(self, handle: Any, matrix: RecordMatrix) -> None:
        """Tell the kernels where the matrices lie."""


class ExpertTable:
    """The records of a layer, all in memory, in huge pages: [E, B], filled by whoever reads them."""

    def __init__(self, num_experts: int, record_bytes: int) -> None:
        self.stamps: Tensor | None = None  # their checksums, where whoever filled it knows them
        self.memory_EB = empty_huge((num_experts, record_bytes), dtype=torch.uint8)
        first = self.memory_EB.data_ptr()
        self._table = kernels().RecordTable(first=first, record_bytes=record_bytes, num_experts=num_experts)

    @property
    def num_experts(self) -> int:
        return self.memory_EB.shape[0]

    def record(self, expert: int) -> Tensor:
        return self.memory_EB[expert]

    def give_to(self, handle: Any, matrix: RecordMatrix) -> None:
        zeros_at = -1 if matrix.zeros_at is None else matrix.zeros_at
        handle.use_records(self._table, matrix.values_at, matrix.scales_at, zeros_at)


class RecordWeight:
    """One matrix of each expert, [E, F, D], in records that it shares with another one."""

    def __init__(self, matrix: RecordMatrix, records: Records) -> None:
        self.matrix, self.records = matrix, records
        self.shape = torch.Size((records.num_experts, *matrix.shape))
        if matrix.bits:
            scale_kind, group_size = SCALE_KINDS[matrix.dtype], matrix.group_size
            form = {"kind": KIND_OF_BITS[matrix.bits], "scale_kind": scale_kind, "group_size": group_size}
        else:
            form = {"kind": KIND_OF_FLOAT[matrix.dtype]}
        num_outputs, num_inputs = matrix.shape
        self.handle = kernels().Weight(
            num_experts=records.num_experts, num_outputs=num_outputs, num_inputs=num_inputs, **form
        )
        records.give_to(self.handle, matrix)

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales, or of the floats."""
        return self.matrix.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """Its part of the records, or their checksums where they are on disk."""
        if not isinstance(self.records, ExpertTable):
            assert self.records.stamps is not None
            return [self.records.stamps]
        first, end = _extent(self.matrix)
        return [self.records.memory_EB[:, first:end]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[E, F, D]: computed in fp32 and rounded once to `dtype`. Reads every record."""
        out_EFD = torch.empty(self.shape, dtype=dtype)
        for expert, place_FD in enumerate(out_EFD):
            weight = self[expert]
            place_FD.copy_(weight if isinstance(weight, Tensor) else weight.dequantize(dtype))
        return out_EFD

    def to(self, device: torch.device | str) -> RecordWeight:
        """Itself: records are for the kernels of the CPU. Raises ValueError for another device."""
        if torch.device(device).type != "cpu":
            raise ValueError(f"experts in records are computed on the CPU, not on {device}")
        return self

    def __getitem__(self, expert: int) -> Tensor | QuantizedWeight:
        """One matrix, in the form of the disk."""
        return self.matrix.read(self.records.record(expert))

    def __repr__(self) -> str:
        return f"RecordWeight({list(self.shape)}, bits={self.matrix.bits or 8 * self.dtype.itemsize})"


def _extent(matrix: RecordMatrix) -> tuple[int, int]:
    """First byte and end of all parts of a matrix."""
    num_outputs, num_inputs = matrix.shape
    if not matrix.bits:
        return matrix.values_at, matrix.values_at + num_outputs * num_inputs * matrix.dtype.itemsize
    num_groups = num_outputs * num_inputs // matrix.group_size
    end = matrix.scales_at + num_groups * matrix.dtype.itemsize
    return matrix.values_at, end if matrix.zeros_at is None else matrix.zeros_at + num_groups
