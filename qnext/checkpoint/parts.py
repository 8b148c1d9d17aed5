"""Parts of tensors, of which each process of a run writes its own and reads what it needs: torch.distributed.checkpoint
with safetensors files in the place of its own files, which hold pickled objects.

A part is a DTensor that is cut by rows. `<name>@<row>` in `rank-<number>.safetensors` is a part that begins at a row.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from qnext.checkpoint.files import write_tensors
from qnext.checkpoint.header import FileState, TensorInfo, read_header
from qnext.checkpoint.reading import TORCH_DTYPES, FileReader, as_bytes
from qnext.checkpoint.snapshot import part_file
from qnext.errors import CorruptCheckpoint


def write_parts(folder: Path, tensors: Mapping[str, Tensor], *, group: dist.ProcessGroup) -> Path:
    """Write the parts of this process into a folder that is being made. All processes of `group` call it with the same
    names.

    Returns the file. Raises OSError where one of them could not write.
    """
    try:
        dcp.save(dict(tensors), storage_writer=_PartWriter(folder), process_group=group)
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(cause, OSError):
            raise cause from None
        raise RuntimeError(f"rank {rank}: {cause}") from cause
    return folder / part_file(dist.get_rank())


def read_parts(files: Sequence[Path], wanted: Callable[[str, torch.Size, torch.dtype], Tensor]) -> None:
    """Read each tensor of these files into what `wanted` makes for its name, whole shape and type: all of it, or a
    DTensor. No process waits for another. Raises CorruptCheckpoint where a part is missing."""
    reader = _PartReader(files)
    found = {
        name: wanted(name, each.size, each.properties.dtype)
        for name, each in reader.read_metadata().state_dict_metadata.items()
        if isinstance(each, dcp.TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is to be
            dcp.load(found, storage_reader=reader, no_dist=True)
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    finally:
        reader.close()


class _PartWriter(dcp.StorageWriter):
    """One file of each process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """The folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts, results = {}, []
        for item in plan.items:
            assert item.index.offset is not None
            part = planner.resolve_data(item)
            assert isinstance(part, Tensor)
            parts[f"{item.index.fqn}@{item.index.offset[0]}"] = part.detach()
            results.append(WriteResult(item.index, part.nbytes, None))
        write_tensors(self._folder / part_file(dist.get_rank()), parts)
        return _done(results)

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """The files say all."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _PartReader(dcp.StorageReader):
    def __init__(self, files: Sequence[Path]) -> None:
        self._infos: dict[MetadataIndex, TensorInfo] = {}
        self._file_reader = FileReader({file: FileState.of(file.stat()) for file in files})
        for file in files:
            for stored, info in read_header(file, any_name=True).items():
                name, _, row = stored.rpartition("@")
                if not name or not row.isdecimal() or not info.shape:
                    raise CorruptCheckpoint(f"{file}: tensor {stored} is no part of a tensor")
                if info.num_bytes:
                    offsets = torch.Size([int(row), *[0] * (len(info.shape) - 1)])
                    self._infos[MetadataIndex(name, offsets)] = info

    def close(self) -> None:
        self._file_reader.close()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept."""

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        """Raises CorruptCheckpoint unless parts follow one another from the first row on."""
        chunks: dict[str, list[tuple[ChunkStorageMetadata, TensorInfo]]] = defaultdict(list)
        for index, info in self._infos.items():
            assert index.offset is not None
            chunks[index.fqn].append((ChunkStorageMetadata(index.offset, torch.Size(info.shape)), info))
        found: dict[str, Any] = {}
        for name, parts in chunks.items():
            parts.sort(key=lambda part: part[0].offsets[0])
            first, row = parts[0][1], 0
            for chunk, info in parts:
                if chunk.offsets[0] != row or info.shape[1:] != first.shape[1:] or info.dtype != first.dtype:
                    raise CorruptCheckpoint(f"{info.file}: the parts of tensor {name} do not fit together")
                row += info.shape[0]
            found[name] = dcp.TensorStorageMetadata(
                TensorProperties(TORCH_DTYPES[first.dtype]),
                torch.Size([row, *first.shape[1:]]),
                [chunk for chunk, _ in parts],
            )
        return dcp.Metadata(found)

    def set_up_storage_reader(self, metadata: dcp.Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """The headers are known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Rows lie one after another, so each item is one range of bytes."""
        for item in plan.items:
            info = self._infos[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            rows = torch.empty(item.lengths, dtype=TORCH_DTYPES[info.dtype])
            start = item.storage_offsets[0] * prod(info.shape[1:]) * rows.element_size()
            self._file_reader.read_into(info, info.start + start, as_bytes(rows))
            target = planner.resolve_tensor(item).detach()
            target.copy_(rows)
            planner.commit_tensor(item, target)
        self._file_reader.check()
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future
