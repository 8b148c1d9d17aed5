"""Disk to model and back: safetensors folders as Hugging Face lays them out."""

from __future__ import annotations

from qnext.checkpoint.create import create_folder
from qnext.checkpoint.load import empty_model, load_model
from qnext.checkpoint.resolve import resolve_model
from qnext.checkpoint.save import save_model

__all__ = ["create_folder", "empty_model", "load_model", "resolve_model", "save_model"]
