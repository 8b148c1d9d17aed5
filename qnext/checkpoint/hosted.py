"""Models on a device whose experts wait in the memory of the host."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from qnext import ops
from qnext.checkpoint.check import Layout
from qnext.errors import DoesNotFit, UsageError
from qnext.model import CausalLM, SparseMoE
from qnext.planning.machine import format_bytes
from qnext.residency.ahead import NUM_PLACES, CopiesAhead
from qnext.residency.hosted import HostedExperts, WholeLayer
from qnext.residency.stacks import form_of


class DeviceRoom(NamedTuple):
    """Bytes of a device for experts, the others of which wait on the host."""

    expert_bytes: int


def hosted_bytes(layout: Layout, dtype: torch.dtype | None, device: torch.device) -> int:
    """Of all experts on the host: as stored, in `dtype`, or in bf16 where they are stored in what `device` does not
    read."""
    layout = layout.with_experts_of(layout.records)
    total, reads_fp8 = 0, dtype is None and bool(layout.packed) and ops.reads_fp8(device)
    for name, (parameter, _) in layout.targets.items():
        if parameter.expert_axis is None:
            continue
        packed = layout.packed.get(name)
        if packed is None:
            info = layout.index.tensors[name]
            total += info.num_bytes if dtype is None else prod(info.shape) * dtype.itemsize
        elif packed.form.stays_packed(reads_fp8=reads_fp8):
            total += sum(layout.index.tensors[part.name].num_bytes for part in packed.stored.values())
        else:
            total += prod(packed.shape) * (dtype or torch.bfloat16).itemsize
    return total


def hosted_parameters(layout: Layout) -> frozenset[str]:
    """The names of all that waits on the host. Raises UsageError for a model without experts."""
    names = frozenset(parameter.name for parameter, _ in layout.targets.values() if parameter.expert_axis is not None)
    if not names:
        raise UsageError(f"{layout.index.folder}: --expert-memory is for models with experts")
    return names


def host_experts(model: CausalLM, room: DeviceRoom, device: torch.device) -> None:
    """Have the experts of a model, which are on the host, brought to `device` when they are needed.

    The room is for one whole layer, which all share, for as many slots of each layer as there are bytes, and for what
    is copied ahead, where slots for a token's experts are left. Raises DoesNotFit where these have no slots.
    """
    layers = [module.experts for module in model.modules() if isinstance(module, SparseMoE)]
    largest = max(layer.gate_up_proj.nbytes + layer.down_proj.nbytes for layer in layers)
    each = largest // model.config.num_experts
    ahead_bytes, least = NUM_PLACES * each, model.config.num_experts_per_tok
    num_slots, num_beside = (
        (num_bytes - largest) // (each * len(layers))
        for num_bytes in (room.expert_bytes, room.expert_bytes - ahead_bytes)
    )
    if num_slots < least:
        raise DoesNotFit(
            f"--expert-memory {format_bytes(room.expert_bytes)}: the experts of a layer and {least} of each need "
            f"{format_bytes(largest + least * each * len(layers))} of {device}"
        )
    looks_ahead = num_beside >= least
    whole = WholeLayer(device)
    for layer in layers:
        stacks = [getattr(layer, name) for name in ("gate_up_proj", "down_proj")]
        plain = [stack.detach() if isinstance(stack, torch.nn.Parameter) else stack for stack in stacks]
        experts = HostedExperts(*plain, num_slots=num_beside if looks_ahead else num_slots, whole=whole)
        layer.set_weight("gate_up_proj", ops.HostedWeight(plain[0], experts))
        layer.set_weight("down_proj", ops.HostedWeight(plain[1], experts))
    if looks_ahead:
        _look_ahead(model, device)


def _look_ahead(model: CausalLM, device: torch.device) -> None:
    """Let each layer of the trunk guess what the next one needs, where all have experts of one form."""
    sparse = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, SparseMoE)]
    hosted = [[getattr(mlp.experts, name) for name in ("gate_up_proj", "down_proj")] for mlp in sparse]
    if len({tuple(form_of(weight.stack) for weight in weights) for weights in hosted}) != 1:
        return
    ahead = CopiesAhead([weight.stack for weight in hosted[0]], device)
    layers = [weights[0].experts for weights in hosted]
    routers = [mlp.gate.weight.detach() for mlp in sparse]
    following = [*zip(layers[1:], routers[1:], strict=True), None]
    for layer, after in zip(layers, following, strict=True):
        layer.look_ahead(ahead, after)
