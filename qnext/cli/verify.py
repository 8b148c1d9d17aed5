"""`qnext verify`: every check that loading makes, and the tokenizer's, without keeping the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qnext.config import ModelConfig

_MAX_LINES = 20


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder or a hub name")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Check names, shapes, dtypes and values of every tensor, and the tokenizer. Exit code 5 where one fails."""
    from qnext.checkpoint.resolve import resolve_model
    from qnext.cli._progress import byte_progress
    from qnext.errors import CorruptCheckpoint

    folder = resolve_model(model)
    with byte_progress("reading") as progress:
        problems = list(checkpoint_problems(folder, progress))
    if as_json:
        print(json.dumps({"model": model, "ok": not problems, "problems": problems}, indent=2))
    elif not problems:
        print(f"{model}: ok")
    else:
        for problem in problems[:_MAX_LINES]:
            print(f"qnext verify: {problem}", file=sys.stderr)
        if len(problems) > _MAX_LINES:
            print(f"qnext verify: and {len(problems) - _MAX_LINES} more", file=sys.stderr)
    if problems:
        raise typer.Exit(CorruptCheckpoint.exit_code)


def checkpoint_problems(folder: Path, progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
    """One line for everything that is wrong; `progress` gets the bytes that are read, and all bytes."""
    from qnext.checkpoint.check import read_layout, structure_problems
    from qnext.checkpoint.files import TensorFiles
    from qnext.checkpoint.values import tensor_value_problems
    from qnext.errors import CorruptCheckpoint

    try:
        with TensorFiles(folder) as files:
            layout = read_layout(folder, files.tensors)
            yield from structure_problems(layout, files.tensors, folder)
            total = sum(info.num_bytes for info in files.tensors.values())
            done = 0
            for name, info in files.tensors.items():
                yield from tensor_value_problems(layout, files, info)
                files.drop(name)
                done += info.num_bytes
                if progress is not None:
                    progress(done, total)
            yield from tokenizer_problems(folder, layout.config)
    except CorruptCheckpoint as error:
        yield str(error)


def tokenizer_problems(folder: Path, config: ModelConfig) -> Iterator[str]:
    """What does not go together with the model, or cannot be read."""
    from qnext.errors import QnextError
    from qnext.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(folder)
        eos_ids = tokenizer.eos_ids
    except QnextError as error:
        yield str(error)
        return
    num_ids = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
    if num_ids > config.vocab_size:
        yield f"{folder}: tokenizer.json has {num_ids} tokens, the model {config.vocab_size}"
    for token in sorted(eos_ids):
        if token >= config.vocab_size:
            yield f"{folder}: end token {token} is outside the vocabulary of {config.vocab_size}"
