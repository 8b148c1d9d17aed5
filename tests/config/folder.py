"""The configuration of a folder whose tensors do not matter."""

from __future__ import annotations

from pathlib import Path

from qnext.config import ModelConfig, from_hf, load_config_json


def read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    return from_hf(load_config_json(path), file=str(path))
