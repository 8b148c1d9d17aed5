"""Finds the folder of a model by the name that a user gives."""

from __future__ import annotations

import re
from pathlib import Path

from qnext.checkpoint.gguf.container import is_gguf
from qnext.checkpoint.nearby import meant_model, models_inside, published_models
from qnext.config import PRESETS
from qnext.errors import ModelNotFound, NotSupported

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str | Path) -> Path:
    """The folder of a model: a folder itself, or a hub name that is in the local Hugging Face cache.

    Nothing is downloaded. Raises ModelNotFound, saying what would help, and NotSupported for GGUF files.
    """
    folder = resolve_folder(name)
    files = sorted(folder.glob("*.gguf"))
    if files and not any(folder.glob("*.safetensors")):
        raise NotSupported(f"{folder}: GGUF is not run as it is; `qnext convert {files[0]} OUT` makes a folder of it")
    inside = [] if files or (folder / "config.json").exists() else models_inside(folder)
    if inside:
        raise ModelNotFound(f"{folder}: holds no model itself; did you mean {inside[0]}?")
    return folder


def resolve_folder(name: str | Path) -> Path:
    """The same as resolve_model, whatever the folder holds."""
    path = Path(name).expanduser()
    text = str(name)
    if path.is_dir() and text:
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf" or is_gguf(path):
            raise NotSupported(f"{path}: GGUF is not run as it is; `qnext convert {path} OUT` makes a folder of it")
        raise ModelNotFound(f"{path}: is a file, a model is a folder")
    if text in PRESETS:
        raise ModelNotFound(
            f"{text} is a preset and has no weights; `qnext init {text} OUT` makes a folder with random ones"
        )
    if not _HUB_NAME.fullmatch(text):
        raise ModelNotFound(f"{text or 'empty name'}: no such folder or preset{meant_model(text) if text else ''}")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(text, local_files_only=True))
    except (OSError, HFValidationError):
        hint = meant_model(text)
        if not hint or text in published_models():
            hint = f"; `qnext pull {text}` downloads it"
        raise ModelNotFound(f"{text}: no such folder, and not in the local cache{hint}") from None
