"""Which parameters of a folder a model holds as codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

from qnext.checkpoint.check import Layout
from qnext.checkpoint.files import TORCH_DTYPES, TensorFiles
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import Part
from qnext.checkpoint.packed import PackedWeight
from qnext.checkpoint.packed_values import is_in_order
from qnext.errors import warn
from qnext.planning import Kind

# What the model reads as tensors: a gate is small, and its last bits choose experts.
_ALWAYS_PLAIN = (Kind.ROUTER, Kind.SHARED_SCALE)


Found = TypeVar("Found")


class Codes(NamedTuple):
    """What must be known to make room for a quantised parameter."""

    shape: tuple[int, ...]
    bits: int
    group_size: int
    scale_dtype: torch.dtype
    has_zeros: bool


class Fp8Codes(NamedTuple):
    """The same of a parameter in fp8. `block` outputs and inputs share a scale."""

    shape: tuple[int, ...]
    block: tuple[int, int]
    scale_dtype: torch.dtype


def coded_parameters(layout: Layout, files: TensorFiles) -> dict[str, Codes]:
    """The parameters that stay integer codes: those of one form in all parts, with their groups in order.

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
    kept = _of_one_form(forms)
    numbers = sorted(has_integers - kept.keys())
    if numbers:
        warn(
            f"{files.folder}: {numbers[0]}{f' and {len(numbers) - 1} more' if numbers[1:] else ''}: numbers instead of "
            "codes in memory, since parts differ in form or columns are in activation order (desc_act)"
        )
    return kept


def fp8_parameters(layout: Layout, files: TensorFiles) -> dict[str, Fp8Codes]:
    """The parameters that can stay fp8: those whose blocks have scales, of one form in all parts. For devices whose
    kernels read them."""
    forms: dict[str, set[Fp8Codes | None]] = {}
    for name, (parameter, part) in layout.targets.items():
        if parameter.kind in (*_ALWAYS_PLAIN, Kind.EMBEDDING):
            continue
        packed = layout.packed.get(name)
        codes = None if packed is None else _fp8_of(packed, parameter.shape, part, files.tensors)
        forms.setdefault(parameter.name, set()).add(codes)
    return _of_one_form(forms)


def _of_one_form(forms: Mapping[str, set[Found | None]]) -> dict[str, Found]:
    found = {name: next(iter(each)) for name, each in forms.items() if len(each) == 1}
    return {name: codes for name, codes in found.items() if codes is not None}


def _fp8_of(
    packed: PackedWeight, shape: tuple[int, ...], part: Part, tensors: Mapping[str, TensorInfo]
) -> Fp8Codes | None:
    """None for E5M2, for scales of whole channels or tensors, and for parts that begin inside a block."""
    block = packed.form.block
    if packed.form.layout != "fp8" or block is None or min(block) < 1 or block[1] & (block[1] - 1):
        return None
    if tensors[packed.stored["codes"].name].dtype != "F8_E4M3" or (part.rows is not None and part.rows[0] % block[0]):
        return None
    stored = tensors[packed.stored["scales"].name].dtype
    return Fp8Codes(shape, block, torch.bfloat16 if stored == "BF16" else torch.float32)


def _codes_of(packed: PackedWeight, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> Codes:
    scale_dtype = TORCH_DTYPES[tensors[packed.stored["scales"].name].dtype]
    if packed.form.layout == "bnb-int8":
        scale_dtype = torch.float32
    return Codes(shape, packed.form.code_bits, packed.group_size, scale_dtype, not packed.form.is_symmetric)
