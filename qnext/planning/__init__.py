"""Answers from a ModelConfig alone: shapes, parameters, bytes. No torch."""

from __future__ import annotations

from qnext.planning.shapes import parameter_shapes

__all__ = ["parameter_shapes"]
