"""The dense layer beside llama.cpp's: the same shape and codes, the same threads, in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qnext.bench.contest import Contestants
from qnext.bench.llama import LlamaBench
from qnext.checkpoint.gguf import export_gguf
from qnext.claims.claim import Grid, Workplace
from qnext.claims.layers.meter import layers_worker
from qnext.claims.layers.shapes import RELEASED, layer_folder
from qnext.claims.layers.times import median_of
from qnext.claims.notebook import Measured, Point
from qnext.eval.intervals import Interval, mean_interval
from qnext.planning.machine import num_allowed_cores
from qnext.text.gguf import vocabulary_keys

_GGUF = {"int4-g32": "q4_0", "bf16": "bf16"}


@dataclass(frozen=True)
class BesideLlama:
    """`chunk` tokens of a prompt and `decoded` tokens behind each of `depths`; nothing without llama.cpp."""

    scheme: str
    depths: tuple[int, ...]
    chunk: int = 512
    decoded: int = 12
    rounds: int = 3

    def points(self, at: Workplace) -> list[Point]:
        if at.llama_bench is None:
            return []
        facts = {"chunk": self.chunk, "decoded": self.decoded, "rounds": self.rounds, "threads": num_allowed_cores()}
        return [
            Point(f"beside llama.cpp/{self.scheme}/{kind}@{depth}", facts, partial(self._measure, at, kind, depth))
            for depth in self.depths
            for kind in ("prefill", "decode")
        ]

    def _measure(self, at: Workplace, kind: str, depth: int) -> list[dict[str, float]]:
        """Tokens/s of both, round by round. Ours runs behind a filled cache, llama.cpp's computes its context first,
        which is not timed."""
        assert at.llama_bench is not None
        threads = num_allowed_cores()
        theirs = LlamaBench(at.llama_bench, self._gguf(at.folder), threads=threads, decode_tokens=self.decoded)
        folders = {"dense": str(layer_folder(at.folder, RELEASED, "dense", self.scheme))}
        rounds = []
        with Contestants({"qnext": (layers_worker, {"folders": folders, "threads": threads})}) as worker:
            for number in range(self.rounds + 1):
                if kind == "prefill":
                    seconds = worker.step("qnext", "chunk", ("dense",), depth, self.chunk)[1]["dense"]
                    ours, beside = self.chunk / seconds, self.chunk / theirs.prefill_seconds(self.chunk, depth)
                else:
                    steps = worker.step("qnext", "decode", ("dense",), depth, 1, self.decoded)[1]
                    ours, beside = 1 / median_of(steps)["dense"], self.decoded / theirs.step("decode", depth)
                if number:
                    rounds.append({"qnext": ours, "llama.cpp": beside})
        return rounds

    def _gguf(self, place: Path) -> Path:
        kind = _GGUF[self.scheme]
        path = place / "layers" / RELEASED.name / f"dense-{kind}.gguf"
        if not path.exists():
            folder = layer_folder(place, RELEASED, "dense", self.scheme)
            export_gguf(folder, path, kind=kind, tokenizer_keys=vocabulary_keys(folder, num_rows=1024))
        return path

    def grid(self, known: Mapping[str, Measured]) -> tuple[dict[str, Interval], list[Grid]]:
        """Ratios by field, and the table; nothing where nothing was measured."""
        values: dict[str, Interval] = {}
        rows = []
        for depth in self.depths:
            for kind in ("prefill", "decode"):
                entry = known.get(f"beside llama.cpp/{self.scheme}/{kind}@{depth}")
                if entry is None:
                    continue
                ratio = mean_interval([each["qnext"] / each["llama.cpp"] for each in entry.value])
                values[f"dense_{kind}_over_llama_{depth}"] = ratio
                rates = [mean_interval([each[name] for each in entry.value]).value for name in ("qnext", "llama.cpp")]
                cells = (f"{rate:,.1f}" for rate in rates)
                rows.append(
                    [
                        self.scheme,
                        kind,
                        f"{depth:,}",
                        *cells,
                        f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})",
                    ]
                )
        header = ["weights", "what", "context", "qnext", "llama.cpp", "ratio"]
        title = "The dense layer beside llama.cpp's, one layer, tokens/s, in turn"
        return values, [Grid(title, header, rows)] if rows else []
