"""What running a model takes and gives, before anything is loaded: what stays in memory, and how fast it will be.

No torch: whoever opens a folder says how many bytes lie where, and whoever measures a machine what it can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qnext.config import ModelConfig
from qnext.errors import DoesNotFit
from qnext.planning.counts import count_active, kv_bytes_per_token, state_bytes_per_sequence
from qnext.planning.expert_memory import ExpertSizes, engine_reserve, plan_expert_memory
from qnext.planning.expert_speed import (
    TRAFFIC,
    MachineRates,
    StepWork,
    TokenTime,
    decode_time,
    expected_hit_rate,
    missed_bytes,
    prefill_time,
)
from qnext.planning.machine import format_bytes
from qnext.planning.workspace import StepSizes, step_bytes

Placement = Literal["resident", "streamed", "too large"]

PROMPTS = (512, 4096)  # tokens
_STEPS = (8192, 4096, 2048, 1024, 512)  # tokens of a step, from what is best to the least


class StoredSizes(NamedTuple):
    """Bytes of a model as it lies on disk. `dense_bytes` are of what every token multiplies; `experts` are routed ones
    of the trunk, which `can_stream` where they lie in records."""

    dense_bytes: int
    experts: ExpertSizes
    can_stream: bool

    @property
    def weight_bytes(self) -> int:
        return self.experts.all_bytes + self.experts.other_bytes


class Circumstances(NamedTuple):
    """What a model is to run on and for: free memory, threads, the machine's rates, and `batch` sequences of `context`
    tokens each. `expert_bytes` are given for experts; None leaves them what an engine does not want."""

    free_bytes: int
    num_threads: int
    rates: MachineRates
    context: int
    batch: int
    expert_bytes: int | None = None


class TrafficSpeed(NamedTuple):
    """Of one kind of traffic: the share of experts that are found in memory, tokens a second of decoding, and those
    that the disk allows, None where nothing is read from it. `time` is what a token takes."""

    hit_rate: float
    decode: float
    ceiling: float | None
    time: TokenTime

    def document(self) -> dict[str, float | None]:
        """For programs."""
        rates = {"hit_rate": self.hit_rate, "decode": self.decode, "ceiling": self.ceiling}
        return {**rates, **seconds_document(self.time)}


def seconds_document(time: TokenTime) -> dict[str, float]:
    """For programs: what a token takes."""
    return {f"{name}_seconds": value for name, value in time._asdict().items()}


@dataclass(frozen=True)
class Forecast:
    """`problem` says why a model that is too large is, and what would fit; such a one has no speeds. `advice` is for
    one that runs otherwise by itself. `prefill_time` has what a token takes of prompts of so many tokens, `prefill`
    tokens a second."""

    placement: Placement
    weight_bytes: int
    expert_bytes: int  # in memory, buffers for reads among them
    disk_bytes: int  # of experts that are only there
    share: float  # of the experts in memory
    kv_bytes: int
    state_bytes: int
    step_bytes: int
    traffic: dict[str, TrafficSpeed]
    prefill_time: dict[int, TokenTime]
    problem: str = ""
    advice: str = ""

    @property
    def prefill(self) -> dict[int, float]:
        return {num_tokens: time.rate for num_tokens, time in self.prefill_time.items()}

    @property
    def used_bytes(self) -> int:
        """Of memory, in all."""
        return self.weight_bytes - self.disk_bytes + self.kv_bytes + self.state_bytes + self.step_bytes


class _Room(NamedTuple):
    """Experts of each layer that stay, on average, and bytes for them; `advice` where loading would choose more."""

    num_kept: float
    num_bytes: int
    advice: str = ""


def forecast(config: ModelConfig, sizes: StoredSizes, on: Circumstances) -> Forecast:
    """What loading, and then an engine for what is asked, will do."""
    experts = sizes.experts
    kv, states = _carried(config, on)
    try:
        room = _room(config, sizes, on)
    except DoesNotFit as error:
        step = _step(config, on, _STEPS[-1], streams=sizes.can_stream)
        problem = f"{error}{_hint(config, sizes, on)}"
        return Forecast("too large", sizes.weight_bytes, 0, 0, 0.0, kv, states, step, {}, {}, problem)
    streams = room is not None
    kept = room or _Room(experts.num_experts, experts.all_bytes)
    left = on.free_bytes - experts.other_bytes - kept.num_bytes - kv - states
    chunk = next((n for n in _STEPS if _step(config, on, n, streams=streams) <= left), _STEPS[-1])
    share = kept.num_kept / experts.num_experts if streams else 1.0
    work = step_work(config, sizes, on.context)
    return Forecast(
        "streamed" if streams else "resident",
        sizes.weight_bytes,
        kept.num_bytes,
        round((1 - share) * experts.all_bytes),
        share,
        kv,
        states,
        _step(config, on, chunk, streams=streams),
        {traffic: traffic_speed(work, on.rates, share, traffic, batch=on.batch) for traffic in TRAFFIC},
        {n: prefill_time(work, on.rates, share, num_tokens=n, chunk=chunk) for n in _prompts(config)},
        advice=kept.advice,
    )


def traffic_speed(work: StepWork, rates: MachineRates, share: float, traffic: str, *, batch: int = 1) -> TrafficSpeed:
    """Where `share` of the experts is in memory; 1 where all are."""
    experts = work.experts
    used_share = work.used_experts / experts.num_experts if experts.num_experts else 1.0
    hit_rate = expected_hit_rate(traffic, share, used_share=used_share)
    missed = missed_bytes(work, hit_rate)
    ceiling = rates.disk / missed if missed else None
    time = decode_time(work, rates, hit_rate, batch=batch)
    return TrafficSpeed(hit_rate, time.rate, ceiling, time)


def with_more_memory(
    config: ModelConfig, sizes: StoredSizes, on: Circumstances, more: Sequence[int]
) -> dict[int, Forecast]:
    """The same where so many more bytes are free, up to those with which everything is in memory."""
    found = {}
    for extra in more:
        found[extra] = forecast(config, sizes, on._replace(free_bytes=on.free_bytes + extra))
        if found[extra].placement == "resident":
            break
    return found


def step_work(config: ModelConfig, sizes: StoredSizes, context: int) -> StepWork:
    """Of sequences of so many tokens. States are read and written by every token, keys and values read."""
    carried = 2 * state_bytes_per_sequence(config).total + context * kv_bytes_per_token(config)
    operations = 2 * count_active(config).without_head
    return StepWork(sizes.dense_bytes, carried, operations, config.num_experts_per_tok, sizes.experts)


def _room(config: ModelConfig, sizes: StoredSizes, on: Circumstances) -> _Room | None:
    """None where all experts stay in memory. Raises DoesNotFit."""
    experts, free = sizes.experts, on.free_bytes
    if not sizes.can_stream:
        step = _step(config, on, _STEPS[-1], streams=False)
        if sizes.weight_bytes + sum(_carried(config, on)) + step > free:
            raise DoesNotFit(
                f"weights of {format_bytes(sizes.weight_bytes)} and {format_bytes(sum(_carried(config, on)) + step)} "
                f"for an engine, but {format_bytes(free)} of memory are free"
            )
        return None
    chosen = plan_expert_memory(
        config, experts, free_bytes=free, wanted_bytes=on.expert_bytes, num_threads=on.num_threads
    )
    asked = engine_reserve(config, num_threads=on.num_threads, num_sequences=on.batch, num_tokens=on.batch * on.context)
    left = free - experts.other_bytes - asked
    if on.expert_bytes is not None or left >= (experts.all_bytes if chosen is None else chosen.num_bytes):
        return None if chosen is None else _Room(sum(chosen.slots) / len(chosen.slots), chosen.num_bytes)
    fewer = plan_expert_memory(config, experts, free_bytes=free, wanted_bytes=max(0, left), num_threads=on.num_threads)
    assert fewer is not None  # bytes for experts are given
    advice = f"`--expert-memory {left >> 20}M` leaves room for {on.batch} x {on.context:,} tokens"
    return _Room(sum(fewer.slots) / len(fewer.slots), fewer.num_bytes, advice)


def _hint(config: ModelConfig, sizes: StoredSizes, on: Circumstances) -> str:
    """What would fit, behind a semicolon."""
    if sizes.can_stream or not sizes.experts.num_layers:
        return ""
    streamed = forecast(config, sizes._replace(can_stream=True), on)
    if streamed.placement == "too large":
        return ""
    return f"; with its experts in records, which `--records` writes, {streamed.share:.0%} of them would be in memory"


def _prompts(config: ModelConfig) -> list[int]:
    """Those that the context holds, or what it holds."""
    return [n for n in PROMPTS if n < config.context_length] or [config.context_length - 1]


def _carried(config: ModelConfig, on: Circumstances) -> tuple[int, int]:
    """Bytes of keys and values, and of states."""
    kv = on.batch * on.context * kv_bytes_per_token(config, with_mtp=True)
    return kv, on.batch * state_bytes_per_sequence(config).total


def _step(config: ModelConfig, on: Circumstances, num_tokens: int, *, streams: bool) -> int:
    sizes = StepSizes(num_tokens, on.batch, on.batch, on.context)
    return step_bytes(config, sizes, num_threads=on.num_threads, streams_experts=streams)
