"""Which experts of a folder stay on disk, and what stands in their place in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from qnext import ops
from qnext.checkpoint.check import Layout, layout_of
from qnext.checkpoint.records import record_files
from qnext.errors import UsageError
from qnext.model import CausalLM, SparseMoE, residency_of
from qnext.ops import RecordWeight
from qnext.parallel.shard import RankShard
from qnext.planning import list_parameters, machine
from qnext.planning.expert_memory import ExpertSizes, plan_expert_memory
from qnext.planning.expert_records import RecordFile
from qnext.residency.probe import probe
from qnext.residency.store import ExpertStore, ResidencyPlan

MTP = "mtp."


def streamable(layout: Layout) -> list[RecordFile]:
    """The layers whose experts can be read when they are needed, in the order of the model; those of MTP stay in
    memory, since drafts use them at every token."""
    records = {layer: each for layer, each in layout.records.items() if not layer.startswith(MTP)}
    return record_files(records)


def layer_of(parameter: str) -> str:
    """model.layers.0 for the name of a parameter of its experts."""
    return parameter.partition(".mlp.")[0]


def open_streamed(layout: Layout, plan: ResidencyPlan) -> dict[str, RecordWeight]:
    """Weights by parameter name. Raises UsageError where experts do not lie in records, or not on pages of their files,
    so that they cannot be read directly."""
    files = streamable(layout)
    if len(files) != len(plan.slots):
        raise UsageError(
            f"{layout.index.folder}: experts of {len(files)} layers lie in records, {len(plan.slots)} are planned; "
            f"`qnext convert {layout.index.folder} OUT --records` writes such a folder"
        )
    try:
        store = ExpertStore(files, plan)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
    found = {}
    for layer, (gate_up, down) in store.weights.items():
        found[f"{layer}.mlp.experts.gate_up_proj"] = gate_up
        found[f"{layer}.mlp.experts.down_proj"] = down
    return found


def readable_records(layout: Layout) -> list[RecordFile]:
    """The layers whose experts native kernels can read one by one past the page cache; none where records differ in
    size."""
    files = [file for file in streamable(layout) if file.is_aligned]
    are_alike = len({file.layout.stride for file in files}) == 1
    return files if are_alike and ops.instruction_set() is not None else []


def expert_sizes(layout: Layout, files: Sequence[RecordFile]) -> ExpertSizes:
    """Of the readable records, and of all other weights."""
    sizes = ExpertSizes(len(files), files[0].num_experts, files[0].layout.stride, 0)
    return replace(sizes, other_bytes=max(0, layout.num_bytes - sizes.all_bytes))


def look_ahead(model: CausalLM, shard: RankShard | None = None) -> None:
    """Let each layer of a model whose experts are on disk ask the router of the next one; see Residency.look_ahead.

    On a rank it is asked for the experts of this rank: in a copy of the router the rows of all others are zero.
    """
    residency = residency_of(model)
    if residency is None:
        return
    layers = [n for n, layer in enumerate(model.model.layers) if isinstance(layer.mlp, SparseMoE)]
    for number, layer in enumerate(layers[1:]):
        router_ED = model.get_parameter(f"model.layers.{layer}.mlp.gate.weight").detach()
        if shard is not None:
            own = list(shard.experts_of(layer))
            router_ED = torch.zeros_like(router_ED).index_copy_(0, torch.tensor(own), router_ED[own])
        residency.look_ahead(number, router_ED)


class RoomOnRank(NamedTuple):
    """Where one rank's part of a model goes: so much memory is free for it."""

    shard: RankShard
    free_bytes: int


def plan_residency(
    folder: str | Path | Layout, *, expert_memory: int | None = None, room: RoomOnRank | None = None
) -> ResidencyPlan | None:
    """How the experts of a folder, or of one rank, are kept where not all fit beside an engine, or `expert_memory`
    bytes are for them; None where all stay in memory. Reads some of them, to find out how that goes fastest here.

    Raises DoesNotFit where memory is too short, UsageError for `expert_memory` where experts cannot be streamed.
    """
    layout = layout_of(folder)
    files = readable_records(layout)
    if not files:
        if expert_memory is not None:
            raise UsageError(
                f"{layout.index.folder}: its experts cannot be read one by one; "
                f"`qnext convert {layout.index.folder} OUT --records` writes a folder where they can"
            )
        return None
    sizes = expert_sizes(layout, files)
    memory = plan_expert_memory(
        layout.config if room is None else room.shard.config,
        sizes if room is None else _sizes_on_rank(sizes, room.shard),
        free_bytes=machine.available_bytes() if room is None else room.free_bytes,
        wanted_bytes=expert_memory,
        num_threads=torch.get_num_threads(),
    )
    return None if memory is None else ResidencyPlan(memory.slots, memory.num_spare, probe(files).best)


def _sizes_on_rank(sizes: ExpertSizes, shard: RankShard) -> ExpertSizes:
    infos = [info for info in list_parameters(shard.whole).values() if info.part != "experts"]
    layers = [layer for layer in range(shard.whole.num_hidden_layers) if shard.whole.is_moe_layer(layer)]
    most = max(len(shard.experts_of(layer)) for layer in layers)
    return replace(sizes, num_experts=most, other_bytes=int(sizes.other_bytes * shard.share_of(infos)))
