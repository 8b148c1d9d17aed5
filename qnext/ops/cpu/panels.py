"""Quantised weights in the order in which the kernels read them.

Legend: E stacked experts, F outputs, D inputs, P panels of 16 outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.ops.cpu.kernels import kernels
from qnext.ops.memory import empty_huge
from qnext.ops.panel_order import PANEL, codes_from_panels, groups_from_panels
from qnext.ops.quantized import QuantizedWeight

KIND_OF_FLOAT = {torch.float32: 0, torch.bfloat16: 1}
KIND_OF_BITS = {4: 2, 8: 3}
SCALE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class PanelWeight:
    """The numbers of a QuantizedWeight, with the outputs in panels of sixteen; linear.h defines the order of the bytes.

    It is made empty, in huge pages, and filled by `write`, so that a model is never in memory twice.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        bits: int,
        group_size: int,
        scale_dtype: torch.dtype,
        has_zeros: bool,
    ) -> None:
        assert PanelWeight.fits(shape, group_size=group_size), "ask PanelWeight.fits first"
        self.shape = torch.Size(shape)
        self.bits, self.group_size = bits, group_size
        self._num_experts = shape[0] if len(shape) == 3 else 1
        num_panels = -(-shape[-2] // PANEL)
        groups = shape[-1] // group_size
        self._panels = empty_huge((self._num_experts, num_panels, PANEL * shape[-1] * bits // 8), dtype=torch.uint8)
        self._scales = empty_huge((self._num_experts, num_panels, groups, PANEL), dtype=scale_dtype)
        self._zeros = empty_huge(self._scales.shape, dtype=torch.uint8) if has_zeros else None
        if shape[-2] % PANEL:  # the last panel is padded
            for tensor in self.tensors:
                tensor[:, -1].zero_()
        self.handle = kernels().Weight(
            kind=KIND_OF_BITS[bits],
            num_experts=self._num_experts,
            num_outputs=shape[-2],
            num_inputs=shape[-1],
            data=self._panels.data_ptr(),
            scales=self._scales.data_ptr(),
            zeros=0 if self._zeros is None else self._zeros.data_ptr(),
            scale_kind=SCALE_KINDS[scale_dtype],
            group_size=group_size,
        )

    @staticmethod
    def fits(shape: tuple[int, ...], *, group_size: int) -> bool:
        """Whether the kernels take a weight of this form. Stacks hold two matrices per expert, each of whole panels."""
        num_outputs, num_inputs = shape[-2:]
        outputs_fit = len(shape) == 2 or (len(shape) == 3 and num_outputs % (2 * PANEL) == 0)
        return outputs_fit and group_size > 0 and group_size % PANEL == 0 and num_inputs % group_size == 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales. The codes are integers."""
        return self._scales.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it keeps in memory."""
        return [tensor for tensor in (self._panels, self._scales, self._zeros) if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def has_zeros(self) -> bool:
        return self._zeros is not None

    def write(self, source: QuantizedWeight, *, expert: int = 0, row: int = 0) -> None:
        """Put a matrix [f, D] at outputs row, row + 1, ... of one expert. `row` is a multiple of 16.

        Raises ValueError where source and destination have different forms.
        """
        num_outputs = source.shape[-2]
        if (source.bits, source.group_size, source.shape[-1]) != (self.bits, self.group_size, self.shape[-1]):
            raise ValueError(f"{source.bits} bits, groups of {source.group_size} do not fit in {self}")
        if (source.zeros is None) != (self._zeros is None) or len(source.shape) != 2 or row % PANEL:
            raise ValueError(f"a weight of shape {list(source.shape)} does not fit in {self} at row {row}")
        if not (0 <= expert < self._num_experts and row >= 0 and row + num_outputs <= self.shape[-2]):
            raise ValueError(f"{num_outputs} outputs at row {row} of expert {expert} lie outside of {self}")
        codes = source.codes.contiguous()
        first = row // PANEL
        panels = self._panels[expert, first:]
        kernels().write_panels(codes.data_ptr(), num_outputs, codes.shape[-1], self.bits, panels.data_ptr())
        _write_groups(self._scales[expert, first:], source.scales)
        if self._zeros is not None and source.zeros is not None:
            _write_groups(self._zeros[expert, first:], source.zeros)

    def to_quantized(self) -> QuantizedWeight:
        """The same numbers in the form of the disk."""
        experts = [self._rows_of(expert) for expert in range(self._num_experts)]
        if len(self.shape) == 2:
            return experts[0]
        codes, scales = (torch.stack([getattr(e, name) for e in experts]) for name in ("codes", "scales"))
        zeros = None if self._zeros is None else torch.stack([e.zeros for e in experts if e.zeros is not None])
        return QuantizedWeight(codes, scales, self.bits, self.group_size, zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., F, D]: computed in fp32 and rounded once to `dtype`."""
        return self.to_quantized().dequantize(dtype)

    def to(self, device: torch.device | str) -> PanelWeight | QuantizedWeight:
        """On a device other than the CPU: the form of the disk, because only the CPU kernels read panels."""
        return self if torch.device(device).type == "cpu" else self.to_quantized().to(device)

    def __getitem__(self, expert: int) -> QuantizedWeight:
        """One matrix of a stack, in the form of the disk."""
        return self._rows_of(expert)

    def _rows_of(self, expert: int) -> QuantizedWeight:
        rows = slice(self.shape[-2])
        codes = codes_from_panels(self._panels[expert], num_inputs=self.shape[-1], bits=self.bits)[rows]
        zeros = None if self._zeros is None else groups_from_panels(self._zeros[expert])[rows]
        return QuantizedWeight(codes, groups_from_panels(self._scales[expert])[rows], self.bits, self.group_size, zeros)

    def __repr__(self) -> str:
        return f"PanelWeight({list(self.shape)}, bits={self.bits}, group_size={self.group_size})"


def _write_groups(panels_PGO: Tensor, values_FG: Tensor) -> None:
    """[F, G] into [P, G, 16]"""
    num_outputs = values_FG.shape[0]
    whole = num_outputs // PANEL
    panels_PGO[:whole].copy_(values_FG[: whole * PANEL].unflatten(0, (whole, PANEL)).transpose(1, 2))
    if num_outputs % PANEL:
        panels_PGO[whole, :, : num_outputs % PANEL].copy_(values_FG[whole * PANEL :].t())
