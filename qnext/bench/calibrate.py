"""`qnext plan --calibrate`: small models of many forms are timed, and seconds for each unit of their steps are fitted.

None of them has the sizes of a preset. Each is made with random weights, in each precision, and forgotten.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig
from qnext.planning.calibration import Calibration
from qnext.planning.machine import cache_bytes
from qnext.planning.plan import default_step_tokens
from qnext.planning.speed_model import SpeedModel, fit_units
from qnext.planning.step_load import StepLoad, decode_load, prefill_load

SCHEMES = {"bf16": None, "int4": "int4-g32"}  # by the precision of the plan
LENGTHS = (256, 1024, 4096)
DEEP = 12_288  # of those in which keys and values decide
_PROMPT_ROUNDS = {256: 4, 1024: 2, 4096: 1, DEEP: 1}  # of which the best counts, as it does of what is decoded
_DECODED = 16  # tokens
_ROUNDS = 6
_DECODE_UNITS = (
    *("steps", "linear_layers", "full_layers", "weight_bytes", "row_numbers", "attention_operations", "kv_bytes"),
    *("state_bytes", "expert_calls", "cold_bytes", "cold_kv_bytes"),
)
_PREFILL_UNITS = (
    *("steps", "linear_layers", "full_layers", "matrix_operations", "row_numbers", "attention_operations"),
    *("delta_operations", "weight_bytes", "expert_calls"),
)


class ProbeTime(NamedTuple):
    """Of one model at one length: what a step does, and seconds."""

    kind: str
    load: StepLoad
    seconds: float


def calibrate(*, date: str, threads: int, say: Callable[[str], None]) -> Calibration:
    """Takes a minute or two on a machine that does nothing else. `say` is told the next step."""
    from qnext import ops
    from qnext.ops.limits import peak_arithmetic, read_bandwidth

    ops.set_num_threads(threads)
    say("limits of the machine")
    limits = [(read_bandwidth(), peak_arithmetic())]
    speeds, errors = {}, {}
    for precision, scheme in SCHEMES.items():
        timings = [timing for name in PROBES for timing in _timings(name, scheme, say)]
        speeds[precision] = fitted(timings)
        errors[precision] = fit_errors(speeds[precision], timings)
    limits.append((read_bandwidth(), peak_arithmetic()))
    bandwidth = max(found for found, _ in limits)
    operations = {name: max((each[name] or 0.0 for _, each in limits)) or None for name in limits[0][1]}
    source = f"{len(PROBES)} small models at {', '.join(map(str, LENGTHS))} tokens"
    return Calibration(date, source, threads, speeds, errors, bandwidth, operations, cache_bytes())


def fitted(timings: list[ProbeTime]) -> SpeedModel:
    """Decoding and prompts apart: other kernels compute them."""
    units = {}
    for kind, used in (("decode", _DECODE_UNITS), ("prefill", _PREFILL_UNITS)):
        chosen = [timing for timing in timings if timing.kind == kind]
        units[kind] = fit_units([each.load for each in chosen], [each.seconds for each in chosen], used=used)
    return SpeedModel(units["decode"], units["prefill"])


def fit_errors(speed: SpeedModel, timings: list[ProbeTime]) -> dict[str, float]:
    """Median of |predicted / measured - 1| of decoding and of prompts."""
    found: dict[str, list[float]] = {}
    for kind, load, seconds in timings:
        predicted = speed.decode_seconds(load) if kind == "decode" else speed.prefill_seconds(load)
        found.setdefault(kind, []).append(abs(predicted / seconds - 1))
    return {kind: statistics.median(values) for kind, values in found.items()}


def _timings(name: str, scheme: str | None, say: Callable[[str], None]) -> Iterator[ProbeTime]:
    from qnext.bench.speed import SpeedMeter
    from qnext.checkpoint import create_folder, load_model
    from qnext.checkpoint.check import read_layout
    from qnext.files import scratch_folder
    from qnext.quant.scheme import make_policy
    from qnext.session.planned import planned_folder

    say(f"{name}, {scheme or 'bf16'}")
    config = PROBES[name]
    policy = None if scheme is None else make_policy(scheme, head=None, is_tied=config.tie_word_embeddings)
    with scratch_folder() as scratch:
        folder = Path(scratch) / "model"
        create_folder(config, folder, seed=0, policy=policy)
        sizes = planned_folder(name, read_layout(folder)).sizes
        model = load_model(folder, check_finite=False)
    meter = SpeedMeter(model, decode_tokens=_DECODED)
    meter.prefill_seconds(LENGTHS[0])  # warms up
    for length in (*LENGTHS, *([DEEP] if name in _DEEP_PROBES else [])):
        chunk = min(length, default_step_tokens(config))
        seconds = min(meter.prefill_seconds(length) for _ in range(_PROMPT_ROUNDS[length]))
        yield ProbeTime("prefill", prefill_load(config, sizes, num_tokens=length, chunk=chunk), seconds)
        meter.decode_seconds(length)
        decoding = min(meter.decode_seconds(length) for _ in range(_ROUNDS)) / _DECODED
        load = decode_load(config, sizes, context=length + _DECODED // 2, cache_bytes=cache_bytes())
        yield ProbeTime("decode", load, decoding)


def _probe(layer_types: str, *, hidden: int, vocab: int, heads: tuple[int, int, int], **more: Any) -> ModelConfig:
    """`layer_types` has a letter a layer, L or F; `heads` are those of queries, those of keys, and their size."""
    kinds = tuple(LINEAR_ATTENTION if each == "L" else FULL_ATTENTION for each in layer_types)
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        layer_types=kinds,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        rope_theta=1e6,
        max_position_embeddings=2 * DEEP,
        **more,
    )


def _linear(key_heads: int, value_heads: int, size: int) -> dict[str, int]:
    return {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
        "linear_conv_kernel_dim": 4,
    }


def _sparse(experts: int, used: int, width: int) -> dict[str, int]:
    return {
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
    }


_DEEP_PROBES = ("grouped attention", "wide groups", "dense", "sparse")
PROBES = {
    "thin": _probe("LLLFLLLF", hidden=96, vocab=1024, heads=(4, 2, 32), **_linear(2, 4, 32), **_sparse(16, 2, 32)),
    "thin, attention alone": _probe("FFFFFF", hidden=160, vocab=2048, heads=(5, 1, 64), intermediate_size=448),
    "small, sparse": _probe(
        "LFLLF", hidden=320, vocab=6144, heads=(5, 5, 64), **_linear(5, 10, 64), **_sparse(40, 5, 96)
    ),
    "many small experts": _probe(
        "LLF", hidden=192, vocab=8192, heads=(6, 2, 64), **_linear(3, 6, 64), **_sparse(160, 10, 64)
    ),
    "grouped attention": _probe("FF", hidden=256, vocab=2048, heads=(8, 2, 64), intermediate_size=512),
    "wide groups": _probe("F", hidden=256, vocab=2048, heads=(16, 2, 128), intermediate_size=512),
    "dense": _probe("FF", hidden=1024, vocab=4096, heads=(8, 2, 128), intermediate_size=4096),
    "wide": _probe("F", hidden=2560, vocab=2048, heads=(20, 4, 128), intermediate_size=10240),
    "linear attention": _probe(
        "LL", hidden=1024, vocab=4096, heads=(8, 2, 128), **_linear(8, 16, 128), intermediate_size=2048
    ),
    "sparse": _probe("LFL", hidden=768, vocab=8192, heads=(6, 2, 128), **_linear(6, 12, 128), **_sparse(48, 6, 256)),
    "many experts": _probe(
        "FLL", hidden=512, vocab=4096, heads=(8, 1, 64), **_linear(4, 8, 64), **_sparse(192, 12, 160)
    ),
}
