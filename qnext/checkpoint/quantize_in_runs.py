"""A model becomes a quantised folder shard by shard of the source, each given up as soon as it is done.

Whatever ends a run, the next one goes on: a shard is given up only when all that was made of it is on the disk, and
the folder gets its name only when it is whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from qnext.checkpoint.aliases import canonical
from qnext.checkpoint.check import Layout, read_layout
from qnext.checkpoint.files import MAX_SHARD_BYTES, Progress, TensorFiles
from qnext.checkpoint.header import CheckpointIndex, FileState, read_header
from qnext.checkpoint.ledger import Ledger, ShardHeaders, Task, begin_ledger, read_ledger
from qnext.checkpoint.provenance import Making, parent_of
from qnext.checkpoint.quantize import check_source, describe_making, report_of, write_config_of
from qnext.checkpoint.quantized_output import QuantizedOutput
from qnext.checkpoint.save import has_tokenizer, unfinished_folder, write_side_files
from qnext.checkpoint.shard_source import ShardSource
from qnext.checkpoint.weight_source import FolderWeights, Group
from qnext.errors import CorruptCheckpoint
from qnext.files import Unfinished
from qnext.planning.plan import check_disk
from qnext.quant.report import QualityReport
from qnext.quant.scheme import find_scheme, make_policy


class _ShardTurn(NamedTuple):
    """What can be made when one more shard is there."""

    number: int
    groups: list[Group]
    needed: list[Path]  # files that these weights lie in
    spare: list[Path]  # files that no later step needs


@torch.no_grad()
def quantize_in_runs(
    source: ShardSource,
    folder: str | Path,
    *,
    scheme: str,
    head: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    making: Making | None = None,
) -> QualityReport:
    """As quantize_folder without a text, from shards that are fetched and dropped one after another.

    `folder`.unfinished holds what is done until the folder is whole; the next call with the same arguments takes it up.
    Raises as quantize_folder, and UsageError where an earlier run was asked for something else.
    """
    find_scheme(scheme)
    making = making or Making("quantize")
    task = Task(source.name, scheme, head, max_shard_bytes)
    with unfinished_folder(folder) as work:
        root = source.begin(work.path)
        ledger = read_ledger(work.path, task, root)
        headers = source.headers() if ledger is None else ledger.headers
        layout = read_layout(CheckpointIndex(root, {}, canonical(headers.tensors)))
        check_source(layout)
        layout = layout.with_all_experts()
        policy = make_policy(scheme, head=head, is_tied=layout.config.tie_word_embeddings)
        with TensorFiles(layout.index) as files:
            weights = FolderWeights(files, layout)
            out = QuantizedOutput(weights, policy, progress, name=root, max_shard_bytes=max_shard_bytes)
            steps = _steps(layout, weights, headers)
            if ledger is None:
                check_disk(Path(folder), _peak_bytes(steps, out, headers, source, work.made))
                ledger = begin_ledger(work.path, task, headers)
            work.is_kept = True
            _make(work, _Runner(source, ledger, layout, files), out, steps)
            write_config_of(out, work.made)
            write_side_files(work.made, layout.config, root if has_tokenizer(root) else None, None)
        out.errors = [error for number in sorted(ledger.errors) for error in ledger.errors[number]]
        report = report_of(out, layout, policy)
        making.parents.append(
            parent_of(layout, name=Path(source.name).name if Path(source.name).is_absolute() else source.name)
        )
        describe_making(making, report)
        making.write_inside(work.made)
        return report


def _make(work: Unfinished, runner: _Runner, out: QuantizedOutput, steps: list[_ShardTurn]) -> None:
    work.clear(lambda path: path.suffix == ".safetensors")
    done = [step for step in steps if runner.ledger.is_done(step.number)]
    written = [part for step in done for group in step.groups for part in group.parts]
    try:
        out.sink.begin(work.made, written={part.name for part in written})
        out.pass_over(written)
        for step in steps:
            if not runner.ledger.is_done(step.number):
                runner.take(step, out)
            for file in step.spare:
                runner.source.drop(file)
        out.sink.finish()
    finally:
        out.sink.close()


class _Runner:
    """Takes one step after another."""

    def __init__(self, source: ShardSource, ledger: Ledger, layout: Layout, files: TensorFiles) -> None:
        self.source = source
        self.ledger = ledger
        self._states = layout.index.files  # of the files that are there; `files` looks there too
        self._files = files

    def take(self, step: _ShardTurn, out: QuantizedOutput) -> None:
        """All of a step is on the disk, and recorded, when it returns."""
        for file in step.needed:
            if file not in self._states:
                self._have(file)
        num_errors = len(out.errors)
        out.write_all(step.groups)
        for file in step.spare:
            self._files.release(file)
        out.sink.sync()
        self.ledger.record(step.number, out.errors[num_errors:])

    def _have(self, file: Path) -> None:
        """A shard is there, and holds what it held when the plan was made."""
        self.source.fetch(file)
        try:
            if read_header(file) != self.ledger.headers.of(file):
                raise CorruptCheckpoint(f"{file}: holds other tensors than when quantising began")
        except CorruptCheckpoint:
            self.source.refuse(file)
            raise
        self._states[file] = FileState.of(file.stat())


def _steps(layout: Layout, weights: FolderWeights, headers: ShardHeaders) -> list[_ShardTurn]:
    """A step for each shard: weights are made as soon as all shards that they lie in have been there."""
    numbers = {file: number for number, file in enumerate(headers.files)}
    steps = [_ShardTurn(number, [], [file], []) for file, number in numbers.items()]
    last_uses = dict(numbers)
    for group in weights.groups():
        stored = [name for part in group.parts for name in layout.stored_names(part.name)]
        touched = {layout.index.tensors[name].file for name in stored}
        number = max(numbers[file] for file in touched)
        steps[number].groups.append(group)
        for file in touched:
            last_uses[file] = max(last_uses[file], number)
            if file not in steps[number].needed:
                steps[number].needed.append(file)
    for file, number in last_uses.items():
        steps[number].spare.append(file)
    return steps


def _peak_bytes(
    steps: list[_ShardTurn], out: QuantizedOutput, headers: ShardHeaders, source: ShardSource, folder: Path
) -> int:
    """What the disk of `folder` has to have free: what is written, less what is given up on the same disk."""
    sizes = dict.fromkeys(headers.files, 0)
    for info in headers.tensors.values():
        sizes[info.file] += info.num_bytes
    if not source.is_elsewhere and headers.files[0].stat().st_dev != folder.stat().st_dev:
        return out.sink.num_bytes
    used = most = 0
    for step in steps:
        used += sizes[headers.files[step.number]] if source.is_elsewhere else 0
        used += sum(out.sink.size_of(part.name) for group in step.groups for part in group.parts)
        most = max(most, used)
        used -= sum(sizes[file] for file in step.spare)
    return most
