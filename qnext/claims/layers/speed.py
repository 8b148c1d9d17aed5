"""C3 and C4: both architectures in this program, in the released shapes, on the same machine in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from qnext.bench.contest import Contestants, Step
from qnext.claims.claim import Findings, Grid, Picture, Workplace, ratio_cell
from qnext.claims.layers.beside import BesideLlama
from qnext.claims.layers.meter import layers_worker
from qnext.claims.layers.shapes import HYBRID_KINDS, KINDS, LAYERS, Compared, layer_folder
from qnext.claims.layers.times import Line, fitted_line, median_of, step_seconds
from qnext.claims.notebook import Measured, Point
from qnext.diagnostics.charts import Axis, Curve, LineChart
from qnext.eval.intervals import Interval, mean_interval
from qnext.planning.machine import num_allowed_cores


@dataclass(frozen=True)
class LayerSpeed:
    """What is timed: `chunks` of a prompt as (context, tokens), and steps of decoding.

    Of a chunk the model's kernels compute as many tokens as an engine reads at once; the sparse layers are also timed
    on a longer chunk, in which their experts have more rows.
    """

    of: Compared
    scheme: str
    rounds: int
    chunks: tuple[tuple[int, int], ...]
    long_chunk: int
    lengths: tuple[int, int, int]  # of prompts, and of contexts of decoding
    batches: tuple[int, int]  # sequences that decode together
    step_tokens: int = 12
    in_this_process: bool = False
    suffix: str = ""  # of the fields, where a claim is not judged by this run

    def chunk_points(self, at: Workplace) -> list[Point]:
        points = [self.chunk_point(at, context, tokens, LAYERS) for context, tokens in self.chunks]
        return [*points, self.chunk_point(at, 0, self.long_chunk, ("linear", "full"))]

    def step_points(self, at: Workplace) -> list[Point]:
        return [
            Point(
                f"decode/{self.scheme}/{batch}x{context}",
                {**self._facts, "steps": self.step_tokens},
                partial(self._decode, at, batch, context),
            )
            for batch, context in self.steps
        ]

    def drafted_point(self, at: Workplace, context: int, num_rows: int) -> Point:
        """Steps of the hybrid's layers with so many rows of one sequence."""
        measure = partial(self._decode, at, 1, context, names=HYBRID_KINDS, num_rows=num_rows)
        return Point(self.drafted_name(context, num_rows), {**self._facts, "steps": self.step_tokens}, measure)

    def drafted_name(self, context: int, num_rows: int) -> str:
        return f"drafted/{self.scheme}/{num_rows} rows@{context}"

    @property
    def steps(self) -> list[tuple[int, int]]:
        return [(batch, context) for batch in self.batches for context in self.lengths]

    @property
    def _facts(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "threads": num_allowed_cores()}

    def chunk_name(self, context: int, tokens: int, *, name: str = "prefill") -> str:
        return f"{name}/{self.scheme}/{context}+{tokens}"

    def chunk_point(
        self, at: Workplace, context: int, tokens: int, layers: tuple[str, ...], *, name: str = "prefill"
    ) -> Point:
        facts = {**self._facts, "layers": list(layers)}
        measure = partial(self._chunk, at, context, tokens, layers)
        return Point(self.chunk_name(context, tokens, name=name), facts, measure)

    def _chunk(self, at: Workplace, context: int, tokens: int, names: tuple[str, ...]) -> list[dict[str, float]]:
        """Seconds of each layer, round by round."""
        with self._worker(at, names) as worker:
            worker("chunk", names, context, tokens)
            return [worker("chunk", names, context, tokens) for _ in range(self.rounds)]

    def _decode(
        self, at: Workplace, batch: int, context: int, *, names: Sequence[str] = KINDS, num_rows: int = 1
    ) -> list[dict[str, float]]:
        with self._worker(at, names) as worker:
            step = partial(worker, "decode", names, context, batch, self.step_tokens, num_rows)
            step()
            return [median_of(step()) for _ in range(self.rounds)]

    @contextmanager
    def _worker(self, at: Workplace, names: Iterable[str]) -> Iterator[Step]:
        folders = {name: str(layer_folder(at.folder, self.of, name, self.scheme)) for name in names}
        if self.in_this_process:
            yield layers_worker(folders=folders, threads=None)
            return
        arguments = {"folders": folders, "threads": num_allowed_cores()}
        with Contestants({"qnext": (layers_worker, arguments)}) as worker:
            yield lambda *step: worker.step("qnext", *step)[1]

    def prompts(self, known: Mapping[str, Measured]) -> dict[int, list[tuple[float, float]]]:
        """By length: seconds of a whole prompt for the hybrid and for the dense model, round by round."""
        lines = self.lines(known)
        linear, full, dense = self.of.layer_counts
        found: dict[int, list[tuple[float, float]]] = {}
        for length in self.lengths:
            for line in lines:
                hybrid = linear * line["linear"].prompt(length) + full * line["full"].prompt(length)
                found.setdefault(length, []).append((hybrid, dense * line["dense"].prompt(length)))
        return found

    def lines(self, known: Mapping[str, Measured]) -> list[dict[str, Line]]:
        """Of each layer, round by round; none before all chunks were timed.

        The slope is that of the chunks of the same size. The base of a sparse layer is that of the long chunk.
        """
        chunks = {chunk: known.get(self.chunk_name(*chunk)) for chunk in self.chunks}
        long = known.get(self.chunk_name(0, self.long_chunk))
        if long is None or None in chunks.values():
            return []
        found = []
        for number in range(self.rounds):
            lines = {}
            for name in LAYERS:
                points = [
                    (context + (tokens + 1) / 2, entry.value[number][name] / tokens)
                    for (context, tokens), entry in chunks.items()
                    if entry is not None
                ]
                lines[name] = fitted_line(points)
            for name in ("linear", "full"):
                seen = lines[name].slope * (self.long_chunk + 1) / 2
                lines[name] = lines[name]._replace(base=long.value[number][name] / self.long_chunk - seen)
            found.append(lines)
        return found


@dataclass(frozen=True)
class PrefillSpeed:
    """C3; and whether the dense layer that the ratio stands on is as fast as another program's."""

    runs: tuple[LayerSpeed, ...]
    beside: BesideLlama | None = None

    def points(self, at: Workplace) -> Iterable[Point]:
        beside = [] if self.beside is None else self.beside.points(at)
        return [*(point for run in self.runs for point in run.chunk_points(at)), *beside]

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        values: dict[str, Interval] = {}
        rows, lines_rows = [], []
        curves: dict[str, list[tuple[int, Interval]]] = {}
        for run in self.runs:
            for length, seconds in run.prompts(known).items():
                ratio = mean_interval([dense / hybrid for hybrid, dense in seconds])
                values[f"prefill_{_place(run, length)}"] = ratio
                curves.setdefault(run.scheme, []).append((length, ratio))
                rates = [mean_interval([length / both[side] for both in seconds]).value for side in (0, 1)]
                rows.append([run.scheme, f"{length:,}", *(f"{rate:,.1f}" for rate in rates), ratio_cell(ratio)])
            lines_rows += _line_rows(run, run.lines(known))
        grids = [
            Grid(
                "Whole models, tokens/s of a prompt: 36 linear + 12 full layers against 64 dense ones",
                ["weights", "prompt", "Qwen3-Next-80B-A3B", "Qwen3-32B", "ratio"],
                rows,
            ),
            Grid(
                "Single layers: microseconds of a token = base + slope x (tokens before it / 1,000)",
                ["weights", "layer", "base", "slope", "largest error of the line"],
                lines_rows,
            ),
        ]
        if self.beside is not None:
            ratios, more = self.beside.grid(known)
            values |= ratios
            grids += more
        pictures = [_picture("prefill", "Prefill, hybrid over dense", "tokens of the prompt", curves)] if values else []
        return Findings(_PREFILL_SETTING, values, [grid for grid in grids if grid.rows], pictures, _PREFILL_NOTES)


@dataclass(frozen=True)
class DecodeSpeed:
    """C4."""

    runs: tuple[LayerSpeed, ...]

    def points(self, at: Workplace) -> Iterable[Point]:
        return [point for run in self.runs for point in run.step_points(at)]

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        values: dict[str, Interval] = {}
        rows, layer_rows = [], []
        curves: dict[str, list[tuple[int, Interval]]] = {}
        for run in self.runs:
            for batch, context in run.steps:
                entry = known.get(f"decode/{run.scheme}/{batch}x{context}")
                if entry is None:
                    continue
                steps = [step_seconds(layers, run.of) for layers in entry.value]
                ratio = mean_interval([dense / hybrid for hybrid, dense in steps])
                values[f"decode_{'alone' if batch == run.batches[0] else 'together'}_{_place(run, context)}"] = ratio
                curves.setdefault(f"{run.scheme}, {batch} at once", []).append((context, ratio))
                rates = [mean_interval([batch / both[side] for both in steps]).value for side in (0, 1)]
                label = [run.scheme, str(batch), f"{context:,}"]
                rows.append([*label, *(f"{rate:,.2f}" for rate in rates), ratio_cell(ratio)])
                means = {name: mean_interval([each[name] for each in entry.value]).value for name in KINDS}
                layer_rows.append([*label, *(f"{1e3 * means[name]:.2f}" for name in KINDS)])
        grids = [
            Grid(
                "Whole models, tokens/s of all sequences together",
                ["weights", "sequences", "context", "Qwen3-Next-80B-A3B", "Qwen3-32B", "ratio"],
                rows,
            ),
            Grid(
                "Single layers, milliseconds of a step, the frame around a layer included",
                ["weights", "sequences", "context", *KINDS],
                layer_rows,
            ),
        ]
        pictures = [_picture("decode", "Decoding, hybrid over dense", "tokens before it", curves)] if values else []
        return Findings(_DECODE_SETTING, values, [grid for grid in grids if grid.rows], pictures)


def _line_rows(run: LayerSpeed, lines: list[dict[str, Line]]) -> list[list[str]]:
    rows = []
    for name in LAYERS if lines else ():
        base, slope = (mean_interval([getattr(line[name], part) for line in lines]).value for part in ("base", "slope"))
        error = max(line[name].error for line in lines)
        rows.append([run.scheme, name, f"{1e6 * base:,.0f}", f"{1e9 * slope:,.2f}", f"{error:.0%}"])
    return rows


def _place(run: LayerSpeed, length: int) -> str:
    """Claims are judged by the weights of `scheme`; those of other runs have it in their names."""
    return ("short", "medium", "long")[run.lengths.index(length)] + run.suffix


def _picture(name: str, title: str, x: str, curves: Mapping[str, list[tuple[int, Interval]]]) -> Picture:
    """A ratio over a length, a curve for each way."""
    drawn = [
        Curve(label, [x for x, _ in points], [y.value for _, y in points], [(y.low, y.high) for _, y in points])
        for label, points in curves.items()
    ]
    return Picture(name, title, [LineChart(title, Axis(x, is_log=True), Axis("times as fast"), drawn)])


_PREFILL_SETTING = (
    "One layer of each kind in the released shape (512 experts; the dense layer of Qwen3-32B), random weights, "
    "chunks of a prompt behind 0, 4K, 32K and 128K tokens of a filled cache, in turn in one process. A layer's time "
    "is a line in the context, so a whole prompt is its integral, and a whole model the sum of its layers. One "
    "prompt at a time: arithmetic bounds prefill on this machine, so a batch of prompts changes nothing."
)
_PREFILL_NOTES = (
    "The chunk behind 128K tokens has 256 tokens and the others 512, so its experts have fewer rows each: the slope of "
    "a full layer is a little too steep, and the ratio at 128K a little too small.",
)
_DECODE_SETTING = (
    "One layer of each kind in the released shape, and 16,384 rows of each head, random weights, behind filled "
    "caches; step by step in turn in one process, so that no layer finds its weights in a processor cache. A whole "
    "model is 36 linear and 12 full layers, or 64 dense ones, and its head of 151,936 rows. Several sequences whose "
    "keys and values exceed 1 GiB in a layer share the pages of their context; each still reads all of them."
)
