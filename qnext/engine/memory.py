"""Where an engine's memory goes, for people and for choosing sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import nn

from qnext.ops import Weight
from qnext.planning import state_bytes_per_sequence

if TYPE_CHECKING:
    from qnext.engine.cache import Cache
    from qnext.engine.scheduling.scheduler import Scheduler
    from qnext.model import CausalLM


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that are allocated, and `workspace_bytes`, which steps take beside them at most. `num_blocks` is 0 for a
    model without full attention.

    Of `num_slots` states `max_num_seqs` are for running sequences, the others for cached prefixes.
    """

    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    block_size: int
    state_bytes: int
    num_slots: int
    max_num_seqs: int
    max_model_len: int
    workspace_bytes: int
    state_bytes_per_sequence: int  # of the linear layers, the figure of qnext.planning

    @classmethod
    def of(
        cls, model: CausalLM, cache: Cache, scheduler: Scheduler, *, max_model_len: int, workspace_bytes: int
    ) -> MemoryPlan:
        """As model and caches are allocated."""
        state_dtype = str(cache.state_dtype).removeprefix("torch.")
        return cls(
            weight_bytes=weight_bytes(model),
            kv_bytes=cache.kv_bytes,
            num_blocks=scheduler.blocks.size,
            block_size=scheduler.limits.block_size,
            state_bytes=cache.state_bytes,
            num_slots=scheduler.slots.size,
            max_num_seqs=scheduler.limits.max_num_seqs,
            max_model_len=max_model_len,
            workspace_bytes=workspace_bytes,
            state_bytes_per_sequence=state_bytes_per_sequence(model.config, state_dtype=state_dtype).total,
        )

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.state_bytes + self.workspace_bytes

    @property
    def kv_bytes_per_1000_tokens(self) -> int:
        return self.kv_bytes * 1000 // (self.num_blocks * self.block_size) if self.num_blocks else 0

    @property
    def draft_bytes_per_sequence(self) -> int:
        """What drafting keeps beside the state of a sequence."""
        return self.state_bytes // self.num_slots - self.state_bytes_per_sequence

    @property
    def num_prefixes(self) -> int:
        return self.num_slots - self.max_num_seqs

    @property
    def num_full_sequences(self) -> int:
        """How many sequences of `max_model_len` tokens run side by side; shorter ones up to `max_num_seqs`."""
        if not self.num_blocks:
            return self.max_num_seqs
        return min(self.max_num_seqs, self.num_blocks // -(-self.max_model_len // self.block_size))

    def describe(self) -> str:
        """Two lines for people."""
        drafts = self.draft_bytes_per_sequence
        return (
            f"weights {format_bytes(self.weight_bytes)}, KV {format_bytes(self.kv_bytes_per_1000_tokens)} per 1,000 "
            f"tokens, state {format_bytes(self.state_bytes_per_sequence)} per sequence, "
            + (f"{format_bytes(drafts)} for its drafts, " if drafts else "")
            + f"steps {format_bytes(self.workspace_bytes)}\n"
            f"cache {format_bytes(self.kv_bytes + self.state_bytes)}: {self.num_blocks * self.block_size:,} tokens of "
            f"KV; {self.num_full_sequences} of {self.max_num_seqs} sequences at the full length of "
            f"{self.max_model_len:,} tokens"
            + (f"; {self.num_prefixes} states of cached prefixes" if self.num_prefixes else "")
        )


def format_bytes(count: int) -> str:
    """
    >>> format_bytes(75_497_472)
    '72.0 MiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantised weights, shared ones once."""
    quantized = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, get_args(Weight)) and not isinstance(value, torch.Tensor)
    )
    held = {id(weight): weight for weight in (*model.parameters(), *model.buffers(), *quantized)}
    return sum(weight.nbytes for weight in held.values())


def available_bytes(device: torch.device) -> int:
    """Memory that an allocation on `device` can use now, reclaimable file cache included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, min([free, *_container_room(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]))


def _container_room(root: Path, membership: Path) -> list[int]:
    """What the memory limits of the control groups (v2) around this process leave."""
    found = []
    try:
        line = next(line for line in membership.read_text().splitlines() if line.startswith("0::"))
        folder = root / line[3:].lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root) or not (group / "memory.max").is_file():
                continue
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                stat = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
                found.append(int(limit) - used)
    except (OSError, StopIteration, ValueError):
        pass
    return found
