"""Where an engine's memory goes, for people and for choosing sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qnext.engine.policy.step import EngineLimits
from qnext.planning import machine
from qnext.planning.machine import format_bytes


class HeldBytes(NamedTuple):
    """Bytes that an executor has allocated, and a bound on what its steps take beside them."""

    weights: int
    experts: int  # memory for those that come from disk
    kv: int
    states: int
    workspace: int
    state_of_sequence: int  # of the linear layers, the figure of qnext.planning
    device: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that are allocated, and `workspace_bytes`, which steps take beside them at most. `num_blocks` is 0 for a
    model without full attention.

    Of `num_slots` states `max_num_seqs` are for running sequences, the others for cached prefixes.
    """

    weight_bytes: int
    expert_bytes: int  # memory for experts that come from disk
    kv_bytes: int
    num_blocks: int
    block_size: int
    state_bytes: int
    num_slots: int
    max_num_seqs: int
    max_model_len: int
    workspace_bytes: int
    state_bytes_per_sequence: int  # of the linear layers, the figure of qnext.planning
    device: str

    @classmethod
    def of(cls, held: HeldBytes, limits: EngineLimits, *, max_model_len: int) -> MemoryPlan:
        """As model and caches are allocated."""
        return cls(
            weight_bytes=held.weights,
            expert_bytes=held.experts,
            kv_bytes=held.kv,
            num_blocks=limits.num_blocks or 0,
            block_size=limits.block_size,
            state_bytes=held.states,
            num_slots=limits.num_slots,
            max_num_seqs=limits.max_num_seqs,
            max_model_len=max_model_len,
            workspace_bytes=held.workspace,
            state_bytes_per_sequence=held.state_of_sequence,
            device=held.device,
        )

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.expert_bytes + self.kv_bytes + self.state_bytes + self.workspace_bytes

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
            f"weights {format_bytes(self.weight_bytes)}{'' if self.device == 'cpu' else f' on {self.device}'}, "
            + (f"experts from disk in {format_bytes(self.expert_bytes)} of memory, " if self.expert_bytes else "")
            + f"KV {format_bytes(self.kv_bytes_per_1000_tokens)} per 1,000 "
            f"tokens, state {format_bytes(self.state_bytes_per_sequence)} per sequence, "
            + (f"{format_bytes(drafts)} for its drafts, " if drafts else "")
            + f"steps {format_bytes(self.workspace_bytes)}\n"
            f"cache {format_bytes(self.kv_bytes + self.state_bytes)}: {self.num_blocks * self.block_size:,} tokens of "
            f"KV; {self.num_full_sequences} of {self.max_num_seqs} sequences at the full length of "
            f"{self.max_model_len:,} tokens"
            + (f"; {self.num_prefixes} states of cached prefixes" if self.num_prefixes else "")
        )


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on `device` can use now. Reclaimable file cache is included, and on a GPU what torch
    keeps of freed tensors."""
    if device.type != "cuda":
        return machine.available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def peak_bytes_on(device: torch.device) -> int:
    """The most that this process has had at a time: on a GPU in tensors, those of graphs too, else in all."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else machine.peak_bytes()
