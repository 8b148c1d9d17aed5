"""Which parameters of a folder a model holds as integer codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from qnext.checkpoint.check import Layout
from qnext.checkpoint.files import TORCH_DTYPES, TensorFiles
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.packed import PackedWeight
from qnext.checkpoint.packed_values import is_in_order
from qnext.errors import warn
from qnext.planning import Kind

# What the model reads as tensors: a gate is small, and its last bits choose experts.
_ALWAYS_PLAIN = (Kind.ROUTER, Kind.SHARED_SCALE)


class Codes(NamedTuple):
    """What must be known to make room for a quantised parameter."""

    shape: tuple[int, ...]
    bits: int
    group_size: int
    scale_dtype: torch.dtype
    has_zeros: bool


def coded_parameters(layout: Layout, files: TensorFiles) -> dict[str, Codes]:
    """The parameters that stay codes: those of one form in all parts, with their groups in order.

    The rest of what is packed in integers becomes tensors, and a warning says how many.
    """
    forms: dict[str, set[Codes | None]] = {}
    has_integers: set[str] = set()
    for name, (parameter, _) in layout.targets.items():
        if parameter.kind in _ALWAYS_PLAIN:
            continue
        packed = layout.packed.get(name)
        codes = None
        if packed is not None and packed.form.keeps_codes:
            has_integers.add(parameter.name)
            if is_in_order(packed, files):
                codes = _codes_of(packed, parameter.shape, files.tensors)
        forms.setdefault(parameter.name, set()).add(codes)
    found = {name: next(iter(each)) for name, each in forms.items() if len(each) == 1}
    kept = {name: codes for name, codes in found.items() if codes is not None}
    numbers = sorted(has_integers - kept.keys())
    if numbers:
        warn(
            f"{files.folder}: {numbers[0]}{f' and {len(numbers) - 1} more' if numbers[1:] else ''}: numbers instead of "
            "codes in memory, since parts differ in form or columns are in activation order (desc_act)"
        )
    return kept


def _codes_of(packed: PackedWeight, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> Codes:
    scale_dtype = TORCH_DTYPES[tensors[packed.stored["scales"].name].dtype]
    if packed.form.layout == "bnb-int8":
        scale_dtype = torch.float32
    return Codes(shape, packed.form.code_bits, packed.group_size, scale_dtype, not packed.form.is_symmetric)
