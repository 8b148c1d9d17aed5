"""Changes of what the next step of a model takes.

Legend: R rows of the tensor that are meant, X its other dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qnext.probe.rows import EVERYWHERE, BatchRows, Where

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Edit:
    """What `change` makes of the rows at `where` takes their place. `tap` may be a pattern.

    A change that gives the same bits changes nothing: no bit of anything that follows.
    """

    tap: str
    change: Callable[[Tensor], Tensor]
    where: Where = EVERYWHERE

    def apply(self, x_T: Tensor, rows: BatchRows) -> Tensor:
        """`x_T` itself where nothing changes."""
        chosen_R = rows.chosen(self.where)
        if chosen_R is None:
            return self.of_rows(x_T)
        if not len(chosen_R):
            return x_T
        before_R = x_T.index_select(0, chosen_R)
        after_R = self.of_rows(before_R)
        return x_T if after_R is before_R else x_T.index_copy(0, chosen_R, after_R)

    def of_rows(self, before_R: Tensor) -> Tensor:
        """`before_R` itself where the bits are equal, unless a gradient is to flow through the change."""
        after_R = self.change(before_R)
        if after_R is before_R:
            return before_R
        after_R = after_R.to(before_R.dtype).expand_as(before_R)
        needs_gradient = torch.is_grad_enabled() and after_R.requires_grad
        return after_R if needs_gradient or changed_rows(before_R, after_R).any() else before_R


def changed_rows(before: Tensor, after: Tensor) -> Tensor:
    """[T] whether any bit of a row differs."""
    bits = _BITS[before.dtype.itemsize]
    one, other = (x.detach().contiguous().view(bits).flatten(1) for x in (before, after))
    return (one != other).any(1)


def same_bits(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and before.dtype == after.dtype and not bool(changed_rows(before, after).any())
