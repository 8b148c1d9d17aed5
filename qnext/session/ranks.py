"""A model that several processes compute together: the first rank's side, and that of the others."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qnext.engine import Engine, EngineConfig
from qnext.engine.memory import free_bytes
from qnext.engine.on_ranks import check_on_ranks, engine_on_ranks, follow_engine
from qnext.errors import LostRank, QnextError, UsageError
from qnext.interrupts import ENDING_SIGNALS
from qnext.model import CausalLM
from qnext.parallel.join import LOOPBACK, join, open_loopback_store, open_store
from qnext.parallel.link import DistributedLink
from qnext.parallel.mesh import Mesh
from qnext.parallel.modules import OnRank
from qnext.parallel.placement import ExpertPlacement
from qnext.parallel.shard import RankShard
from qnext.parallel.watch import Vigilance
from qnext.session.expert_loads import find_placement, keep_loads
from qnext.session.folder import (
    EngineOpening,
    ModelFolder,
    PartOfModel,
    ProgressOf,
    load_weights,
    no_progress,
    open_model,
    place_model,
)
from qnext.session.placement import CPU, device_of_rank, use_device
from qnext.session.prefill import iterate_logits
from qnext.session.rank_options import AUTO, Launched, RankOptions, share_of_threads
from qnext.session.rank_processes import RankProcesses, RankStart

_SECONDS_TO_END = 10.0  # for ranks that know that there is no more
_SECONDS_TO_TELL = 1.0  # for a rank that has failed, until the first one hears of it
_DTYPES = ("kv_dtype", "state_dtype")
_NOT_SENT = {"adapters", "disk_cache", "eos_token_ids", "host_cache_bytes"}  # ranks do not have, or do not need them


class RankJob(NamedTuple):
    """What the first rank has all others do: load their part of `folder`, and follow an engine of such options, or
    compute the logits of `passage`, as the arguments of iterate_logits."""

    folder: str
    yarn: float | None
    expert_memory: int | None
    dtype: str | None
    device: str  # cpu or cuda
    engine: Mapping[str, Any]
    placement: Mapping[str, list[list[int]]] | None  # by layer, the experts of each rank
    passage: tuple[Sequence[int], int | None] | None = None

    def to_bytes(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    @classmethod
    def from_bytes(cls, told: bytes) -> RankJob:
        return cls(**json.loads(told))

    @property
    def config(self) -> EngineConfig:
        dtypes = {name: getattr(torch, self.engine[name]) for name in _DTYPES if self.engine[name] is not None}
        return EngineConfig(**{**self.engine, **dtypes})

    def shard(self, folder: ModelFolder, mesh: Mesh) -> RankShard:
        """Of the model as it lies there; it is stretched when it is loaded."""
        config = folder.config if folder.layout is None else folder.layout.config
        placement = None
        if self.placement is not None:
            of_layer = {int(layer): tuple(map(tuple, ranks)) for layer, ranks in self.placement.items()}
            placement = ExpertPlacement(mesh.num_ranks, config.num_experts, of_layer)
        return RankShard.of(config, mesh, placement)


def _job(folder: ModelFolder, config: EngineConfig, placement: ExpertPlacement | None, dtype: str | None) -> RankJob:
    options = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _NOT_SENT}
    options |= {name: None if (each := options[name]) is None else str(each).split(".")[1] for name in _DTYPES}
    of_layer = None
    if placement is not None:
        of_layer = {str(layer): [list(experts) for experts in ranks] for layer, ranks in placement.of_layer.items()}
    return RankJob(
        str(folder.path.absolute()), folder.yarn, folder.expert_memory, dtype, folder.device, options, of_layer
    )


def open_on_ranks(folder: ModelFolder, config: EngineConfig, how: EngineOpening) -> tuple[CausalLM, Engine]:
    """The first rank's part of the model, and an engine for all of it; closing the engine ends the other ranks.

    Raises the errors of load_weights and Engine.of of whichever rank has them, UsageError for what ranks do not have,
    LostRank where one is gone.
    """
    options = how.ranks
    check_on_ranks(config)
    crew, placement = _gather(folder, how)
    job = _job(folder, config, placement, how.dtype)

    def end(is_heard: bool) -> None:
        if options.placement == AUTO:
            keep_loads(folder, engine.expert_counts(0))
        crew.end(is_heard)

    try:
        crew.link.tell(job.to_bytes())
        device = device_of_rank(job.device, options.local_rank(0))
        model = _load_part(folder, job, crew.link, device, how.progress)
        engine = engine_on_ranks(model, config, crew.link, at_end=end)
    except BaseException as error:
        cause = crew.fail(error)
        if cause is error:
            raise
        raise cause from error
    how.note(f"{options.num_ranks} ranks with {torch.get_num_threads()} threads each; sizes are those of the first")
    return model, engine


def logits_on_ranks(
    folder: ModelFolder, token_ids: Sequence[int], how: EngineOpening, *, chunk: int | None
) -> Generator[Tensor, None, None]:
    """The rows of iterate_logits, with its arguments, from all ranks; the others end with the last row. Raises, at the
    first row, what open_on_ranks raises."""
    crew, placement = _gather(folder, how)
    job = _job(folder, EngineConfig(), placement, how.dtype)._replace(passage=(token_ids, chunk))
    try:
        crew.link.tell(job.to_bytes())
        device = device_of_rank(job.device, how.ranks.local_rank(0))
        model = _load_part(folder, job, crew.link, device, how.progress)
        yield from iterate_logits(model, token_ids, chunk=chunk)
    except BaseException as error:
        cause = crew.fail(error)
        if cause is error:
            raise
        raise cause from error
    crew.end(True)


def _gather(folder: ModelFolder, how: EngineOpening) -> tuple[_Crew, ExpertPlacement | None]:
    """All ranks, and where experts are. Raises UsageError."""
    how.ranks.check()
    how.ranks.check_model(folder.config)
    if dist.is_initialized():
        raise UsageError("torch.distributed is in use in this process, by an engine on ranks or by other code")
    place_model(folder, how.dtype, how.ranks)
    placement = find_placement(folder, how.ranks, how.note)
    return _Crew(how.ranks, ends_process=how.ends_process), placement


def _load_part(
    folder: ModelFolder, job: RankJob, link: DistributedLink, device: torch.device, progress: ProgressOf
) -> CausalLM:
    """Returns when all ranks have loaded theirs. What is free is looked at before any of them begins."""
    use_device(device)
    free = free_bytes(device) // (link.num_local if device.type == CPU else 1)
    link.watch.meet("free memory is known")
    on_rank = OnRank(job.shard(folder, link.mesh), link)
    model = load_weights(folder, job.dtype, progress=progress, part=PartOfModel(on_rank, device, free))
    link.watch.meet("weights are loaded")
    return model


class _Place(NamedTuple):
    """Where a rank meets the others."""

    mesh: Mesh
    store: dist.Store
    num_local: int  # ranks on this machine
    local_rank: int  # the number of this one among them
    on_loopback: bool

    @classmethod
    def launched(cls, options: RankOptions, launched: Launched) -> _Place:
        is_first = launched.rank == 0 and not launched.has_store
        store = open_store(launched.host, launched.port, is_first=is_first)
        own = dist.PrefixStore(f"qnext/{launched.attempt}", store)
        return cls(options.mesh(launched.rank), own, launched.num_local, launched.local_rank, on_loopback=False)

    def join(self, vigilance: Vigilance) -> DistributedLink:
        return join(self.mesh, self.store, vigilance, num_local=self.num_local, on_loopback=self.on_loopback)


class _Crew:
    """The other ranks as the first one has them: their processes, where it has started them, and the link to them."""

    def __init__(self, options: RankOptions, *, ends_process: bool) -> None:
        threads = share_of_threads(options)
        self._processes: RankProcesses | None = None
        self._num_threads = torch.get_num_threads()
        torch.set_num_threads(threads)
        vigilance = Vigilance(options.patience, ends_process=ends_process)
        if options.launched is not None:
            self.link = _Place.launched(options, options.launched).join(vigilance)
            return
        mesh, store = options.mesh(0), open_loopback_store()
        self._processes = RankProcesses(mesh, port=store.port, threads=threads, patience=options.patience)
        vigilance = vigilance._replace(exits=self._processes.exits, on_lost=self._processes.kill)
        try:
            self.link = _Place(mesh, store, mesh.num_ranks, mesh.rank, on_loopback=True).join(vigilance)
        except BaseException:
            self._processes.end(0.0)
            raise

    def end(self, is_heard: bool) -> None:
        """`is_heard`: the others end by themselves."""
        self.link.watch.close()
        if self._processes is not None:
            self._processes.end(_SECONDS_TO_END if is_heard else 0.0)
        self.link.close()
        torch.set_num_threads(self._num_threads)

    def fail(self, error: BaseException) -> BaseException:
        """All ranks end. What is to be raised: the error of the rank that has failed."""
        self.link.watch.tell(error)
        told, deadline = None, time.monotonic() + _SECONDS_TO_TELL
        while told is None and isinstance(error, LostRank) and time.monotonic() < deadline:
            told = self.link.watch.told()
            time.sleep(0.05)
        self.end(False)
        return told or error


def follow_first(start: RankStart) -> int:
    """Be a rank that the first one has started, until it closes its engine. The exit code of the process."""
    torch.set_num_threads(start.threads)
    store = open_store(LOOPBACK, start.port, is_first=False)
    return _follow(_Place(start.mesh, store, start.mesh.num_ranks, start.mesh.rank, on_loopback=True), start.patience)


def follow_launched(model: str, options: RankOptions) -> int:
    """Be a rank that a launcher has started, whose files of the model are at `model`. The exit code of the process."""
    assert options.launched is not None
    for number in ENDING_SIGNALS:  # while it waits in a library, nothing but the system ends it
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(share_of_threads(options))
    return _follow(_Place.launched(options, options.launched), options.patience, model)


def _follow(place: _Place, patience: float, model: str | None = None) -> int:
    try:
        link = place.join(Vigilance(patience))
    except LostRank as lost:
        return lost.exit_code
    for number in ENDING_SIGNALS:  # the first rank decides when its answers are complete
        signal.signal(number, signal.SIG_IGN)
    try:
        job = RankJob.from_bytes(link.hear())
        path = job.folder if model is None else model
        folder = open_model(path, yarn=job.yarn, expert_memory=job.expert_memory, device=job.device)
        part = _load_part(folder, job, link, device_of_rank(job.device, place.local_rank), no_progress)
        if job.passage is None:
            follow_engine(part, job.config, link)
        else:
            for _ in iterate_logits(part, job.passage[0], chunk=job.passage[1]):
                pass
    except Exception as error:
        link.watch.tell(error)
        if isinstance(error, QnextError):
            return error.exit_code
        traceback.print_exc()
        return LostRank.exit_code
    link.close()
    return 0
