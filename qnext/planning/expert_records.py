"""Where the matrices of one expert lie in its record, in the order in which the kernels read them. No torch.

A record is all that one expert is: its gate and up rows, then its down rows, each as codes, scales and zeros, or as
plain numbers. Codes, scales and zeros lie in panels of sixteen outputs, as `ops.PanelWeight` has them.

Legend: F expert width, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

PANEL = 16  # outputs
PART_ALIGNMENT = 64  # bytes, within a record
PAGE = 4096  # bytes: of a record, and of where a file's records begin
CODE_BITS = {"int4": 4, "int8": 8}
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class MatrixForm:
    """What the numbers of a matrix are: floats of `dtype`, or codes (int4, int8) with a scale for every `group_size`
    inputs of an output, and with `has_zeros` a zero of one byte. Raises ValueError for what is neither.
    """

    dtype: str
    group_size: int = 0
    scale_dtype: str = ""
    has_zeros: bool = False

    def __post_init__(self) -> None:
        if self.dtype in FLOAT_BYTES:
            if self.group_size or self.scale_dtype or self.has_zeros:
                raise ValueError(f"{self.dtype} has neither groups nor scales nor zeros")
        elif self.dtype not in CODE_BITS:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join((*CODE_BITS, *FLOAT_BYTES))}")
        elif self.scale_dtype not in FLOAT_BYTES:
            raise ValueError(f"scale_dtype {self.scale_dtype!r} is none of {', '.join(FLOAT_BYTES)}")
        elif self.group_size <= 0:
            raise ValueError(f"group_size must be positive, not {self.group_size}")

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_BYTES

    @property
    def bits(self) -> int:
        """Of one number, without scales."""
        return 8 * FLOAT_BYTES[self.dtype] if self.is_float else CODE_BITS[self.dtype]


class RecordPart(NamedTuple):
    """Bytes [start, start + num_bytes) of a record: the values, scales or zeros of a matrix, gate_up or down."""

    matrix: str
    kind: str
    start: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.num_bytes


@dataclass(frozen=True)
class RecordLayout:
    """A record of an expert with gate_up [2F, D] and down [D, F].

    Parts begin at multiples of 64 bytes and records at multiples of 4096; what is between is zero. Raises ValueError
    where a matrix does not fill its panels or groups.
    """

    hidden_size: int
    expert_width: int
    gate_up: MatrixForm
    down: MatrixForm

    def __post_init__(self) -> None:
        if self.hidden_size <= 0 or self.expert_width <= 0:
            raise ValueError("sizes must be positive")
        for name, form in (("gate_up", self.gate_up), ("down", self.down)):
            num_outputs, num_inputs = self.shape_of(name)
            if form.is_float:
                continue
            if num_outputs % (2 * PANEL):
                raise ValueError(f"{num_outputs} outputs of {name} do not fill panels of {PANEL} in two halves")
            if form.group_size % PANEL:
                raise ValueError(f"groups of {form.group_size} inputs are no multiple of {PANEL}")
            if num_inputs % form.group_size:
                raise ValueError(f"{num_inputs} inputs of {name} are no whole number of groups of {form.group_size}")

    def form_of(self, matrix: str) -> MatrixForm:
        return self.gate_up if matrix == "gate_up" else self.down

    def shape_of(self, matrix: str) -> tuple[int, int]:
        """Outputs and inputs."""
        if matrix == "gate_up":
            return 2 * self.expert_width, self.hidden_size
        return self.hidden_size, self.expert_width

    @cached_property
    def parts(self) -> tuple[RecordPart, ...]:
        """In the order of their bytes."""
        found: list[RecordPart] = []
        for matrix in ("gate_up", "down"):
            for kind, num_bytes in self._sizes(matrix):
                start = _round_up(found[-1].end if found else 0, PART_ALIGNMENT)
                found.append(RecordPart(matrix, kind, start, num_bytes))
        return tuple(found)

    def part(self, matrix: str, kind: str) -> RecordPart | None:
        """None for zeros where there are none, and for scales of floats."""
        return next((part for part in self.parts if (part.matrix, part.kind) == (matrix, kind)), None)

    @property
    def num_bytes(self) -> int:
        """Of all parts and what is between them."""
        return self.parts[-1].end

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return _round_up(self.num_bytes, PAGE)

    def _sizes(self, matrix: str) -> list[tuple[str, int]]:
        form = self.form_of(matrix)
        num_outputs, num_inputs = self.shape_of(matrix)
        sizes = [("values", num_outputs * num_inputs * form.bits // 8)]
        if not form.is_float:
            num_groups = num_outputs * (num_inputs // form.group_size)
            sizes.append(("scales", num_groups * FLOAT_BYTES[form.scale_dtype]))
            if form.has_zeros:
                sizes.append(("zeros", num_groups))
        return sizes


class RecordFile(NamedTuple):
    """Where the records of a layer lie: record e is the bytes of `path` from `offset` + e * `layout.stride` on.

    `checksums` are the CRC-32 of each. Records whose file does not have them `is_aligned` cannot be read directly.
    """

    layer: str  # model.layers.0
    path: Path
    offset: int
    layout: RecordLayout
    checksums: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return len(self.checksums)

    @property
    def is_aligned(self) -> bool:
        return self.offset % PAGE == 0


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
