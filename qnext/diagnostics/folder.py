"""Every check that loading a folder makes, and those of the tokenizer, without keeping the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qnext.errors import CorruptCheckpoint, NotSupported, QnextError, QnextWarning, warn

if TYPE_CHECKING:
    from qnext.checkpoint.check import Layout


class FolderExamination(NamedTuple):
    """All faults of a folder, and what was ignored during the examination."""

    problems: list[QnextError]
    warnings: list[QnextWarning]

    def strict(self) -> FolderExamination:
        """The same, with each warning as the error that it names."""
        return FolderExamination([*self.problems, *(each.error(str(each)) for each in self.warnings)], [])

    @property
    def exit_code(self) -> int:
        """0 without problems; that of NotSupported where all problems are of this kind; otherwise that of a corrupt
        checkpoint."""
        codes = {problem.exit_code for problem in self.problems}
        return max(codes) if len(codes) < 2 and codes else CorruptCheckpoint.exit_code * bool(codes)


def examine(folder: Path, progress: Callable[[int, int], None] | None = None) -> FolderExamination:
    """All problems and all warnings of a folder. A line that comes twice is listed once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QnextWarning)
        problems = list(checkpoint_problems(folder, progress))
        problems += map(CorruptCheckpoint, provenance_problems(folder))
    passed_over: dict[str, QnextWarning] = {}
    for each in caught:
        if isinstance(each.message, QnextWarning):
            passed_over.setdefault(str(each.message), each.message)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return FolderExamination(problems, list(passed_over.values()))


def checkpoint_problems(
    folder: Path | Layout, progress: Callable[[int, int], None] | None = None
) -> Iterator[QnextError]:
    """One error for everything that is wrong. `progress` gets the bytes that are read, and all bytes."""
    from qnext.checkpoint.check import layout_of, structure_problems
    from qnext.checkpoint.files import TensorFiles
    from qnext.checkpoint.packed import scales_of_activations
    from qnext.checkpoint.values import tensor_value_problems

    try:
        layout = layout_of(folder).with_all_experts()
        finer = scales_of_activations(layout.packing.passed_over)
        if finer is not None:
            warn(f"{layout.index.folder}: {finer}")
        yield from map(CorruptCheckpoint, structure_problems(layout))
        with TensorFiles(layout.index) as files:
            total, done = sum(info.num_bytes for info in files.tensors.values()), 0
            for info in files.tensors.values():
                yield from map(CorruptCheckpoint, tensor_value_problems(layout, files, info))
                done += info.num_bytes
                if progress is not None:
                    progress(done, total)
            yield from map(CorruptCheckpoint, tokenizer_problems(layout))
    except (CorruptCheckpoint, NotSupported) as error:
        yield error


def provenance_problems(folder: Path) -> Iterator[str]:
    """Files of the model that differ from its provenance; a warning for each other file that does. A folder without a
    provenance comes from elsewhere."""
    from qnext.checkpoint.provenance import changed_files, read_provenance

    provenance = read_provenance(folder)
    for problem, is_of_model in () if provenance is None else changed_files(folder, provenance):
        if is_of_model:
            yield problem
        else:
            warn(problem, error=CorruptCheckpoint)


def tokenizer_problems(layout: Layout) -> Iterator[str]:
    """Parts of the tokenizer that do not fit to the model, or cannot be read."""
    from qnext.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(layout.index.folder, num_rows=layout.config.vocab_size)
        tokenizer.eos_ids  # noqa: B018
    except QnextError as error:
        yield str(error)
