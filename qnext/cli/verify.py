"""`qnext verify`: every check that loading makes, and the tokenizer's, without keeping the model."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from qnext.cli._types import Strict
from qnext.errors import CorruptCheckpoint, NotSupported, QnextError, QnextWarning, warn

if TYPE_CHECKING:
    from qnext.config import ModelConfig

_MAX_LINES = 20


class Findings(NamedTuple):
    """Everything that is wrong with a folder, and what was passed over while looking."""

    problems: list[QnextError]
    warnings: list[QnextWarning]

    @property
    def exit_code(self) -> int:
        """0 without problems; that of NotSupported where nothing else is wrong, else that of a corrupt checkpoint."""
        codes = {problem.exit_code for problem in self.problems}
        return max(codes) if len(codes) < 2 and codes else CorruptCheckpoint.exit_code * bool(codes)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder or a hub name")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    strict: Strict = False,
) -> None:
    """Check names, shapes, dtypes and values of every tensor, and the tokenizer.

    Exit code 5 where something is damaged or contradictory, 6 where the only fault is a form that is not supported.
    What is passed over is listed as warnings, which --strict makes problems.
    """
    from qnext.checkpoint.resolve import resolve_model
    from qnext.cli._progress import byte_progress

    folder = resolve_model(model)
    with byte_progress("reading") as progress:
        found = examine(folder, progress)
    if strict:
        found = Findings([*found.problems, *(warning.error(str(warning)) for warning in found.warnings)], [])
    problems, passed_over = map(str, found.problems), [str(warning) for warning in found.warnings]
    if as_json:
        document = {"model": model, "ok": not found.problems, "problems": list(problems), "warnings": passed_over}
        print(json.dumps(document, indent=2))
    else:
        if not found.problems:
            print(f"{model}: ok")
        _print_lines([f"warning: {line}" for line in passed_over])
        _print_lines(list(problems))
    if found.problems:
        raise typer.Exit(found.exit_code)


def _print_lines(lines: list[str]) -> None:
    for line in lines[:_MAX_LINES]:
        print(f"qnext verify: {line}", file=sys.stderr)
    if len(lines) > _MAX_LINES:
        print(f"qnext verify: and {len(lines) - _MAX_LINES} more", file=sys.stderr)


def examine(folder: Path, progress: Callable[[int, int], None] | None = None) -> Findings:
    """All problems and all warnings of a folder; a line that comes again is there once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QnextWarning)
        problems = list(checkpoint_problems(folder, progress))
    passed_over: dict[str, QnextWarning] = {}
    for each in caught:
        if isinstance(each.message, QnextWarning):
            passed_over.setdefault(str(each.message), each.message)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return Findings(problems, list(passed_over.values()))


def checkpoint_problems(folder: Path, progress: Callable[[int, int], None] | None = None) -> Iterator[QnextError]:
    """One error for everything that is wrong; `progress` gets the bytes that are read, and all bytes."""
    from qnext.checkpoint.check import read_layout, structure_problems
    from qnext.checkpoint.files import TensorFiles
    from qnext.checkpoint.packed import scales_of_activations
    from qnext.checkpoint.values import tensor_value_problems

    try:
        with TensorFiles(folder) as files:
            layout = read_layout(folder, files.tensors)
            finer = scales_of_activations(layout.packing.passed_over)
            if finer is not None:
                warn(f"{folder}: {finer}")
            yield from map(CorruptCheckpoint, structure_problems(layout, files.tensors, folder))
            total = sum(info.num_bytes for info in files.tensors.values())
            done = 0
            for info in files.tensors.values():
                yield from map(CorruptCheckpoint, tensor_value_problems(layout, files, info))
                done += info.num_bytes
                if progress is not None:
                    progress(done, total)
            yield from map(CorruptCheckpoint, tokenizer_problems(folder, layout.config))
    except (CorruptCheckpoint, NotSupported) as error:
        yield error


def tokenizer_problems(folder: Path, config: ModelConfig) -> Iterator[str]:
    """What does not go together with the model, or cannot be read."""
    from qnext.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(folder, num_rows=config.vocab_size)
        tokenizer.eos_ids  # noqa: B018
    except QnextError as error:
        yield str(error)
