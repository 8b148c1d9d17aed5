"""Record files become the experts of layers, which a model's modules hold as weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qnext import ops
from qnext.planning.expert_records import CODE_BITS, RecordFile, RecordLayout

HALF_LIFE = 64  # tokens
LEAST_WAIT_NS = 200_000  # of a layer: asking the next one's router costs about as much
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ResidencyPlan:
    """How many experts of each layer stay in memory, and how many buffers there are beside them for reads."""

    slots: tuple[int, ...]
    num_spare: int
    reader: ops.RecordReader
    half_life: int = HALF_LIFE
    least_wait_ns: int = LEAST_WAIT_NS
    remembered_in: Path | None = None  # a folder: what it remembers is read while the model's other weights are read

    @property
    def num_buffers(self) -> int:
        return sum(self.slots) + self.num_spare


class ExpertStore:
    """The experts of all layers that are streamed, by name of the layer: gate_up and down."""

    def __init__(self, files: Sequence[RecordFile], plan: ResidencyPlan) -> None:
        """Raises OSError for a file that cannot be opened, ValueError where records differ in size or do not lie on
        pages, so that they cannot be read directly."""
        strides = {file.layout.stride for file in files}
        if len(strides) != 1:
            raise ValueError(f"records of {len(strides)} sizes cannot share buffers")
        for file in files:
            if not file.is_aligned:
                raise ValueError(f"{file.path}: the records of {file.layer} do not begin at a page")
        self.residency = ops.Residency(
            [ops.LayerRecords(file.layer, file.path, file.offset, file.checksums) for file in files],
            plan.slots,
            record_bytes=strides.pop(),
            num_buffers=plan.num_buffers,
            half_life=plan.half_life,
            reader=plan.reader,
            least_wait_ns=plan.least_wait_ns,
        )
        self.weights: dict[str, tuple[ops.RecordWeight, ops.RecordWeight]] = {}
        for number, file in enumerate(files):
            experts = self.residency.experts_of(number)
            gate_up, down = (ops.RecordWeight(matrix, experts) for matrix in record_matrices(file.layout))
            self.weights[file.layer] = gate_up, down


def record_matrices(layout: RecordLayout) -> tuple[ops.RecordMatrix, ops.RecordMatrix]:
    """gate_up and down."""
    return _matrix(layout, "gate_up"), _matrix(layout, "down")


def _matrix(layout: RecordLayout, name: str) -> ops.RecordMatrix:
    form = layout.form_of(name)
    values, scales, zeros = (layout.part(name, kind) for kind in ("values", "scales", "zeros"))
    assert values is not None
    return ops.RecordMatrix(
        layout.shape_of(name),
        _DTYPES[form.dtype if form.is_float else form.scale_dtype],
        bits=CODE_BITS.get(form.dtype, 0),
        group_size=form.group_size,
        values_at=values.start,
        scales_at=0 if scales is None else scales.start,
        zeros_at=None if zeros is None else zeros.start,
    )
