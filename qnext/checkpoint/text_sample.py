"""A text as sequences: some to calibrate a quantised model, others to measure it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qnext.checkpoint.calibrate import TextSample
from qnext.config import ModelConfig
from qnext.errors import UsageError
from qnext.text.files import read_user_text
from qnext.text.tokenizer import Tokenizer

_MIN_TOKENS = 64
_SEQUENCE_LENGTH = 2048
_EVALUATION_SHARE = 5  # every fifth sequence is measured on and never calibrated on


def sample_of_text(text: Path, folder: Path, config: ModelConfig, max_tokens: int) -> TextSample:
    """Sequences spread evenly over the text, as many as `max_tokens` allows. Raises UsageError for a text that is too
    short."""
    tokenizer = Tokenizer.from_folder(folder, num_rows=config.vocab_size)
    ids = torch.tensor(tokenizer.encode(read_user_text(text)), dtype=torch.long)
    if len(ids) < _MIN_TOKENS:
        raise UsageError(f"{text}: {len(ids)} tokens, at least {_MIN_TOKENS} are needed")
    longest = min(_SEQUENCE_LENGTH, config.max_position_embeddings)
    length = max(1, min(longest, len(ids) // _EVALUATION_SHARE, max_tokens // _EVALUATION_SHARE))
    pieces: list[Tensor] = [piece for piece in ids.split(length + 1) if len(piece) > 1]
    wanted = min(len(pieces), max(_EVALUATION_SHARE, max_tokens // length))
    pieces = [pieces[i * len(pieces) // wanted] for i in range(wanted)]
    # The middle of each five: a text's end often differs from its bulk.
    is_measured = [i % _EVALUATION_SHARE == _EVALUATION_SHARE // 2 for i in range(wanted)]
    return TextSample(
        [piece for piece, measured in zip(pieces, is_measured, strict=True) if not measured],
        [piece for piece, measured in zip(pieces, is_measured, strict=True) if measured],
    )
