"""Disk to model and back: safetensors folders as Hugging Face lays them out."""

from __future__ import annotations

from qnext.checkpoint.load import empty_model, load_model
from qnext.checkpoint.save import save_model

__all__ = ["empty_model", "load_model", "save_model"]
