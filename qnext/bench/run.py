"""The contest behind `qnext bench`: one model in several schemes against its peers, everything in turn.

Only one process works at a time, and at most two hold a model: qnext in one scheme, and one peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from qnext.bench.contest import Contestants, machine, ratios, spread
from qnext.bench.device import describe_device, published_limits
from qnext.bench.files import FLOAT_SCHEMES, cached_share
from qnext.bench.llama import LlamaBench
from qnext.bench.plan import LLAMA_CPP, QNEXT, TRANSFORMERS, BenchPlan
from qnext.bench.workers import limits_worker, qnext_worker, transformers_worker
from qnext.planning import forward_flops_per_token
from qnext.session.placement import CPU

_OPTIONS = ("prefill", "depths", "decode_tokens", "rounds", "long_prefill")  # of a plan, in the document
_CHUNK = 2048  # tokens of a prompt that the engine reads at once, hence with one pass over the weights


class Figure(NamedTuple):
    """One thing that is timed: a prefill of `length` tokens, decoding at that depth, or the whole engine."""

    kind: str
    length: int

    def tokens(self, plan: BenchPlan) -> int:
        return self.length if self.kind == "prefill" else plan.decode_tokens


Seconds = dict[Figure, dict[str, list[float]]]  # of each contestant, round by round
TimedStep = Callable[..., Any]  # (kind, length) -> seconds


def run_bench(plan: BenchPlan, *, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole document. `say` is told the next step."""
    results = []
    device = describe_device(plan.device)
    limits: dict[str, Any] = {} if plan.device == CPU else published_limits(device.get("device_name"))
    for scheme in plan.schemes:
        if plan.device == CPU:
            say(f"{scheme}: limits of the machine")
            limits = _better(limits, _limits(plan.threads))
        results.append(_Contest(plan, scheme, say).run())
    for result in results:
        _add_bounds(result, plan, limits)
    date = {} if plan.date is None else {"date": plan.date}
    return {
        "model": str(plan.files.model),
        "machine": {**machine(), "threads": plan.threads, **device, **date},
        "options": {name: getattr(plan, name) for name in _OPTIONS},
        "limits": limits,
        "schemes": results,
    }


class _Contest:
    """One scheme against its peers."""

    def __init__(self, plan: BenchPlan, scheme: str, say: Callable[[str], None]) -> None:
        self._plan, self._scheme, self._say = plan, scheme, say
        self._peers = plan.peers_of(scheme)
        say(f"{scheme}: files")
        self._folder = plan.files.folder_of(scheme)
        dtype = None if scheme == plan.files.stored else FLOAT_SCHEMES.get(scheme)
        self._arguments = {
            "folder": str(self._folder),
            "dtype": dtype,
            "threads": plan.threads,
            "decode_tokens": plan.decode_tokens,
        }
        self._ours = {**self._arguments, "expert_memory": plan.expert_memory, "device": plan.device}
        self._llama = self._make_llama() if LLAMA_CPP in self._peers else None

    def run(self) -> dict[str, Any]:
        loads = self._loads()
        comparisons: list[tuple[str | None, Seconds, dict[str, Any]]] = []
        with Contestants({QNEXT: (qnext_worker, self._ours)}) as ours:
            alone: list[str | None] = [None]
            for peer in self._peers or alone:
                with self._open(peer) as (step, facts):
                    steps: dict[str, TimedStep] = {QNEXT: partial(_value, ours, QNEXT)}
                    if peer is not None:
                        steps[peer] = step
                    comparisons.append((peer, self._take_turns(steps), facts()))
            generate = [_value(ours, QNEXT, "generate") for _ in range(1 + self._plan.rounds)][1:]
            long_prefill = self._long_prefill(ours)
            about = _value(ours, QNEXT, "facts")
        return self._describe(loads, comparisons, generate, long_prefill, about)

    @contextmanager
    def _open(self, peer: str | None) -> Iterator[tuple[TimedStep, Callable[[], dict[str, Any]]]]:
        """How to time a peer, and what it says of itself at the end."""
        if peer == LLAMA_CPP:
            assert self._llama is not None
            yield self._llama.step, self._llama.facts
        elif peer == TRANSFORMERS:
            with Contestants({TRANSFORMERS: (transformers_worker, self._arguments)}) as theirs:
                step = partial(_value, theirs, TRANSFORMERS)
                yield step, lambda: step("facts")
        else:
            yield lambda *_: 0.0, dict

    def _make_llama(self) -> LlamaBench:
        tools = self._plan.llama
        assert tools is not None
        gguf = self._plan.ggufs.get(self._scheme)
        if gguf is None:
            gguf = self._plan.files.gguf_of(self._scheme, llama_quantize=tools.quantize)
        return LlamaBench(tools.bench, gguf, threads=self._plan.threads, decode_tokens=self._plan.decode_tokens)

    def _figures(self) -> Iterator[Figure]:
        yield Figure("prefill", self._plan.prefill)
        for depth in self._plan.depths:
            yield Figure("decode", depth)

    def _take_turns(self, steps: dict[str, TimedStep]) -> Seconds:
        seconds: Seconds = {figure: {name: [] for name in steps} for figure in self._figures()}
        for round_ in range(1 + self._plan.rounds):
            self._say(f"{self._scheme}: {' against '.join(steps)}, " + (f"round {round_}" if round_ else "warming up"))
            for figure in self._figures():
                for name, step in steps.items():
                    if round_ == 0 and name == LLAMA_CPP:
                        continue  # each of its processes warms itself up
                    value = step(*figure)
                    if round_:
                        seconds[figure][name].append(value)
        return seconds

    def _long_prefill(self, ours: Contestants) -> float | None:
        length = self._plan.long_prefill
        if length is None:
            return None
        self._say(f"{self._scheme}: prefill of {length} tokens")
        # The sequence that was decoded at this depth began with just this.
        return _value(ours, QNEXT, "reading" if length in self._plan.depths else "prefill", length)

    def _loads(self) -> dict[str, dict[str, Any]]:
        """Fresh processes in turn, none beside another: seconds until the first logits, and the memory it took."""
        cached = cached_share(sorted(self._folder.glob("*.safetensors")))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in (QNEXT, *self._peers)}
        workers = {QNEXT: (qnext_worker, self._ours), TRANSFORMERS: (transformers_worker, self._arguments)}
        for round_ in range(self._plan.rounds):
            self._say(f"{self._scheme}: loading, round {round_ + 1}")
            for name, samples in found.items():
                if name == LLAMA_CPP:
                    assert self._llama is not None
                    samples.append(self._llama.load())
                    continue
                start = time.perf_counter()
                with Contestants({name: workers[name]}) as fresh:
                    seconds = time.perf_counter() - start
                    facts = _value(fresh, name, "facts")
                samples.append({"process_seconds": seconds, "seconds": facts["load_seconds"]})
        loads: dict[str, dict[str, Any]] = {
            name: {key: spread([sample[key] for sample in samples]) for key in samples[0]}
            for name, samples in found.items()
        }
        loads[QNEXT]["file_cache_share_before"] = cached
        return loads

    def _describe(
        self,
        loads: dict[str, dict[str, Any]],
        comparisons: list[tuple[str | None, Seconds, dict[str, Any]]],
        generate: list[float],
        long_prefill: float | None,
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        plan = self._plan
        ours = {
            figure: [value for _, seconds, _ in comparisons for value in seconds[figure][QNEXT]]
            for figure in self._figures()
        }
        ours[Figure("generate", 0)] = generate
        if long_prefill is not None:
            assert plan.long_prefill is not None
            ours[Figure("prefill", plan.long_prefill)] = [long_prefill]
        peers = []
        for peer, seconds, about in comparisons:
            if peer is not None:
                figures = [_compare(figure, plan, seconds[figure], peer) for figure in self._figures()]
                peers.append({"peer": peer, **about, "load": loads[peer], "figures": figures})
        return {
            "scheme": self._scheme,
            "kernels": facts["kernels"],
            "load": loads[QNEXT],
            "memory": _memory(facts),
            "figures": [_figure(figure, plan, values) for figure, values in ours.items()],
            "within": _within(ours, plan),
            "peers": peers,
            "facts": facts,
        }


def _value(contestants: Contestants, name: str, *arguments: Any) -> Any:
    return contestants.step(name, *arguments)[1]


def _limits(threads: int) -> dict[str, Any]:
    with Contestants({"limits": (limits_worker, {"threads": threads})}) as contestants:
        return _value(contestants, "limits")


def _better(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements of the same limits."""
    if not old:
        return new
    peaks = {
        kind: value and max(value, old["operations_per_second"][kind] or 0.0)
        for kind, value in new["operations_per_second"].items()
    }
    read = max(old["read_bytes_per_second"], new["read_bytes_per_second"])
    return {**new, "read_bytes_per_second": read, "operations_per_second": peaks}


def _rates(figure: Figure, plan: BenchPlan, seconds: list[float]) -> dict[str, float]:
    return spread([figure.tokens(plan) / value for value in seconds])


def _figure(figure: Figure, plan: BenchPlan, seconds: list[float]) -> dict[str, Any]:
    key = "tokens" if figure.kind == "prefill" else "depth"
    return {"kind": figure.kind, key: figure.length, "tokens_per_second": _rates(figure, plan, seconds)}


def _compare(figure: Figure, plan: BenchPlan, seconds: dict[str, list[float]], peer: str) -> dict[str, Any]:
    return {
        **_figure(figure, plan, seconds[QNEXT]),
        "peer_tokens_per_second": _rates(figure, plan, seconds[peer]),
        "ratio": ratios(seconds[peer], seconds[QNEXT]),
    }


def _within(ours: dict[Figure, list[float]], plan: BenchPlan) -> list[dict[str, Any]]:
    """Speeds of qnext over each other: decoding at every depth over the first, a long prefill over the short one."""
    found = []
    first = Figure("decode", plan.depths[0]) if plan.depths else None
    for figure, seconds in ours.items():
        if figure.kind == "decode" and first is not None and figure != first:
            found.append(
                {"kind": "decode", "depth": figure.length, "over": first.length, "ratio": ratios(ours[first], seconds)}
            )
        if figure.kind == "prefill" and figure.length != plan.prefill:
            short = spread(ours[Figure("prefill", plan.prefill)])["median"] / plan.prefill
            ratio = spread([short * figure.length / value for value in seconds])
            found.append({"kind": "prefill", "tokens": figure.length, "over": plan.prefill, "ratio": ratio})
    return found


def _memory(facts: dict[str, Any]) -> dict[str, Any]:
    host = {"host_peak_bytes": facts["host_peak_bytes"]} if "host_peak_bytes" in facts else {}
    return {
        **host,
        "weight_bytes": facts["weight_bytes"],
        "cache_bytes": facts["cache_bytes"],
        "peak_bytes": facts["peak_bytes"],
        "peak_bytes_loaded": facts["peak_bytes_loaded"],
        "peak_bytes_before": facts["peak_bytes_before"],
        "peak_without_caches_over_weights": (facts["peak_bytes"] - facts["cache_bytes"]) / facts["weight_bytes"],
    }


def _add_bounds(result: dict[str, Any], plan: BenchPlan, limits: dict[str, Any]) -> None:
    """What each figure must read and compute per token, and the share of known limits that it reaches."""
    facts = result.pop("facts")
    arithmetic, peak = _peak_for(result["scheme"], limits["operations_per_second"])
    bandwidth = limits["read_bytes_per_second"]
    for figure in result["figures"]:
        if figure["kind"] == "prefill":
            num_tokens = figure["tokens"]
            passes = -(-num_tokens // _CHUNK)
            num_bytes = passes * facts["prefill_weight_bytes"] / num_tokens
            head = forward_flops_per_token(plan.config, context=1) - forward_flops_per_token(
                plan.config, context=1, with_head=False
            )
            context = (num_tokens + 1) // 2  # on average
            operations = forward_flops_per_token(plan.config, context=context, with_head=False) + head / num_tokens
        else:
            context = max(figure["depth"], 1) + plan.decode_tokens // 2
            kv_bytes = context * facts["kv_bytes_per_token"]
            num_bytes = facts["decode_weight_bytes"] + kv_bytes + 2 * facts["state_bytes"]
            operations = forward_flops_per_token(plan.config, context=context)
        rate = figure["tokens_per_second"]["median"]
        figure["bound"] = {
            "bytes_per_token": num_bytes,
            "share_of_bandwidth": None if bandwidth is None else rate * num_bytes / bandwidth,
            "operations_per_token": operations,
            "arithmetic": arithmetic,
            "share_of_peak": None if peak is None else rate * operations / peak,
        }


def _peak_for(scheme: str, peaks: dict[str, float | None]) -> tuple[str, float | None]:
    """The narrowest arithmetic that serves a scheme on this machine: what a perfect kernel would use."""
    wide = ["float32"] if scheme in ("f32", "f16") else ["bfloat16", "float32"]
    wanted = wide if scheme in FLOAT_SCHEMES or "int8" not in peaks else ["int8", "float32"]
    kind = next((kind for kind in wanted if peaks[kind]), wanted[0])
    return kind, peaks[kind]
