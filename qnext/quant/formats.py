"""Layouts of quantised weights on disk to QuantizedWeight, and back.

The code that reads the headers (qnext.checkpoint.packed) has checked sizes and dtypes. Sources: compressed-tensors 0.20
(compressors/pack_quantized), AutoAWQ (modules/linear/gemm.py), AutoGPTQ and GPTQModel (nn_modules/qlinear/torch.py; the
change of qzeros between the formats gptq and gptq_v2 in utils/model.py).

Legend: F outputs, D inputs, G groups of inputs, W int32 words or bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.ops.panel_order import codes_from_panels, groups_from_panels
from qnext.ops.quantized import QUANTIZED_BITS, QuantizedWeight, pack_codes

# Which output the i-th nibble of an AWQ word belongs to, and the place of each output's nibble.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES = tuple(AWQ_ORDER.index(i) for i in range(8))


def packed_width(count: int, *, bits: int) -> int:
    """int32 words that hold `count` codes."""
    return -(-count * bits // 32)


def unpack_codes(words_W: Tensor, *, count: int, bits: int) -> Tensor:
    """int32 [..., W] -> the first `count` codes in uint8, of any number of bits. The words are one stream, lowest bit
    first.

    A code of 3, 5, 6 or 7 bits may begin in one word and end in the next.
    """
    if bits in (4, 8):
        return unpack_words(words_W, bits=bits)[..., :count]
    padded_W = torch.nn.functional.pad(words_W, (0, 1)).to(torch.int64) & 0xFFFFFFFF
    starts = torch.arange(count) * bits
    first = starts // 32
    pair = padded_W[..., first] | (padded_W[..., first + 1] << 32)
    return ((pair >> (starts % 32)) & (2**bits - 1)).to(torch.uint8)


def unpack_words(words_W: Tensor, *, bits: int) -> Tensor:
    """int32 [..., W] -> uint8 codes [..., W * 32 / bits], the lowest bits of a word first."""
    bytes_W = _view_as(words_W, torch.uint8)
    if bits == 8:
        return bytes_W
    return torch.stack((bytes_W & 15, bytes_W >> 4), dim=-1).flatten(-2)


def pack_words(codes: Tensor, *, bits: int) -> Tensor:
    """uint8 codes [..., N] -> int32 [..., ceil(N * bits / 32)]. The unused bits of the last word are zero."""
    width = packed_width(codes.shape[-1], bits=bits)
    padding = width * 32 // bits - codes.shape[-1]
    return _view_as(pack_codes(torch.nn.functional.pad(codes, (0, padding)), bits=bits), torch.int32)


def from_pack_quantized(
    packed_FW: Tensor, scale_FG: Tensor, zero_point: Tensor | None = None, *, num_inputs: int, bits: int
) -> QuantizedWeight:
    """compressed-tensors' pack-quantized. Its codes of 4 and 8 bits lie as QuantizedWeight has them, so only zeros are
    copied. Codes of another width get the next larger of these widths.

    `zero_point` is int32 [ceil(F * bits / 32), G], packed along the outputs, or int8 [F, G], as in older files.
    """
    if bits not in QUANTIZED_BITS:
        codes_FD = unpack_codes(packed_FW, count=num_inputs, bits=bits)
        if zero_point is not None and zero_point.dtype == torch.int8:
            zeros_FG = _to_offset(zero_point, bits=bits)
        elif zero_point is not None:
            zeros_FG = unpack_codes(zero_point.T, count=packed_FW.shape[0], bits=bits).T
        else:
            zeros_FG = None
        return _widened(codes_FD, scale_FG, zeros_FG, bits=bits)
    codes_FW = _view_as(packed_FW, torch.uint8)[:, : num_inputs * bits // 8]
    zeros_FG = None
    if zero_point is not None and zero_point.dtype == torch.int8:
        zeros_FG = _to_offset(zero_point, bits=bits)
    elif zero_point is not None:
        zeros_FG = unpack_words(zero_point.T, bits=bits)[:, : packed_FW.shape[0]].T
    return QuantizedWeight(codes_FW, scale_FG, bits, num_inputs // scale_FG.shape[1], zeros_FG)


def from_int_quantized(
    weight_FD: Tensor, scale_FG: Tensor, zero_point_FG: Tensor | None = None, *, bits: int
) -> QuantizedWeight:
    """compressed-tensors' int-quantized and naive-quantized: one int8 for each number, also for numbers of 4 bits."""
    zeros_FG = None if zero_point_FG is None else _to_offset(zero_point_FG, bits=bits)
    codes = pack_codes(_to_offset(weight_FD, bits=bits), bits=bits)
    return QuantizedWeight(codes, scale_FG, bits, weight_FD.shape[1] // scale_FG.shape[1], zeros_FG)


def from_awq(qweight_DW: Tensor, qzeros_GW: Tensor, scales_GF: Tensor) -> QuantizedWeight:
    """AWQ, version gemm, 4 bits: int32 [D, F / 8] and [G, F / 8], eight outputs to a word in AWQ_ORDER."""
    places = torch.tensor(_AWQ_PLACES)

    def codes_of(words: Tensor) -> Tensor:
        return unpack_words(words, bits=4).unflatten(-1, (-1, 8))[..., places].flatten(-2)

    codes_FD = codes_of(qweight_DW).T
    group_size = qweight_DW.shape[0] // scales_GF.shape[0]
    return QuantizedWeight(
        pack_codes(codes_FD, bits=4), scales_GF.T.contiguous(), 4, group_size, codes_of(qzeros_GW).T.contiguous()
    )


def from_gptq(
    qweight_WF: Tensor, scales_GF: Tensor, qzeros_GW: Tensor | None = None, *, bits: int, is_v2: bool
) -> QuantizedWeight:
    """GPTQ with groups in order: int32 [D * bits / 32, F]; a word holds consecutive inputs of an output.

    The first format stores zeros less one, with a zero of 0 wrapped around. gptq_v2 stores them as they are.
    `qzeros_GW` None gives the symmetric form.
    """
    if bits not in QUANTIZED_BITS:
        codes_FD = unpack_codes(qweight_WF.T, count=qweight_WF.shape[0] * 32 // bits, bits=bits)
        zeros = None
        if qzeros_GW is not None:
            zeros = gptq_zeros(qzeros_GW, count=qweight_WF.shape[1], bits=bits, is_v2=is_v2).T.contiguous()
        return _widened(codes_FD, scales_GF.T.contiguous(), zeros, bits=bits)
    # [W, F] -> [F, W]: the words of one output follow each other, so that its bytes are its codes in order.
    codes = _view_as(qweight_WF.T, torch.uint8)
    zeros_FG = None
    if qzeros_GW is not None:
        zeros_FG = gptq_zeros(qzeros_GW, count=qweight_WF.shape[1], bits=bits, is_v2=is_v2).T.contiguous()
    num_inputs = codes.shape[1] * 8 // bits
    return QuantizedWeight(codes, scales_GF.T.contiguous(), bits, num_inputs // scales_GF.shape[0], zeros_FG)


def gptq_zeros(qzeros_GW: Tensor, *, count: int, bits: int, is_v2: bool) -> Tensor:
    """uint8 [G, F]: the codes that stand for zero, of `count` outputs."""
    stored_GF = unpack_codes(qzeros_GW, count=count, bits=bits)
    return stored_GF if is_v2 else (stored_GF + 1) & (2**bits - 1)


def from_bitsandbytes_int8(weight_FD: Tensor, maxima_F: Tensor) -> QuantizedWeight:
    """bitsandbytes' LLM.int8(): one byte per number. 127 stands for the largest magnitude of the output, stored as
    SCB."""
    scales_F1 = (maxima_F.to(torch.float32) / 127)[:, None]
    return QuantizedWeight(_to_offset(weight_FD, bits=8), scales_F1, 8, weight_FD.shape[1])


def from_panels(
    panels_PB: Tensor, scales_PGO: Tensor, zeros_PGO: Tensor | None = None, *, num_inputs: int, bits: int
) -> QuantizedWeight:
    """Rows of whole panels, as records of experts hold them: see qnext.ops.panel_order."""
    zeros_FG = None if zeros_PGO is None else groups_from_panels(zeros_PGO)
    return QuantizedWeight(
        codes_from_panels(panels_PB, num_inputs=num_inputs, bits=bits),
        groups_from_panels(scales_PGO),
        bits,
        num_inputs // scales_PGO.shape[1],
        zeros_FG,
    )


def dequantize_ordered(weight: QuantizedWeight, index_D: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[F, D] of a matrix in activation order: input d belongs to group `index_D[d]`, wherever the input stands."""
    columns = index_D.to(torch.int64)
    codes = weight.codes
    if weight.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    out_FD = torch.empty(codes.shape, dtype=dtype)
    step = max(1, (1 << 22) // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], step):
        rows = slice(start, start + step)
        values = codes[rows].to(torch.float32)
        if weight.zeros is None:
            values -= 2.0 ** (weight.bits - 1)
        else:
            values -= weight.zeros[rows][:, columns].to(torch.float32)
        out_FD[rows] = values.mul_(weight.scales[rows].to(torch.float32)[:, columns])
    return out_FD


def _widened(codes_FD: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None, *, bits: int) -> QuantizedWeight:
    """Codes of any width in the next one of QUANTIZED_BITS; they stand for the same numbers."""
    wide = next(known for known in QUANTIZED_BITS if known > bits)
    if zeros_FG is None:  # the middle code stays the zero
        codes_FD = codes_FD + (2 ** (wide - 1) - 2 ** (bits - 1))
    group_size = codes_FD.shape[1] // scales_FG.shape[1]
    return QuantizedWeight(pack_codes(codes_FD, bits=wide), scales_FG, wide, group_size, zeros_FG)


def compressed_tensors_of(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of the module `name` (without .weight) in compressed-tensors' pack-quantized, for one matrix."""
    packed = weight.codes
    padding = -packed.shape[-1] % 4
    packed = torch.nn.functional.pad(packed, (0, padding)) if padding else packed
    tensors = {
        f"{name}.weight_packed": _view_as(packed, torch.int32),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zeros is not None:
        tensors[f"{name}.weight_zero_point"] = pack_words(weight.zeros.T, bits=weight.bits).T.contiguous()
    return tensors


def compressed_tensors_specs(
    name: str,
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    has_zeros: bool = False,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of the tensors of compressed_tensors_of, without the numbers."""
    num_outputs, num_inputs = shape
    groups = num_inputs // group_size
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.weight_packed": (torch.int32, (num_outputs, packed_width(num_inputs, bits=bits))),
        f"{name}.weight_scale": (scale_dtype, (num_outputs, groups)),
        f"{name}.weight_shape": (torch.int64, (2,)),
    }
    if has_zeros:
        specs[f"{name}.weight_zero_point"] = (torch.int32, (packed_width(num_outputs, bits=bits), groups))
    return specs


class PackedGroup(NamedTuple):
    """Modules whose weights share one form, by exact name, pattern or class."""

    bits: int
    group_size: int
    targets: list[str]
    is_symmetric: bool = True


def compressed_tensors_config(groups: Sequence[PackedGroup], *, ignore: list[str]) -> dict[str, Any]:
    """The quantization_config of compressed-tensors 0.20 for a pack-quantized folder. `ignore` names what is not
    packed."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _config_group(group) for i, group in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _config_group(group: PackedGroup) -> dict[str, Any]:
    weights = {
        "num_bits": group.bits,
        "type": "int",
        "symmetric": group.is_symmetric,
        "strategy": "group",
        "group_size": group.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    return {"targets": group.targets, "weights": weights, "input_activations": None, "output_activations": None}


def _view_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes in rows of another dtype. By way of a flat tensor: a row or column alone may have any stride."""
    width = tensor.shape[-1] * tensor.dtype.itemsize // dtype.itemsize
    return tensor.contiguous().reshape(-1).view(dtype).view(*tensor.shape[:-1], width)


def _to_offset(values: Tensor, *, bits: int) -> Tensor:
    """Signed codes in int8 -> offset binary in uint8."""
    return (values.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
