"""The order of the bytes in panels, against the rule that linear.h states, byte by byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext.ops import PanelWeight, QuantizedWeight
from qnext.ops.backends import cpu_kernels
from qnext.ops.panel_order import codes_from_panels, codes_to_panels, groups_from_panels, groups_to_panels
from qnext.ops.quantized import pack_codes


def random_codes(num_outputs: int, num_inputs: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_outputs * num_inputs + bits)
    return torch.randint(0, 2**bits, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)


def panels_by_rule(codes_FD: Tensor, *, bits: int) -> list[list[int]]:
    """8 bits: [panel][D / 4][16][4]. 4 bits: [panel][D / 8][16][4], nibbles 8 i + j and 8 i + 4 + j."""
    codes = codes_FD.tolist()
    panels = []
    for first in range(0, len(codes), 16):
        found = []
        for i in range(0, len(codes[0]), 32 // bits):
            for row in codes[first : first + 16]:
                for j in range(4):
                    found.append(row[i + j] | ((row[i + 4 + j] << 4) if bits == 4 else 0))
        panels.append(found)
    return panels


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 16), (48, 32), (32, 160)])
def test_codes_lie_as_the_kernels_read_them(num_outputs: int, num_inputs: int, bits: int) -> None:
    codes_FD = random_codes(num_outputs, num_inputs, bits)
    rows_FB = pack_codes(codes_FD, bits=bits)
    panels_PB = codes_to_panels(rows_FB, bits=bits)
    assert panels_PB.dtype == torch.uint8 and panels_PB.tolist() == panels_by_rule(codes_FD, bits=bits)
    assert torch.equal(codes_from_panels(panels_PB, num_inputs=num_inputs, bits=bits), rows_FB)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
def test_scales_lie_panel_by_panel(dtype: torch.dtype) -> None:
    values_FG = torch.arange(32 * 5).view(32, 5).to(dtype)
    panels_PGO = groups_to_panels(values_FG)
    assert panels_PGO.shape == (2, 5, 16)
    for output in range(32):
        for group in range(5):
            assert panels_PGO[output // 16, group, output % 16] == values_FG[output, group]
    assert torch.equal(groups_from_panels(panels_PGO), values_FG)


@pytest.mark.skipif(cpu_kernels() is None, reason="panels are the native kernels'")
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_the_order_that_the_kernels_write(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = [pack_codes(random_codes(32, 64, bits), bits=bits), pack_codes(random_codes(32, 64, bits) ^ 1, bits=bits)]
    scales = torch.rand((2, 32, 4), generator=generator).to(torch.float16)
    zeros = torch.randint(0, 2**bits, (2, 32, 4), generator=generator, dtype=torch.uint8)
    weight = PanelWeight((2, 32, 64), bits=bits, group_size=16, scale_dtype=torch.float16, has_zeros=True)
    for expert in range(2):
        weight.write(QuantizedWeight(codes[expert], scales[expert], bits, 16, zeros[expert]), expert=expert)
    panels, scale_panels, zero_panels = weight.tensors
    for expert in range(2):
        assert torch.equal(panels[expert], codes_to_panels(codes[expert], bits=bits))
        assert torch.equal(scale_panels[expert], groups_to_panels(scales[expert]))
        assert torch.equal(zero_panels[expert], groups_to_panels(zeros[expert]))
