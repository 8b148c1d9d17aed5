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
from qnext.planning.expert_memory import engine_reserve, plan_expert_memory
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
from qnext.planning.plan import default_step_tokens
from qnext.planning.speed_model import SpeedModel
from qnext.planning.step_load import Peaks, StoredSizes, bound_seconds, decode_load, prefill_load, sequence_bytes
from qnext.planning.workspace import StepSizes, likely_step_bytes, step_bytes

Placement = Literal["resident", "streamed", "too large"]

PROMPTS = (512, 4096)  # tokens
_STEPS = (8192, 4096, 2048, 1024, 512)  # tokens of a step, from what is best to the least


class Circumstances(NamedTuple):
    """What a model is to run on and for: free memory, threads, the machine's rates, and `batch` sequences of `context`
    tokens each. `expert_bytes` are given for experts; None leaves them what an engine does not want. A `speed` model
    says what steps take where all weights stay in memory, `peaks` what bounds them; without them `rates` do."""

    free_bytes: int
    num_threads: int
    rates: MachineRates
    context: int
    batch: int
    expert_bytes: int | None = None
    speed: SpeedModel | None = None
    peaks: Peaks | None = None
    cache_bytes: int = 0  # of the processor, as the speed model knows it


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
    likely_bytes: int = 0  # of memory in all, as expected; `used_bytes` bounds it
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
        return Forecast("too large", sizes.weight_bytes, 0, 0, 0.0, kv, states, step, {}, {}, problem=problem)
    streams = room is not None
    kept = room or _Room(experts.num_experts, experts.all_bytes)
    left = on.free_bytes - experts.other_bytes - kept.num_bytes - kv - states
    chunk = next((n for n in _STEPS if _step(config, on, n, streams=streams) <= left), _STEPS[-1])
    share = kept.num_kept / experts.num_experts if streams else 1.0
    if streams or on.speed is None:
        work = step_work(config, sizes, on.context)
        traffic = {name: traffic_speed(work, on.rates, share, name, batch=on.batch) for name in TRAFFIC}
        prompts = {n: prefill_time(work, on.rates, share, num_tokens=n, chunk=chunk) for n in _prompts(config, on)}
    else:
        traffic, prompts = _resident_speeds(config, sizes, on, on.speed)
    return Forecast(
        "streamed" if streams else "resident",
        sizes.weight_bytes,
        kept.num_bytes,
        round((1 - share) * experts.all_bytes),
        share,
        kv,
        states,
        _step(config, on, chunk, streams=streams),
        traffic,
        prompts,
        _likely_bytes(config, sizes, on, streams=streams) - round((1 - share) * experts.all_bytes),
        advice=kept.advice,
    )


class Bounds(NamedTuple):
    """What no program exceeds on a machine of such peaks, in tokens a second of all sequences: of decoding, and of a
    prompt of the context's length; and bytes and operations of a decoded token that decide it."""

    decode: float
    prompt: float
    bytes_per_token: float
    operations_per_token: float


def bounds(config: ModelConfig, sizes: StoredSizes, on: Circumstances) -> Bounds | None:
    """None where no peaks are known. Experts on disk are counted as if they were in memory."""
    if on.peaks is None:
        return None
    step = decode_load(config, sizes, context=on.context, batch=on.batch)
    length = max(_prompts(config, on))
    prompt = prefill_load(config, sizes, num_tokens=length, chunk=length)
    return Bounds(
        on.batch / bound_seconds(step, on.peaks),
        length / bound_seconds(prompt, on.peaks),
        step.num_bytes / on.batch,
        step.operations / on.batch,
    )


def _resident_speeds(
    config: ModelConfig, sizes: StoredSizes, on: Circumstances, speed: SpeedModel
) -> tuple[dict[str, TrafficSpeed], dict[int, TokenTime]]:
    """Of each token. Nothing is read from disk, so all traffic is alike."""
    step = decode_load(config, sizes, context=on.context, batch=on.batch, cache_bytes=on.cache_bytes)
    token = TokenTime(speed.decode_seconds(step) / on.batch, 0.0, 0.0)
    prompts = {}
    for length in _prompts(config, on):
        chunk = min(length, default_step_tokens(config))
        seconds = speed.prefill_seconds(prefill_load(config, sizes, num_tokens=length, chunk=chunk))
        prompts[length] = TokenTime(seconds / length, 0.0, 0.0)
    return {name: TrafficSpeed(1.0, token.rate, None, token) for name in TRAFFIC}, prompts


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
    operations = 2 * count_active(config).without_head
    carried = sequence_bytes(config, context)
    return StepWork(sizes.dense_bytes, carried, operations, config.num_experts_per_tok, sizes.experts)


def _room(config: ModelConfig, sizes: StoredSizes, on: Circumstances) -> _Room | None:
    """None where all experts stay in memory. Raises DoesNotFit."""
    experts, free = sizes.experts, on.free_bytes
    if not (sizes.can_stream and on.rates.disk):
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
    if sizes.can_stream or not sizes.experts.num_layers or not on.rates.disk:
        return ""
    streamed = forecast(config, sizes._replace(can_stream=True), on)
    if streamed.placement == "too large":
        return ""
    return f"; with its experts in records, which `--records` writes, {streamed.share:.0%} of them would be in memory"


def _prompts(config: ModelConfig, on: Circumstances) -> list[int]:
    """Those that the context holds, or what it holds, and one of what is asked for."""
    most = config.context_length - 1
    return sorted({min(n, most) for n in (*PROMPTS, on.context) if n <= max(most, on.context)} - {0})


def _carried(config: ModelConfig, on: Circumstances) -> tuple[int, int]:
    """Bytes of keys and values, and of states."""
    kv = on.batch * on.context * kv_bytes_per_token(config, with_mtp=True)
    return kv, on.batch * state_bytes_per_sequence(config).total


def _likely_bytes(config: ModelConfig, sizes: StoredSizes, on: Circumstances, *, streams: bool) -> int:
    """Of weights, sequences and the steps that an engine makes by itself, with all experts."""
    chunk = _STEPS[0] if streams else min(on.context, default_step_tokens(config))
    step = likely_step_bytes(
        config,
        StepSizes(chunk, on.batch, on.batch, on.context),
        num_threads=on.num_threads,
        streams_experts=streams,
    )
    return sizes.weight_bytes + sum(_carried(config, on)) + step


def _step(config: ModelConfig, on: Circumstances, num_tokens: int, *, streams: bool) -> int:
    sizes = StepSizes(num_tokens, on.batch, on.batch, on.context)
    return step_bytes(config, sizes, num_threads=on.num_threads, streams_experts=streams)
