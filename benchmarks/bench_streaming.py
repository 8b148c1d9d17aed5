"""How fast is a model whose experts do not fit into memory, and what bounds it?

Experts come from disk while tokens are computed. Routing is replayed: random weights route uniformly, which is the
worst case, so `diverse` and `service` traffic stand beside it (qnext/residency/traces.py). For each of them, with empty
and with warmed residents: decoding, its hit rate beside the simulator's, the bytes that had to be read for a token, the
ceiling that the disk sets (its speed over those bytes, measured in this run) and the share of it that was reached. Then
prompts. `python benchmarks/bench_streaming.py FOLDER --expert-memory 12G`; with `--own` the model's routers decide, and
the next layer's are asked a layer early, which a trace of independent layers cannot show.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _pair import Contestants, Step, print_json

import torch
from _mapped import MAPPED, Figure, compare
from torch import Tensor, nn

from qnext import ops
from qnext.bench.llama import LlamaBench, find_tools
from qnext.bench.plan import LLAMA_CPP, QNEXT
from qnext.checkpoint import load_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.streamed import plan_residency, streamable
from qnext.cli.flags.values import human_int
from qnext.engine import Engine, EngineConfig, Request, SamplingParams
from qnext.engine.execution.executor import StepOutput
from qnext.engine.policy.step import StepPlan
from qnext.errors import QnextError, UsageError
from qnext.model import CausalLM, Router, RouterOutput, residency_of
from qnext.ops import keep_freed_memory
from qnext.planning.machine import format_bytes, num_allowed_cores, peak_bytes
from qnext.residency.policy import ResidentSet
from qnext.residency.probe import probe
from qnext.residency.store import HALF_LIFE
from qnext.residency.traces import RoutingTrace

_MOST_TOKENS = 8192  # of a step
_TURN_TOKENS = 32  # of an answer, and of a question
_BESIDE = """beside llama.cpp, which reads the same weights from a GGUF file: random tokens, the model's own routing.
With both forms on a disk of 80 GB:
  qnext init 80b-a3b S32 --layers 32 --scheme int4-g32 --records --no-mtp
  qnext convert S32 S32.gguf --type q4_0
  python benchmarks/bench_streaming.py S32 --peer llama.cpp --gguf S32.gguf --memory 16G
"""


class ReplayedRouter(nn.Module):
    """Computes what a router computes, and sends tokens to the experts of a trace."""

    def __init__(self, router: Router, layer: int, num_experts: int) -> None:
        super().__init__()
        self.router, self.layer, self.num_experts = router, layer, num_experts
        self.top_k = router.top_k
        self._experts = torch.zeros(_MOST_TOKENS, router.top_k, dtype=torch.int64)

    def follow(self, preset: str) -> None:
        self._trace = RoutingTrace(preset, num_experts=self.num_experts, top_k=self.top_k, layer=self.layer)

    def draw(self, num_tokens: int) -> None:
        """What the next tokens use, before anybody looks at the clock."""
        self._drawn = torch.from_numpy(self._trace.take(num_tokens))

    def advance(self, num_tokens: int) -> None:
        """Before each step: the memory stays where it is, so that recorded steps read it."""
        now, self._drawn = self._drawn[:num_tokens], self._drawn[num_tokens:]
        self._experts[:num_tokens] = now

    def warm(self, preset: str, slots: int, num_tokens: int) -> list[tuple[int, int]]:
        """Residents after so many tokens of the trace, which goes on from there, and then the other experts."""
        self.follow(preset)
        residents = ResidentSet(self.num_experts, slots, half_life=HALF_LIFE)
        for row in self._trace.take(num_tokens):
            residents.use(row.tolist(), [1] * self.top_k, num_tokens=1)
        return [*residents.residents(), *residents.others()]

    def forward(self, x_TD: Tensor, *, load_E: Tensor | None = None, chosen_TA: Tensor | None = None) -> RouterOutput:
        logits_TE, routing = self.router(x_TD, load_E=load_E, chosen_TA=chosen_TA)
        return RouterOutput(logits_TE, ops.Routing(routing.weights_TA, self._experts[: len(x_TD)]))


class Bench:
    """One model, loaded once; each measurement begins from residents of its own."""

    def __init__(
        self,
        model: CausalLM,
        slots: Sequence[int],
        disk_bytes_per_second: float,
        *,
        replays: bool,
        conversation: int | None = None,
    ) -> None:
        residency = residency_of(model)
        assert residency is not None
        self.residency, self.slots, self.disk_rate = residency, slots, disk_bytes_per_second
        self.routers: list[ReplayedRouter] = []
        for layer in model.model.layers if replays else ():
            layer.mlp.gate = ReplayedRouter(layer.mlp.gate, len(self.routers), model.config.num_experts)
            self.routers.append(layer.mlp.gate)
        length = min(16_384 if conversation is None else conversation + 256, model.config.context_length)
        keeps_prefixes = conversation is not None
        options = EngineConfig(max_num_seqs=1, max_model_len=length, speculation=False, prefix_cache=keeps_prefixes)
        self.engine = Engine.of(model, options)
        self._execute = self.engine.executor.execute
        if replays:
            self.engine.executor.execute = self._replay  # type: ignore[method-assign]
        self.num_experts, self.top_k = model.config.num_experts, model.config.num_experts_per_tok
        self.vocab_size = model.config.vocab_size

    @property
    def resident_share(self) -> float:
        return sum(self.slots) / (len(self.slots) * self.num_experts)

    def _replay(self, plan: StepPlan) -> StepOutput:
        for router in self.routers:
            router.advance(sum(len(sequence.token_ids) for sequence in plan.sequences))
        return self._execute(plan)

    def begin(self, preset: str, *, num_warm: int, num_tokens: int) -> None:
        """Residents after `num_warm` tokens, none after none; `num_tokens` are still to come."""
        self.residency.clear()
        for number, router in enumerate(self.routers):
            router.follow(preset)
            if num_warm:
                self.residency.fill(number, router.warm(preset, self.slots[number], num_warm))
            router.draw(num_tokens)
        if num_warm and not self.routers:
            self.engine.generate([self.prompt(num_warm)], SamplingParams(max_tokens=1, ignore_eos=True))

    def prompt(self, num_tokens: int) -> list[int]:
        return torch.randint(self.vocab_size, (num_tokens,)).tolist()

    def decode(self, preset: str, *, num_tokens: int, num_warm: int, num_prompt: int = 1) -> dict[str, Any]:
        """Tokens one after the other behind a prompt, and what they took. Where the model routes itself they are drawn:
        likeliest tokens repeat themselves, and with them experts."""
        self.begin(preset, num_warm=num_warm, num_tokens=num_prompt + num_tokens)
        temperature = 0.0 if self.routers else 1.0
        params = SamplingParams(max_tokens=num_tokens + 1, ignore_eos=True, temperature=temperature)
        request = self.engine.add_request(self.prompt(num_prompt), params)
        while not request.output_ids:
            self.engine.step()
            request.raise_failure()
        before, seconds = self.residency.counts(), []
        while request.finish_reason is None:
            start = time.perf_counter()
            self.engine.step()
            seconds.append(time.perf_counter() - start)
        request.raise_failure()
        after = self.residency.counts()
        hits, misses, waited = (after[name] - before[name] for name in ("hits", "misses", "wait_ns"))
        missed_bytes = misses * self.residency.record_bytes / len(seconds)
        ceiling = self.disk_rate / missed_bytes if misses else float("inf")
        speed = len(seconds) / sum(seconds)
        state = "warm" if num_warm else "cold" if num_prompt == 1 else f"after {num_prompt}"
        return {
            "what": f"decode {preset} {state}",
            "tokens_per_second": speed,
            "median_seconds": statistics.median(seconds),
            "hit_rate": hits / max(1, hits + misses),
            "simulated_hit_rate": self.simulate(preset, num_tokens=num_tokens, num_warm=num_warm),
            "guesses": (guesses := after["guesses"] - before["guesses"]),
            "right_guesses": (after["guesses_used"] - before["guesses_used"]) / max(1, guesses),
            "missed_bytes_per_token": missed_bytes,
            "waited_seconds_per_token": waited / 1e9 / len(seconds),
            "io_ceiling": ceiling,
            "share_of_ceiling": speed / ceiling,
        }

    def simulate(self, preset: str, *, num_tokens: int, num_warm: int) -> float:
        """Hit rate of the policy alone, on the same trace; 0 where there is none."""
        hits = 0
        if not self.routers:
            return 0.0
        for layer, slots in enumerate(self.slots):
            trace = RoutingTrace(preset, num_experts=self.num_experts, top_k=self.top_k, layer=layer)
            residents = ResidentSet(self.num_experts, slots, half_life=HALF_LIFE)
            for number, row in enumerate(trace.take(num_warm + 1 + num_tokens)):
                found = residents.use(row.tolist(), [1] * self.top_k, num_tokens=1)
                hits += found if number > num_warm else 0
        return hits / (len(self.slots) * num_tokens * self.top_k)

    def _finish(self, request: Request) -> float:
        """Seconds until it has ended. Raises what else ended it."""
        start = time.perf_counter()
        while request.finish_reason is None:
            self.engine.step()
        request.raise_failure()
        return time.perf_counter() - start

    def prefill(self, preset: str, *, num_tokens: int, num_warm: int) -> dict[str, Any]:
        """A prompt up to its first token."""
        self.begin(preset, num_warm=num_warm, num_tokens=num_tokens)
        before = self.residency.counts()
        request = self.engine.add_request(self.prompt(num_tokens), SamplingParams(max_tokens=1, ignore_eos=True))
        seconds = self._finish(request)
        after = self.residency.counts()
        names = ("reads", "sweep_wait_ns", "guesses", "guesses_used")
        reads, waited, guesses, used = (after[name] - before[name] for name in names)
        ceiling = num_tokens * self.disk_rate / max(1, reads * self.residency.record_bytes)
        return {
            "what": f"prefill {num_tokens} {preset}{' warm' if num_warm else ' cold'}",
            "tokens_per_second": num_tokens / seconds,
            "seconds": seconds,
            "read_bytes": reads * self.residency.record_bytes,
            "waited_seconds": waited / 1e9,
            "wrong_guesses": guesses - used,
            "io_ceiling": ceiling,
            "share_of_ceiling": num_tokens / seconds / ceiling,
        }

    def second_turn(self, preset: str, *, conversation: int, num_warm: int) -> dict[str, Any]:
        """A prompt of that length with a short answer, then some more tokens: up to their first token."""
        self.begin(preset, num_warm=num_warm, num_tokens=conversation + 2 * _TURN_TOKENS)
        history = self.prompt(conversation)
        request = self.engine.add_request(history, SamplingParams(max_tokens=_TURN_TOKENS, ignore_eos=True))
        self._finish(request)
        before = self.residency.counts()
        history += [*request.output_ids, *self.prompt(_TURN_TOKENS)]
        request = self.engine.add_request(history, SamplingParams(max_tokens=1, ignore_eos=True))
        seconds = self._finish(request)
        reads = self.residency.counts()["reads"] - before["reads"]
        return {
            "what": f"second turn after {conversation} {preset}",
            "seconds": seconds,
            "cached_tokens": request.num_cached_tokens,
            "new_tokens": len(history) - request.num_cached_tokens,
            "read_bytes": reads * self.residency.record_bytes,
        }


def open_bench(
    folder: str,
    *,
    expert_memory: int | None,
    disk_bytes_per_second: float,
    replays: bool,
    conversation: int | None = None,
) -> Bench:
    """Raises UsageError where all experts fit into memory."""
    layout = read_layout(folder)
    plan = plan_residency(layout, expert_memory=expert_memory)
    if plan is None:
        raise UsageError("all experts fit into memory: give --expert-memory")
    start = time.perf_counter()
    model = load_model(layout, residency=plan, check_finite=False)
    print(f"dense weights loaded in {time.perf_counter() - start:.1f} s")
    bench = Bench(model, plan.slots, disk_bytes_per_second, replays=replays, conversation=conversation)
    memory = f"{format_bytes(bench.residency.nbytes)}, {bench.resident_share:.1%}"
    print(f"experts in memory: {memory}; {bench.engine.memory_plan.describe()}", flush=True)
    return bench


def own_worker(*, threads: int, num_tokens: int, **arguments: Any) -> Step:
    """Answers a figure with its row. The prompt before it fills the memory for experts; llama-bench too warms up with
    a prompt, and decodes behind one."""
    ops.set_num_threads(threads)
    keep_freed_memory()
    bench = open_bench(**arguments, replays=False)

    def step(kind: str, length: int) -> dict[str, Any]:
        if kind == "prefill":
            row = bench.prefill("own", num_tokens=length, num_warm=length)
        else:
            row = bench.decode("own", num_tokens=num_tokens, num_warm=0, num_prompt=max(1, length))
        _print(row)
        return {**row, "resident_share": bench.resident_share, "peak_bytes": peak_bytes()}

    return step


def measure_alone(options: argparse.Namespace, disk_rate: float) -> dict[str, Any]:
    """Decoding with all kinds of traffic, and prompts."""
    bench = open_bench(
        options.folder,
        expert_memory=options.expert_memory,
        disk_bytes_per_second=disk_rate,
        replays=not options.own,
        conversation=options.conversation,
    )
    rows: list[dict[str, Any]] = []
    presets = ["own"] if options.own else options.presets
    for preset in presets:
        for num_warm in (0,) if options.own else (0, options.warm):
            rows.append(bench.decode(preset, num_tokens=options.tokens, num_warm=num_warm))
            _print(rows[-1])
    for num_tokens in [512, 4096] if options.prefill is None else options.prefill:
        rows.append(bench.prefill(presets[0], num_tokens=num_tokens, num_warm=0 if options.own else options.warm))
        _print(rows[-1])
    if options.conversation:
        rows.append(bench.second_turn(presets[-1], conversation=options.conversation, num_warm=options.warm))
        _print_turn(rows[-1])
    print(f"memory at its peak {format_bytes(peak_bytes())}")
    memory = {"peak_bytes": peak_bytes(), "planned_bytes": bench.engine.memory_plan.total_bytes}
    return {"resident_share": bench.resident_share, **memory, "rows": rows}


def measure_beside(options: argparse.Namespace, disk_rate: float, files: Sequence[Path]) -> dict[str, Any]:
    """Prompts, and decoding behind one as long as the first of them, beside llama.cpp."""
    lengths = [512] if options.prefill is None else options.prefill
    figures = [*(Figure("prefill", length) for length in lengths), Figure("decode", next(iter(lengths), 0))]
    program = find_tools(options.llama_cpp).bench
    llama = LlamaBench(program, options.gguf, threads=options.threads, decode_tokens=options.tokens, options=MAPPED)
    arguments = {
        "folder": options.folder,
        "expert_memory": options.expert_memory,
        "disk_bytes_per_second": disk_rate,
        "threads": options.threads,
        "num_tokens": options.tokens,
    }

    def ours(figure: Figure) -> dict[str, Any]:
        with Contestants({QNEXT: (own_worker, arguments)}) as fresh:
            return fresh.step(QNEXT, *figure)[1]

    return compare(
        ours,
        llama,
        figures,
        files=[*files, options.gguf],
        memory_bytes=options.memory,
        decode_tokens=options.tokens,
        rounds=options.rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_BESIDE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--expert-memory", type=human_int, help="bytes, such as 12G; default: what is left")
    parser.add_argument("--presets", nargs="+", default=["uniform", "diverse", "service"])
    parser.add_argument("--tokens", type=int, default=48, help="that are decoded")
    parser.add_argument("--warm", type=int, default=1500, help="tokens of the trace before a warm run")
    parser.add_argument("--prefill", type=int, nargs="*", help="lengths; default: 512 4096, beside llama.cpp 512")
    parser.add_argument(
        "--conversation", type=int, help="tokens before a second turn, which has the last kind of traffic"
    )
    parser.add_argument("--own", action="store_true", help="no replay: the routers of the model decide")
    beside = parser.add_argument_group("beside llama.cpp")
    beside.add_argument("--peer", choices=[LLAMA_CPP])
    beside.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs; default: those on the PATH")
    beside.add_argument("--gguf", type=Path, help="its file: `qnext convert FOLDER OUT.gguf --type q4_0` writes it")
    beside.add_argument("--memory", type=human_int, help="bytes for each, with its page cache; default: what is free")
    beside.add_argument("--rounds", type=int, default=2)
    beside.add_argument("--threads", type=int, default=num_allowed_cores())
    options = parser.parse_args()
    if options.peer and options.gguf is None:
        parser.error("--peer needs --gguf")
    keep_freed_memory()
    try:
        print_json(measure(options))
    except QnextError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    files = streamable(read_layout(options.folder))
    disk = probe(files)
    for reader, rate in sorted(disk.rates.items(), key=lambda item: -item[1]):
        print(f"disk  {rate / 1e9:6.2f} GB/s  {reader.kind}, {reader.depth} at once", flush=True)
    if options.peer:
        found = measure_beside(options, disk.bytes_per_second, sorted({file.path for file in files}))
    else:
        found = measure_alone(options, disk.bytes_per_second)
    rate_after = probe(files).bytes_per_second
    print(f"disk afterwards {rate_after / 1e9:.2f} GB/s")
    return {"disk_before": disk.bytes_per_second, "disk_after": rate_after, **found}


def _print(row: dict[str, Any]) -> None:
    figures = [f"{row['tokens_per_second']:8.2f} tokens/s", f"ceiling {row['io_ceiling']:8.2f}"]
    figures.append(f"reached {row['share_of_ceiling']:.0%}")
    if "hit_rate" in row:
        figures.append(f"hits {row['hit_rate']:.1%} (simulated {row['simulated_hit_rate']:.1%})")
        figures.append(f"waited {row['waited_seconds_per_token'] * 1000:.0f} ms a token")
        figures.append(f"{row['guesses']} guesses, {row['right_guesses']:.0%} right")
    else:
        figures.append(
            f"read {row['read_bytes'] / 1e9:.1f} GB, waited {row['waited_seconds']:.1f} s of {row['seconds']:.1f}"
        )
    print(f"{row['what']:<24}" + "  ".join(figures), flush=True)


def _print_turn(row: dict[str, Any]) -> None:
    tokens = f"{row['new_tokens']} new tokens, {row['cached_tokens']} from the prefix cache"
    read = f"read {row['read_bytes'] / 1e9:.1f} GB"
    print(f"{row['what']:<32}{row['seconds']:.2f} s to the first token: {tokens}, {read}")


if __name__ == "__main__":
    main()
