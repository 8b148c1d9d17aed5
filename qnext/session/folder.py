"""A model folder opened for text: configuration and tokenizer at once, weights when they are needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.session.placement import CPU, Wanted, check_device, choose_device, device_of_rank, kind_on_ranks, use_device
from qnext.session.rank_options import ONE_PROCESS, RankOptions

if TYPE_CHECKING:
    import torch

    from qnext.checkpoint.check import Layout
    from qnext.checkpoint.hosted import DeviceRoom
    from qnext.config import ModelConfig
    from qnext.model import CausalLM
    from qnext.parallel.modules import OnRank
    from qnext.residency.store import ResidencyPlan
    from qnext.text.chat import ChatFormat
    from qnext.text.tokenizer import Tokenizer

Report = Callable[[int, int], None]  # done, in all
ProgressOf = Callable[[str], AbstractContextManager[Report | None]]  # a label -> who is told of what is done


def no_progress(label: str) -> AbstractContextManager[None]:
    """Reports progress to nobody."""
    return nullcontext()


class EngineOpening(NamedTuple):
    """How a folder becomes an engine, and who is told of it. `ends_process`: the process ends where a rank is lost
    while nothing waits for it."""

    dtype: str | None = None
    ranks: RankOptions = ONE_PROCESS
    progress: ProgressOf = no_progress
    note: Callable[[str], None] = lambda line: None
    ends_process: bool = True


@dataclass
class ModelFolder:
    """A model folder before its weights are read. `layout` is what its headers say. Loading takes the layout and drops
    it."""

    path: Path
    config: ModelConfig  # its context stretched by `yarn`
    stored_bytes: int  # of all weights, as stored
    yarn: float | None
    expert_memory: int | None  # bytes for experts, the others of which stay on disk; None: as many as fit
    device: str  # as asked for, see qnext.session.placement
    layout: Layout | None

    def take_layout(self) -> Path | Layout:
        """The layout, for the code that loads the weights. It is given once, because the headers of a large model fill
        100 MB; a second caller reads the headers again."""
        layout, self.layout = self.layout, None
        return self.path if layout is None else layout


@dataclass
class TextFolder(ModelFolder):
    """A model folder with its tokenizer."""

    tokenizer: Tokenizer


class PartOfModel(NamedTuple):
    """One rank's, for which so much memory of `device` is free."""

    on_rank: OnRank
    device: torch.device
    free_bytes: int


def open_folder(
    model: str, *, yarn: float | None = None, expert_memory: int | None = None, device: str = CPU
) -> TextFolder:
    """Configuration and tokenizer of MODEL. `yarn` is the factor by which YaRN stretches the context, `device` is auto,
    cpu, cuda or cuda:N.

    Raises ModelNotFound, CorruptCheckpoint, and UsageError for an impossible factor or device.
    """
    from qnext.text.tokenizer import Tokenizer

    folder = open_model(model, yarn=yarn, expert_memory=expert_memory, device=device)
    tokenizer = Tokenizer.from_folder(folder.path, num_rows=folder.config.vocab_size)
    return TextFolder(**vars(folder), tokenizer=tokenizer)


def open_model(
    model: str, *, yarn: float | None = None, expert_memory: int | None = None, device: str = CPU
) -> ModelFolder:
    """The same as open_folder without the tokenizer, for verbs that take token ids."""
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.resolve import resolve_model

    if yarn is not None and not 1.0 <= yarn <= 64.0:
        raise UsageError(f"--yarn must be between 1 and 64, not {yarn:g}")
    check_device(device)
    path = resolve_model(model)
    layout = read_layout(path)
    config = layout.config if yarn is None else layout.config.with_yarn(yarn)
    return ModelFolder(path, config, layout.num_bytes, yarn, expert_memory, device, layout)


def place_model(folder: ModelFolder, dtype: str | None = None, ranks: RankOptions = ONE_PROCESS) -> torch.device:
    """Decide where `load_weights` loads the model, which `folder.device` says from then on: of several ranks only
    whether they use GPUs. Returns the device, of ranks that of the first. Raises UsageError and NotSupported."""
    _check_dtype(dtype)
    wanted = Wanted(folder.device, partial(weight_bytes_on, folder, dtype), folder.expert_memory is not None)
    if ranks.num_ranks == 1:
        device = choose_device(wanted)
        folder.device = str(device)
        return device
    folder.device = kind_on_ranks(wanted, num_local=ranks.num_local)
    return device_of_rank(folder.device, ranks.local_rank(0))


def load_weights(
    folder: ModelFolder,
    dtype: str | None = None,
    *,
    progress: ProgressOf = no_progress,
    part: PartOfModel | None = None,
) -> CausalLM:
    """The model in the folder, or one rank's part of it, in `dtype` or as stored, on the folder's device. On the CPU
    experts in records stay on disk where they do not fit into memory. Where memory for experts is given, they stay on
    disk, or, beside a GPU, on the host. Raises DoesNotFit before it reads weights that memory cannot hold, and what
    place_model raises."""
    import torch

    from qnext.checkpoint import load_model
    from qnext.checkpoint.check import layout_of
    from qnext.model import residency_of
    from qnext.ops import keep_freed_memory
    from qnext.residency.remembered import remember

    keep_freed_memory()
    device = place_model(folder, dtype) if part is None else part.device
    use_device(device)
    _check_dtype(dtype)
    needed = weight_bytes_on(folder, dtype, device)
    layout = layout_of(folder.take_layout())
    wanted, on_rank = None if dtype is None else getattr(torch, dtype), None if part is None else part.on_rank
    residency: ResidencyPlan | DeviceRoom | None
    if device.type == CPU or folder.expert_memory is None:
        residency = _residency_or_room(folder, layout, needed, device, part)
    else:
        residency = _room_on_device(folder, layout, needed, device, wanted)
    with progress("loading") as report:
        model = load_model(layout, dtype=wanted, device=device, residency=residency, on_rank=on_rank, progress=report)
    if folder.yarn is not None:
        model.stretch(folder.yarn)
    if part is None and (experts := residency_of(model)) is not None:
        weakref.finalize(model, remember, experts, folder.path)  # also when the program ends
    return model


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"dtype must be float32 or bfloat16, not {dtype!r}")


def weight_bytes_on(folder: ModelFolder, dtype: str | None, device: torch.device) -> int:
    """Of all weights in the memory of a device: as stored, or in `dtype`. Floats of fewer bits than sixteen become
    bfloat16 where the device has no kernels for them."""
    from qnext.ops import reads_fp8
    from qnext.planning import weight_bytes

    if dtype is not None:
        return weight_bytes(folder.config, dtype=dtype)
    packed = {} if folder.layout is None else folder.layout.packed
    keeps_fp8 = bool(packed) and reads_fp8(device)
    return folder.stored_bytes + sum(
        prod(each.shape) * (16 - each.form.bits) // 8
        for each in packed.values()
        if not each.form.stays_packed(reads_fp8=keeps_fp8)
    )


def _residency_or_room(
    folder: ModelFolder, layout: Layout, needed: int, device: torch.device, part: PartOfModel | None
) -> ResidencyPlan | None:
    """How experts stay on disk, or None, where there is room for all weights. Raises DoesNotFit where there is none."""
    from qnext.checkpoint.streamed import RoomOnRank, plan_residency
    from qnext.engine.memory import free_bytes
    from qnext.planning import list_parameters, weight_bytes
    from qnext.planning.machine import format_bytes
    from qnext.planning.plan import check_weights

    smallest = weight_bytes(folder.config, dtype="bfloat16")
    free, room = free_bytes(device), None
    if part is not None:
        free, shard = part.free_bytes, part.on_rank.shard
        share, room = shard.share_of(list_parameters(folder.config).values()), RoomOnRank(shard, free)
        needed, smallest = int(needed * share), int(smallest * share)

    def hint(free: int) -> str:
        if smallest <= free:
            return f"; --dtype bfloat16 needs {format_bytes(smallest)}"
        if needed > smallest // 2:
            return f"; `qnext quantize {folder.path} OUT --scheme int4-g32` makes a much smaller folder"
        return "" if device.type == CPU else "; --device cpu takes the memory of the machine"

    residency = None
    if device.type == CPU:
        residency = plan_residency(layout, expert_memory=folder.expert_memory, room=room)
    if residency is None:
        check_weights(folder.path, needed, hint=hint, free_bytes=free, device=str(device))
    elif part is None:
        residency = replace(residency, remembered_in=folder.path)
    return residency


def _room_on_device(
    folder: ModelFolder, layout: Layout, needed: int, device: torch.device, dtype: torch.dtype | None
) -> DeviceRoom:
    """For experts that wait on the host. Raises DoesNotFit where host or device lacks memory."""
    from qnext.checkpoint.hosted import DeviceRoom, hosted_bytes
    from qnext.engine.memory import free_bytes
    from qnext.planning.plan import check_weights

    assert folder.expert_memory is not None
    experts = hosted_bytes(layout, dtype, device)
    on_device = max(0, needed - experts) + folder.expert_memory
    check_weights(
        folder.path,
        on_device,
        hint=lambda free: "; lower --expert-memory",
        free_bytes=free_bytes(device),
        device=str(device),
    )
    check_weights(folder.path, experts, hint=lambda free: "")
    return DeviceRoom(folder.expert_memory)


def end_token_ids(tokenizer: Tokenizer, config: ModelConfig) -> frozenset[int]:
    """Tokens that end an answer: those of the tokenizer's files and those of the model's configuration."""
    try:
        named = tokenizer.eos_ids
    except CorruptCheckpoint:
        named = frozenset()
    return named | frozenset(config.eos_token_ids)


def chat_format_of(folder: TextFolder, note: Callable[[str], None], *, without: str) -> ChatFormat | None:
    """The folder's chat format, or None where it has none. Then `note` is told so, with `without`, which says what
    happens now."""
    from qnext.text.chat import ChatFormat

    try:
        return ChatFormat.for_folder(folder.path, tokenizer=folder.tokenizer)
    except UsageError as error:
        note(f"{error}: {without}")
        return None
