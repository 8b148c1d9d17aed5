"""A folder with random weights, made tensor by tensor: the model is never in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from qnext.checkpoint.files import MAX_SHARD_BYTES, ShardWriter
from qnext.checkpoint.load import Progress
from qnext.checkpoint.names import Part, disk_parts
from qnext.checkpoint.save import disk_plan, new_folder, write_config, write_side_files
from qnext.config import ModelConfig
from qnext.model.init import initial_values
from qnext.planning import parameter_shapes

_AHEAD = 3


def create_folder(
    config: ModelConfig,
    folder: str | Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write the model that `initialize(CausalLM(config), seed=seed)` makes, rounded to `dtype`.

    Memory stays near the largest tensor. Raises UsageError when `folder` exists and is not empty.
    """
    plan = disk_plan(config, dtype)
    total = sum(spec.num_bytes for spec in plan.values())
    done = 0
    with new_folder(folder) as temporary:
        write_config(temporary, config, dtype=dtype)
        write_side_files(temporary, config, tokenizer_folder, None)
        writer = ShardWriter(temporary, plan, max_shard_bytes=max_shard_bytes)
        try:
            for part, values in _random_parts(config, seed=seed, dtype=dtype):
                writer.write(part.name, values)
                done += plan[part.name].num_bytes
                if progress is not None:
                    progress(done, total)
            writer.finish()
        finally:
            writer.close()


def _random_parts(config: ModelConfig, *, seed: int, dtype: torch.dtype) -> Iterator[tuple[Part, Tensor]]:
    """Tensors of the disk in the order of the plan; the next few are drawn while one is written."""

    def draw(name: str, shape: tuple[int, ...], expert: int | None) -> Tensor:
        return initial_values(config, name, shape, seed=seed, expert=expert, dtype=dtype)

    waiting: deque[tuple[list[Part], Future[Tensor]]] = deque()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, shape in parameter_shapes(config).items():
            for expert, parts in _by_expert(disk_parts(name, shape)):
                block = shape if expert is None else shape[1:]
                waiting.append((parts, pool.submit(draw, name, block, expert)))
                if len(waiting) > _AHEAD:
                    yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())


def _finished(parts: list[Part], future: Future[Tensor]) -> Iterator[tuple[Part, Tensor]]:
    values = future.result()
    for part in parts:
        yield part, values if part.rows is None else values[slice(*part.rows)]


def _by_expert(parts: list[Part]) -> Iterator[tuple[int | None, list[Part]]]:
    groups: dict[int | None, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.expert, []).append(part)
    yield from groups.items()
