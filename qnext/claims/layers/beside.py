"""The dense layer beside llama.cpp's: the same shape and codes, the same threads, in turn.

llama.cpp computes the feed-forward of a model's last layer for the rows alone whose logits it needs. So its layer is
the difference between a file of two layers and one of a single layer, and so is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qnext.bench.contest import Contestants
from qnext.bench.llama import LlamaBench
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.gguf import export_gguf
from qnext.claims.claim import Grid, Workplace, ratio_cell
from qnext.claims.layers.meter import layers_worker
from qnext.claims.layers.shapes import DENSE_PAIR, RELEASED, layer_folder
from qnext.claims.layers.times import median_of
from qnext.claims.notebook import Measured, Point
from qnext.eval.intervals import Interval, mean_interval
from qnext.planning.machine import num_allowed_cores
from qnext.text.gguf import vocabulary_keys

_DENSE = ("dense", DENSE_PAIR)
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
        facts = {
            "layer": "second of two",
            "chunk": self.chunk,
            "decoded": self.decoded,
            "rounds": self.rounds,
            "threads": num_allowed_cores(),
        }
        return [
            Point(f"beside llama.cpp/{self.scheme}/{kind}@{depth}", facts, partial(self._measure, at, kind, depth))
            for depth in self.depths
            for kind in ("prefill", "decode")
        ]

    def _measure(self, at: Workplace, kind: str, depth: int) -> list[dict[str, float]]:
        """Seconds of a layer of both, round by round. Ours runs behind a filled cache, llama.cpp's computes its context
        first, which is not timed."""
        assert at.llama_bench is not None
        threads, rounds = num_allowed_cores(), []
        folders = {name: layer_folder(at.folder, RELEASED, name, self.scheme) for name in _DENSE}
        theirs = {
            name: LlamaBench(at.llama_bench, self._gguf(at.folder, folder), threads=threads, decode_tokens=self.decoded)
            for name, folder in folders.items()
        }
        arguments = {"folders": {name: str(folder) for name, folder in folders.items()}, "threads": threads}
        with Contestants({"qnext": (layers_worker, arguments)}) as worker:
            for number in range(self.rounds + 1):
                if kind == "prefill":
                    ours = worker.step("qnext", "chunk", _DENSE, depth, self.chunk)[1]
                    beside = {name: each.prefill_seconds(self.chunk, depth) for name, each in theirs.items()}
                else:
                    ours = median_of(worker.step("qnext", "decode", _DENSE, depth, 1, self.decoded)[1])
                    beside = {name: each.step("decode", depth) / self.decoded for name, each in theirs.items()}
                if number:
                    rounds.append({"qnext": _layer(ours), "llama.cpp": _layer(beside)})
        return rounds

    def _gguf(self, place: Path, folder: Path) -> Path:
        path = place / "layers" / RELEASED.name / f"{folder.name}.gguf"
        if not path.exists():
            keys = vocabulary_keys(folder, num_rows=read_layout(folder).config.vocab_size)
            export_gguf(folder, path, kind=_GGUF[self.scheme], tokenizer_keys=keys)
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
                ratio = mean_interval([each["llama.cpp"] / each["qnext"] for each in entry.value])
                values[f"dense_{kind}_over_llama_{depth}"] = ratio
                times = [mean_interval([each[name] for each in entry.value]).value for name in ("qnext", "llama.cpp")]
                cells = (f"{1e3 * seconds:,.1f}" for seconds in times)
                rows.append([self.scheme, kind, f"{depth:,}", *cells, ratio_cell(ratio)])
        header = ["weights", "what", "context", "qnext", "llama.cpp", "ratio"]
        title = (
            f"One dense layer beside llama.cpp's: milliseconds of {self.chunk} tokens of a prompt, and of a decoded one"
        )
        return values, [Grid(title, header, rows)] if rows else []


def _layer(seconds: Mapping[str, float]) -> float:
    return seconds[DENSE_PAIR] - seconds["dense"]
