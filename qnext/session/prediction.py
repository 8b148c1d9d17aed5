"""Decode speed of a loaded model whose experts are partly on disk: predicted, and told beside what was measured."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from qnext.planning.expert_memory import ExpertSizes
from qnext.planning.expert_speed import TRAFFIC, MachineRates, StepWork, decode_time
from qnext.planning.forecast import TrafficSpeed, step_work, traffic_speed
from qnext.planning.step_load import StoredSizes

if TYPE_CHECKING:
    from qnext.model import CausalLM
    from qnext.ops import Residency

_PROBED_BYTES = 48 << 20


class DecodePrediction(NamedTuple):
    """What `work` takes on a machine of such rates, for each kind of traffic: without drafts, one sequence."""

    work: StepWork
    rates: MachineRates
    traffic: dict[str, TrafficSpeed]

    def beside(self, measured: float | None, hit_ratio: float | None) -> str:
        """One line; `measured` are tokens a second, of which `hit_ratio` of the experts were in memory."""
        speeds = (f"{speed.decode:.1f} {name} ({speed.hit_rate:.0%} hits)" for name, speed in self.traffic.items())
        line = f"predicted tokens/s: {', '.join(speeds)}"
        if measured is None or hit_ratio is None:
            return line
        at_these = decode_time(self.work, self.rates, hit_ratio).rate
        return f"{line}; measured {measured:.1f} ({hit_ratio:.0%} hits, for which {at_these:.1f} are predicted)"

    def document(self) -> dict[str, dict[str, float | None]]:
        """For programs: hit rate, tokens a second, what the disk allows, and what a token takes."""
        return {name: speed.document() for name, speed in self.traffic.items()}


def predict_decoding(model: CausalLM, *, context: int) -> DecodePrediction | None:
    """After `context` tokens. Measures kernels and disk within a second. None where all experts are in memory, or the
    disk cannot be read."""
    from qnext.model import named_weights, residency_of
    from qnext.ops import RecordWeight
    from qnext.session.planned import kernel_rates

    residency = residency_of(model)
    if residency is None:
        return None
    try:
        disk = _read_rate(residency)
    except (OSError, RuntimeError):  # whoever needs these records will say so
        return None
    config = model.config
    is_quantized = any(isinstance(each, RecordWeight) and each.matrix.bits for _, each in named_weights(model))
    kernels = kernel_rates(config, is_quantized=is_quantized)
    rates = MachineRates(kernels.memory, disk, kernels.arithmetic)
    experts = ExpertSizes(len(residency.layers), residency.num_experts, residency.record_bytes, 0)
    work = step_work(config, StoredSizes(_dense_bytes(model), experts, can_stream=True), context)
    share = residency.num_slots / (len(residency.layers) * residency.num_experts)
    return DecodePrediction(work, rates, {name: traffic_speed(work, rates, share, name) for name in TRAFFIC})


def _dense_bytes(model: CausalLM) -> int:
    """Of the weights in memory that every token multiplies."""
    from qnext.model import named_tensors

    skipped = ("mtp.",) if model.config.tie_word_embeddings else ("mtp.", "model.embed_tokens.")
    return sum(tensor.nbytes for name, tensor in named_tensors(model) if not name.startswith(skipped))


def _read_rate(residency: Residency) -> float:
    """Bytes a second of the reader that steps use, over records of one layer."""
    from qnext.ops import time_reads

    layer, size = random.choice(residency.layers), residency.record_bytes
    count = min(residency.num_experts, max(1, _PROBED_BYTES // size))
    offsets = [layer.offset + expert * size for expert in random.sample(range(residency.num_experts), count)]
    return count * size / max(1e-9, time_reads(layer.path, offsets, size, residency.reader))
