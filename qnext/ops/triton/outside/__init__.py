"""Kernels of other packages, where they are installed (the extra `gpu`). Each serves on a device once it has given the
reference's numbers there, and our own kernels serve all else.

Nouns: Package, a name and where its kernels are; what a call of it is here. May import: what ops/triton may, and
`trust.py`, nothing else of ops/triton. A new package: its name in ops/backends.py, its call and self-test here.
"""

from __future__ import annotations

from qnext.ops.triton.outside.attention import fits_piece_attention, piece_attention
from qnext.ops.triton.outside.delta import OutsideRule, fits_prompt_rule, prompt_rule, training_rule
from qnext.ops.triton.outside.packages import Package

__all__ = [
    "OutsideRule",
    "Package",
    "fits_piece_attention",
    "fits_prompt_rule",
    "piece_attention",
    "prompt_rule",
    "training_rule",
]
