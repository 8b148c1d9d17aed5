"""Places in a record against a record that is laid out byte by byte."""

from __future__ import annotations

import itertools

import pytest

from qnext.ops import panel_order
from qnext.planning.expert_records import FLOAT_BYTES, PANEL, MatrixForm, RecordLayout

FORMS = [
    MatrixForm("int4", 32, "float16"),
    MatrixForm("int4", 16, "bfloat16", has_zeros=True),
    MatrixForm("int4", 128, "float32"),
    MatrixForm("int8", 32, "float32", has_zeros=True),
    MatrixForm("int8", 64, "bfloat16"),
    MatrixForm("bfloat16"),
    MatrixForm("float16"),
    MatrixForm("float32"),
]


def laid_out(hidden: int, width: int, gate_up: MatrixForm, down: MatrixForm) -> tuple[list[tuple[str, str, int]], int]:
    """(matrix, kind, first byte) of each part and the stride, by counting one row after the other."""
    places: list[tuple[str, str, int]] = []
    position = 0
    for matrix, outputs, inputs, form in (("gate_up", 2 * width, hidden, gate_up), ("down", hidden, width, down)):
        kinds = {"values": 0.0, "scales": 0.0, "zeros": 0.0}
        for _ in range(outputs):
            kinds["values"] += inputs * ({"int4": 0.5, "int8": 1.0}.get(form.dtype) or FLOAT_BYTES[form.dtype])
            for _ in range(0, inputs if form.group_size else 0, form.group_size or 1):
                kinds["scales"] += FLOAT_BYTES[form.scale_dtype]
                kinds["zeros"] += form.has_zeros
        for kind, count in kinds.items():
            if count:
                while position % 64:
                    position += 1
                places.append((matrix, kind, position))
                assert count == int(count)
                position += int(count)
    while position % 4096:
        position += 1
    return places, position


@pytest.mark.parametrize(("gate_up", "down"), list(itertools.product(FORMS, FORMS)))
def test_parts_follow_each_other_and_records_fill_pages(gate_up: MatrixForm, down: MatrixForm) -> None:
    for hidden, width in ((128, 128), (256, 128), (128, 384)):
        layout = RecordLayout(hidden, width, gate_up, down)
        places, stride = laid_out(hidden, width, gate_up, down)
        assert [(part.matrix, part.kind, part.start) for part in layout.parts] == places
        assert layout.stride == stride
        assert all(first.end <= second.start for first, second in itertools.pairwise(layout.parts))
        assert layout.num_bytes == layout.parts[-1].end <= stride < layout.num_bytes + 4096
        for part in layout.parts:
            assert layout.part(part.matrix, part.kind) == part
        assert layout.part("down", "zeros") is None or down.has_zeros


def test_the_released_model_fills_its_pages() -> None:
    form = MatrixForm("int4", 32, "float16")
    layout = RecordLayout(2048, 512, form, form)
    assert layout.stride == layout.num_bytes == 1_769_472 == 432 * 4096


def test_panels_are_those_of_the_kernels() -> None:
    assert PANEL == panel_order.PANEL


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (("int4", 0, "float16"), "positive"),
        (("int4", -16, "float16"), "positive"),
        (("int4", 32, "float64"), "scale_dtype 'float64'"),
        (("int4", 32), "scale_dtype ''"),
        (("int3", 32, "float16"), "dtype 'int3'"),
        (("bfloat16", 32), "neither groups"),
        (("bfloat16", 0, "float16"), "neither groups"),
    ],
)
def test_a_form_that_no_kernel_reads_is_refused(form: tuple[str, int, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MatrixForm(*form)


@pytest.mark.parametrize(
    ("hidden", "width", "told"),
    [
        (64, 24, "48 outputs of gate_up"),
        (48, 48, "48 outputs of down"),
        (64, 48, "48 inputs of down"),
        (32, 0, "positive"),
    ],
)
def test_sizes_that_fill_no_panels_are_refused(hidden: int, width: int, told: str) -> None:
    form = MatrixForm("int4", 16 if hidden == 48 else 32, "float16")
    with pytest.raises(ValueError, match=told):
        RecordLayout(hidden, width, form, form)
    with pytest.raises(ValueError, match="groups of 24"):
        RecordLayout(96, 96, MatrixForm("int4", 24, "float16"), form)
    if width:
        assert RecordLayout(hidden, width, FORMS[5], FORMS[7]).stride > 0  # floats lie in rows
