"""The bytes of records: made of matrices, and checked.

Legend: F outputs, D inputs, P panels of 16 outputs, G groups of inputs, B bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.records import ExpertRecords
from qnext.ops import QuantizedWeight, crc32
from qnext.ops.panel_order import PANEL, codes_to_panels, groups_to_panels
from qnext.planning.expert_records import MatrixForm, RecordLayout, RecordPart

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def matrix_form(dtype: torch.dtype) -> MatrixForm:
    """Of plain numbers."""
    return MatrixForm(_NAMES[dtype])


def code_form(*, bits: int, group_size: int, scale_dtype: torch.dtype, has_zeros: bool) -> MatrixForm:
    """Of codes. Raises ValueError where kernels do not read such groups."""
    return MatrixForm(f"int{bits}", group_size, _NAMES[scale_dtype], has_zeros)


def write_rows(record_B: Tensor, layout: RecordLayout, matrix: str, weight: Tensor | QuantizedWeight, row: int) -> None:
    """Put a matrix [f, D] of the layout's form at outputs row, row + 1, ... of one of a record's matrices.

    Of codes `row` and f are multiples of 16.
    """
    form = layout.form_of(matrix)
    if isinstance(weight, Tensor):
        assert weight.dtype == DTYPES[form.dtype], (weight.dtype, form)
        _put(record_B, layout.part(matrix, "values"), weight, row * weight.shape[1] * weight.itemsize)
        return
    assert (weight.bits, weight.group_size) == (form.bits, form.group_size), (weight.bits, weight.group_size, form)
    assert (weight.zeros is not None) == form.has_zeros and weight.dtype == DTYPES[form.scale_dtype]
    panels_PB = codes_to_panels(weight.codes, bits=weight.bits)
    _put(record_B, layout.part(matrix, "values"), panels_PB, row // PANEL * panels_PB.shape[1])
    scales_PGO = groups_to_panels(weight.scales)
    _put(record_B, layout.part(matrix, "scales"), scales_PGO, row * scales_PGO.shape[1] * scales_PGO.itemsize)
    if weight.zeros is not None:
        zeros_PGO = groups_to_panels(weight.zeros)
        _put(record_B, layout.part(matrix, "zeros"), zeros_PGO, row * zeros_PGO.shape[1])


def _put(record_B: Tensor, part: RecordPart | None, values: Tensor, offset: int) -> None:
    assert part is not None and offset + values.nbytes <= part.num_bytes
    start = part.start + offset
    record_B[start : start + values.nbytes] = values.contiguous().view(-1).view(torch.uint8)


def checksum(record_B: Tensor) -> int:
    return crc32(record_B)


def record_problem(records: Mapping[str, ExpertRecords], files: TensorFiles, info: TensorInfo) -> str | None:
    """Whether the record that begins with this part is what its checksum says; None for all other tensors."""
    layer, _, rest = info.name.partition(".mlp.experts.")
    found = records.get(layer)
    if found is None or not rest:
        return None
    offset = info.start - found.records.start
    expert, inside = divmod(offset, found.layout.stride)
    if inside != 0:
        return None
    record_B = files.read_bytes(found.records, offset, found.layout.stride)
    expected = files.read_bytes(found.checksums, 8 * expert, 8).view(torch.int64)
    if checksum(record_B) != int(expected):
        return f"{found.records.file}: tensor {found.records.name}: record {expert} is not what its checksum says"
    return None
