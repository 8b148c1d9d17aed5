"""What `generate` and `chat` share: a model folder opened for text, and text written to the terminal."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from qnext.errors import CorruptCheckpoint, DoesNotFit, UsageError

if TYPE_CHECKING:
    from qnext.config import ModelConfig
    from qnext.model import CausalLM
    from qnext.text.tokenizer import Tokenizer

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TextFolder(NamedTuple):
    """A model folder before its weights are read."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    stored_bytes: int  # of all weights, as stored
    yarn: float | None = None  # stretches the context; the configuration is stretched already


class ModelFolder(NamedTuple):
    """The same without a tokenizer, for verbs that take token ids."""

    path: Path
    config: ModelConfig
    stored_bytes: int
    yarn: float | None = None


def open_folder(model: str, *, yarn: float | None = None) -> TextFolder:
    """Configuration and tokenizer of MODEL, the context stretched by a factor of YaRN where one is given.

    Raises ModelNotFound, CorruptCheckpoint, UsageError for a factor that is none.
    """
    from qnext.text.tokenizer import Tokenizer

    folder = open_model(model, yarn=yarn)
    tokenizer = Tokenizer.from_folder(folder.path, num_rows=folder.config.vocab_size)
    return TextFolder(folder.path, folder.config, tokenizer, folder.stored_bytes, yarn)


def open_model(model: str, *, yarn: float | None = None) -> ModelFolder:
    """As open_folder, but the tokenizer."""
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.header import read_index
    from qnext.checkpoint.resolve import resolve_model

    if yarn is not None and not 1.0 <= yarn <= 64.0:
        raise UsageError(f"--yarn must be between 1 and 64, not {yarn:g}")
    path = resolve_model(model)
    tensors = read_index(path).tensors
    config = read_layout(path, tensors).config
    if yarn is not None:
        config = config.with_yarn(yarn)
    stored_bytes = sum(info.num_bytes for info in tensors.values())
    return ModelFolder(path, config, stored_bytes, yarn)


def load_weights(folder: TextFolder | ModelFolder, dtype: str | None) -> CausalLM:
    """The model in the folder, in `dtype` or as stored. Raises DoesNotFit before reading what memory cannot hold."""
    import torch

    from qnext.checkpoint import load_model
    from qnext.cli._progress import byte_progress
    from qnext.engine.memory import available_bytes, format_bytes
    from qnext.ops import keep_freed_memory
    from qnext.planning.counts import weight_bytes

    keep_freed_memory()
    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    needed = folder.stored_bytes if dtype is None else weight_bytes(folder.config, dtype=dtype)
    available = available_bytes(torch.device("cpu"))
    if needed > available:
        smallest = weight_bytes(folder.config, dtype="bfloat16")
        hint = f"; --dtype bfloat16 needs {format_bytes(smallest)}" if smallest <= available else ""
        if not hint and needed > smallest // 2:
            hint = f"; `qnext quantize {folder.path} OUT --scheme int4-g32` makes a much smaller folder"
        raise DoesNotFit(
            f"{folder.path}: weights of {format_bytes(needed)}, but {format_bytes(available)} of memory are free{hint}"
        )
    with byte_progress("loading") as progress:
        model = load_model(folder.path, dtype=None if dtype is None else getattr(torch, dtype), progress=progress)
    if folder.yarn is not None:
        model.stretch(folder.yarn)
    return model


def end_token_ids(tokenizer: Tokenizer, config: ModelConfig) -> frozenset[int]:
    """Tokens that end an answer: those of the tokenizer's files and those of the model's configuration."""
    try:
        named = tokenizer.eos_ids
    except CorruptCheckpoint:
        named = frozenset()
    return named | frozenset(config.eos_token_ids)


def write_text(text: str) -> None:
    """Model text to stdout at once."""
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()


def printable(text: str, stream: TextIO) -> str:
    """Model text as `stream` can have it.

    What it cannot encode is replaced. On a terminal control characters are too: a model may repeat escape sequences
    that it has read somewhere.
    """
    if stream.isatty():
        text = _CONTROL.sub("\ufffd", text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
