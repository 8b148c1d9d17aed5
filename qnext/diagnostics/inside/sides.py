"""The two sides of a comparison: how each model is loaded and run, one after the other.

A side with a backend of its own runs in a process of its own, because a process has one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.errors import ModelNotFound, QnextError, UsageError
from qnext.files import scratch_folder
from qnext.session.folder import ModelFolder, ProgressOf, load_weights, no_progress, open_model

if TYPE_CHECKING:
    from qnext.diagnostics.inside.recording import RecordedPass

BACKENDS = ("cpu", "torch")
_WORKER = "qnext.diagnostics.inside.side_worker"


@dataclass(frozen=True)
class Side:
    """`scheme` quantises the folder first, rounded to nearest. `adapter` is a folder. None: as it is."""

    model: str
    dtype: str | None = None
    scheme: str | None = None
    adapter: str | None = None
    backend: str | None = None

    @property
    def label(self) -> str:
        parts = (self.adapter or self.model, self.dtype, self.scheme, self.backend)
        return " ".join(part for part in parts if part)

    def check(self) -> ModelFolder:
        """The folder. Raises UsageError and ModelNotFound for what could not be loaded or run."""
        if self.backend not in (None, *BACKENDS):
            raise UsageError(f"backend must be {' or '.join(BACKENDS)}, not {self.backend!r}")
        if self.scheme is not None:
            from qnext.quant.scheme import find_scheme

            find_scheme(self.scheme)
        return open_model(self.model)


def second_side(first: Side, name: str, *, dtype: str | None, scheme: str | None, backend: str | None) -> Side:
    """A model, or an adapter or run, which changes the model of the first side."""
    from qnext.checkpoint.adapters import find_adapter

    try:
        adapter = str(find_adapter(name))
    except ModelNotFound:
        return Side(name, dtype, scheme, None, backend)
    return Side(first.model, dtype, scheme, adapter, backend)


def record_side(side: Side, token_ids: Sequence[int], *, progress: ProgressOf = no_progress) -> RecordedPass:
    """The model is loaded, run and released. Raises the errors of loading."""
    if side.backend is not None:
        return _record_elsewhere(side, token_ids)
    from qnext.diagnostics.inside.recording import record_pass

    with _folder_of(side, progress) as folder:
        network = load_weights(folder, side.dtype, progress=progress)
        if side.adapter is not None:
            from qnext.checkpoint.adapters import read_adapter
            from qnext.lora.adapt import attach

            attach(network, read_adapter(side.adapter, folder.config))
        return record_pass(network, token_ids)


@contextmanager
def _folder_of(side: Side, progress: ProgressOf) -> Iterator[ModelFolder]:
    folder = open_model(side.model)
    if side.scheme is None:
        yield folder
        return
    from qnext.checkpoint.quantize import quantize_folder
    from qnext.quant.scheme import make_policy

    policy = make_policy(side.scheme, head=None, is_tied=folder.config.tie_word_embeddings)
    with scratch_folder() as made, progress("quantising") as report:
        quantize_folder(folder.path, made / "model", policy=policy, is_calibrated=False, progress=report)
        yield open_model(str(made / "model"))


class SideFailed(QnextError):
    """The process of a side ended with a message."""


def _record_elsewhere(side: Side, token_ids: Sequence[int]) -> RecordedPass:
    from qnext.diagnostics.inside.recording import RecordedPass
    from qnext.ops.backends import BACKEND_VARIABLE

    request = {"side": {**asdict(side), "backend": None}, "token_ids": list(token_ids)}
    done = subprocess.run(
        [sys.executable, "-m", _WORKER],
        input=json.dumps(request).encode(),
        capture_output=True,
        env={**os.environ, BACKEND_VARIABLE: str(side.backend)},
    )
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise SideFailed(f"{side.label}: {told[-1]}")
    return RecordedPass.from_bytes(done.stdout)


def token_ids_of(text: str, side: Side) -> list[int]:
    """By the tokenizer of the side's model."""
    from qnext.text.tokenizer import Tokenizer

    folder = open_model(side.model)
    return Tokenizer.from_folder(Path(folder.path), num_rows=folder.config.vocab_size).encode(text)


def random_ids(count: int, vocab_size: int) -> list[int]:
    """The same for every pair of models with this vocabulary."""
    import numpy as np

    return [int(each) for each in np.random.default_rng(0).integers(vocab_size, size=count)]
