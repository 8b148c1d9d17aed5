"""Folders that hold something else than safetensors of a model: what they hold, and what helps. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, QnextError

_CONVERT = "convert it with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)"
# Pattern of file names -> what such a file is, and what to do instead. The first that is found is named.
FOREIGN_FILES: dict[str, tuple[str, str]] = {
    "adapter_model.*": ("a PEFT adapter", "merge it into its base model first: merge_and_unload, save_pretrained"),
    "adapter_config.json": ("a PEFT adapter", "merge it into its base model first: merge_and_unload, save_pretrained"),
    "*.gguf": ("GGUF", "`qnext convert FILE.gguf OUT` makes a folder of it"),
    "pytorch_model*.bin": ("pickle (it can run code, and is never read)", _CONVERT),
    "consolidated*": ("a checkpoint of another layout", _CONVERT),
    "*.pth": ("pickle (it can run code, and is never read)", _CONVERT),
    "*.pt": ("pickle (it can run code, and is never read)", _CONVERT),
    "*.ckpt": ("pickle (it can run code, and is never read)", _CONVERT),
    "*.bin": ("pickle or another program's own form", "download the safetensors of the model"),
    "*.distcp": ("a distributed checkpoint of torch", "gather it into a Hugging Face folder first"),
    "weights*.npz": ("mlx's arrays", "download the original model"),
    "*.onnx": ("ONNX", "download the original model"),
    "onnx": ("ONNX", "download the original model"),
    "openvino_model.xml": ("OpenVINO", "download the original model"),
    "*.engine": ("TensorRT", "download the original model"),
    "*.mlpackage": ("Core ML", "download the original model"),
    "tf_model.h5": ("TensorFlow", "download the original model"),
    "flax_model*.msgpack": ("Flax", "download the original model"),
    "rust_model.ot": ("rust-bert", "download the original model"),
}


def without_model(folder: Path) -> QnextError:
    """Why a folder without safetensors files of a model cannot be loaded, in one line."""
    if not any(folder.iterdir()):
        return ModelNotFound(f"{folder}: is an empty folder; neither model.safetensors nor its index there")
    partial = sorted(folder.rglob("*.incomplete"))
    if partial:
        return CorruptCheckpoint(f"{folder}: its download is not complete ({partial[0].name}); `qnext pull` goes on")
    for pattern, (what, advice) in FOREIGN_FILES.items():
        found = sorted(folder.glob(pattern))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            base = _base_of_adapter(folder) if what == "a PEFT adapter" else ""
            return NotSupported(f"{folder}: holds {found[0].name}{more}: {what}{base} is not supported; {advice}")
    return ModelNotFound(f"{folder}: neither model.safetensors nor model.safetensors.index.json there")


def _base_of_adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of {base[:100]}" if isinstance(base, str) and base and base.isprintable() else ""
