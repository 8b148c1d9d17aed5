"""`qnext logits`: token ids in, logits to a .npy file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli._types import Strict

if TYPE_CHECKING:
    from torch import Tensor

    from qnext.config import ModelConfig

_DTYPES = ("float32", "bfloat16")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder or a hub name")],
    tokens: Annotated[str, typer.Option(metavar="1,2,3|@FILE", help="token ids, or a JSON file with a list of them")],
    out: Annotated[Path, typer.Option(help="the .npy file to write: float32 [tokens, vocabulary]")],
    dtype: Annotated[
        str | None, typer.Option(metavar="|".join(_DTYPES), help="of the weights; default: as stored")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="read N tokens at a time through the cache", metavar="N")] = None,
    strict: Strict = False,
) -> None:
    """Write the logits after every token, and print the file's path."""
    from qnext.cli._text_model import load_weights, open_model
    from qnext.errors import UsageError

    if dtype not in (None, *_DTYPES):
        raise UsageError(f"--dtype {dtype}: must be {' or '.join(_DTYPES)}")
    if chunk is not None and chunk < 1:
        raise UsageError(f"--chunk must be at least 1, not {chunk}")
    token_ids = _parse_tokens(tokens)
    folder = open_model(model)
    # The ids are checked before the weights are read, which takes minutes for a large model.
    _check_tokens(token_ids, folder.config)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; --out takes the file to write")
    from qnext.cli._prefill import iterate_logits

    loaded = load_weights(folder, dtype)
    rows = iterate_logits(loaded, token_ids, chunk=chunk)
    _write_npy(out, rows, shape=(len(token_ids), loaded.config.vocab_size))
    print(out)


def _parse_tokens(text: str) -> list[int]:
    from qnext.errors import UsageError

    values: Any
    if text.startswith("@"):
        try:
            values = json.loads(Path(text[1:]).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--tokens {text}: not readable as JSON ({error})") from None
    else:
        try:
            values = [int(piece) for piece in text.split(",")] if text.strip() else []
        except ValueError:
            raise UsageError(f"--tokens {text[:60]!r}: must be integers with commas between, or @FILE") from None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UsageError(f"--tokens {text[:60]}: must be a list of integers")
    if not values:
        raise UsageError("--tokens: no token given")
    return values


def _check_tokens(token_ids: list[int], config: ModelConfig) -> None:
    from qnext.errors import DoesNotFit, UsageError

    for place, token in enumerate(token_ids):
        if not 0 <= token < config.vocab_size:
            raise UsageError(f"--tokens: id {token} at place {place} is outside the vocabulary of {config.vocab_size}")
    if len(token_ids) > config.context_length:
        raise DoesNotFit(f"{len(token_ids)} tokens, but the context is {config.context_length}")


def _write_npy(path: Path, rows: Iterable[Tensor], *, shape: tuple[int, int]) -> None:
    """Stream the rows as float32 into a file that appears only when it is complete."""
    import numpy as np
    import torch

    from qnext.files import new_file

    with new_file(path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in rows:
            file.write(part.to(torch.float32).cpu().contiguous().numpy().data)
