"""What a user may have meant by a model that does not exist: folders nearby, downloaded models, published ones."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from qnext.config import PRESETS
from qnext.errors import did_you_mean

_MOST_ENTRIES = 1000  # of a folder that is looked through
_SIZES = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")
_BASES = ("0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B")
_LATER = ("4B", "30B-A3B", "235B-A22B")
_OTHERS = ("Coder-30B-A3B", "Coder-480B-A35B", "Next-80B-A3B")


def published_models() -> list[str]:
    """Hub names of the published models of the three families, plain and in FP8."""
    tuned = [f"Qwen/Qwen3-{size}" for size in _SIZES]
    tuned += [f"Qwen/Qwen3-{size}-{kind}-2507" for size in _LATER for kind in ("Instruct", "Thinking")]
    tuned += [f"Qwen/Qwen3-{name}-Instruct" for name in _OTHERS]
    tuned += ["Qwen/Qwen3-Next-80B-A3B-Thinking", "Qwen/Qwen3-Coder-Next"]
    bases = [f"Qwen/Qwen3-{size}-Base" for size in _BASES] + ["Qwen/Qwen3-Coder-Next-Base"]
    return [*tuned, *(f"{name}-FP8" for name in tuned), *bases]


def cached_models() -> list[str]:
    """Hub names in the local cache, found without the library of the hub."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return sorted(path.name.removeprefix("models--").replace("--", "/", 1) for path in folder.glob("models--*--*"))


def meant_model(text: str) -> str:
    """The end of the message that the model `text` does not exist: "; did you mean x?", or nothing."""
    folder = _near_folder(Path(text).expanduser())
    if folder is not None:
        return f"; did you mean {folder}?"
    cached = cached_models()
    name = _near_name(text, [*cached, *published_models()])
    if name is None:
        return did_you_mean(text, PRESETS)
    return f"; did you mean {name}?" + ("" if name in cached else f" `qnext pull {name}` downloads it")


def models_inside(folder: Path) -> list[Path]:
    """Folders directly inside this one that hold a model."""
    return [child for child in _subfolders(folder) if (child / "config.json").is_file()]


def _near_name(text: str, known: Iterable[str]) -> str | None:
    """A hub name like `text`, which may lack the organisation."""
    whole = {name.casefold(): name for name in reversed(list(known))}
    short = {name.partition("/")[2]: whole[name] for name in whole}
    names = whole if "/" in text else short
    near = difflib.get_close_matches(text.casefold(), names, n=1, cutoff=0.75)
    return names[near[0]] if near else None


def _near_folder(path: Path) -> Path | None:
    """The model folder whose path differs from `path` by a little in some of its parts."""
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if (found / part).is_dir():
            found /= part
            continue
        near = difflib.get_close_matches(part, [child.name for child in _subfolders(found)], n=1, cutoff=0.6)
        if not near:
            return None
        found /= near[0]
    if (found / "config.json").is_file():
        return found
    inside = models_inside(found)
    return inside[0] if len(inside) == 1 and found.parts else None


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in islice(folder.iterdir(), _MOST_ENTRIES) if child.is_dir())
    except OSError:
        return []
