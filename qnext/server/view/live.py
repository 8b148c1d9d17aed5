"""What the page's live view shows: a document about the model, and ticks of the engine's work for all viewers.

Legend: L sparse layers, E experts.
"""

from __future__ import annotations

import asyncio
import math
import time
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from qnext.planning.expert_shape import expert_shape
from qnext.server.view.own_work import OwnWork, own_document

if TYPE_CHECKING:
    from qnext.engine import Engine, EngineMetrics, ExpertCounts, ExpertReads, Glance
    from qnext.server.expert_watch import ExpertWatch

T = TypeVar("T")

BUSY_SECONDS = 0.2  # between ticks while something happens
IDLE_SECONDS = 1.0
GLANCE_SECONDS = 1.0  # between steps that are looked at
MAX_VIEWERS = 32
MAX_VIEWERS_PER_KEY = 4  # of its own requests
_RATE_SECONDS = 2.0  # that rates are taken over: a slow model brings less than one token in a tick
_NUM_HOT = 5


class TooManyViewers(Exception):
    """The live view has reached its limit of viewers."""


class LiveHub:
    """Makes each tick once for all viewers of the same view, and none without viewers. Belongs to one event loop.

    An administrator sees the whole engine with its experts, whose load reveals something about prompts. Every other key
    sees its own requests, as `own` has them, at times that no other request changes. `watch` is the watch over the
    experts, which administrators see. `describe` adds to the document of
    `model()`: "model", "limits", "sampling", "has_chat", "thinking".
    """

    def __init__(
        self,
        engine: Engine,
        describe: Mapping[str, Any],
        *,
        own: Callable[[str], OwnWork] | None = None,
        watch: ExpertWatch | None = None,
        max_viewers: int = MAX_VIEWERS,
    ) -> None:
        self._engine = engine
        self._describe = dict(describe)
        self._own = own
        self._watch = watch
        self._max_viewers = max_viewers
        self._viewers: dict[str | None, set[Ticks]] = {}  # by whose requests they see, None is everything
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def model(self, *, key_id: str | None = None) -> bytes:
        """The document of GET /live/model."""
        view = "all" if key_id is None else "own"
        return orjson.dumps({**_model_document(self._engine), **self._describe, "view": view})

    @asynccontextmanager
    async def watch(self, *, key_id: str | None = None) -> AsyncIterator[Ticks]:
        """Ticks as they are made, each a JSON document, of the whole engine or of one key's requests.

        A slow viewer gets the newest tick and misses those before it. Raises TooManyViewers. An error while a tick is
        made is raised for every viewer.
        """
        seen = self._viewers.get(key_id, set())
        most = self._max_viewers if key_id is None else MAX_VIEWERS_PER_KEY
        if len(seen) >= most:
            raise TooManyViewers(f"{most} others look at the live view")
        ticks = Ticks()
        self._viewers.setdefault(key_id, seen).add(ticks)
        if self._is_closed:
            ticks.end(None)
        elif self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield ticks
        finally:
            seen.discard(ticks)
            if not seen:
                self._viewers.pop(key_id, None)
            if not self._viewers and self._task is not None:
                self._task.cancel()
                self._task = None

    def close(self) -> None:
        """End the ticks of every viewer, now and later, because the server stops."""
        self._is_closed = True
        self._end_all(None)

    def _end_all(self, error: Exception | None) -> None:
        for viewers in self._viewers.values():
            for viewer in viewers:
                viewer.end(error)

    async def _run(self) -> None:
        makers: dict[str | None, TickMaker | OwnTickMaker] = {}
        try:
            while True:
                now = time.monotonic()
                makers = {key_id: makers.get(key_id) or self._new_maker(key_id) for key_id in self._viewers}
                for key_id, maker in makers.items():
                    tick = maker.make(now)
                    if tick is not None:
                        for viewer in self._viewers[key_id]:
                            viewer.put(tick)
                await asyncio.sleep(BUSY_SECONDS)
        except Exception as error:
            self._task = None  # whoever comes next tries again
            self._end_all(error)

    def _new_maker(self, key_id: str | None) -> TickMaker | OwnTickMaker:
        if key_id is None:
            return TickMaker(self._engine, self._watch)
        assert self._own is not None
        return OwnTickMaker(self._own, key_id)


class Ticks:
    """The ticks of one viewer. It holds the newest tick that the viewer has not had."""

    def __init__(self) -> None:
        self._newest: bytes | None = None
        self._error: Exception | None = None
        self._is_over = False
        self._changed = asyncio.Event()

    def put(self, tick: bytes) -> None:
        self._newest = tick
        self._changed.set()

    def end(self, error: Exception | None) -> None:
        self._is_over, self._error = True, error
        self._changed.set()

    def __aiter__(self) -> Ticks:
        return self

    async def __anext__(self) -> bytes:
        await self._changed.wait()
        if self._is_over:
            raise self._error or StopAsyncIteration
        self._changed.clear()
        assert self._newest is not None
        return self._newest


class TickMaker:
    """Turns growing counters into what happened between two ticks."""

    def __init__(self, engine: Engine, watch: ExpertWatch | None = None) -> None:
        self._engine = engine
        self._watch = watch
        self._seen: tuple[Any, ...] | None = None  # what the last tick told of
        self._last = -math.inf
        self._total_LE: NDArray[np.int64] | None = None
        self._num_steps = 0
        self._rates = _Rates()
        self._reads: _Recent[tuple[ExpertReads, int]] = _Recent()
        self._asked = -math.inf
        self._glance: Glance | None = None

    def make(self, now: float) -> bytes | None:
        """The tick at `now`, in seconds of a monotonic clock.

        None where nothing is new and the last tick is less than a second old.
        """
        metrics = self._engine.metrics
        seen = (metrics.num_steps, metrics.num_requests, metrics.gauges)
        # Half of a pause early is on time: sleeps are never exact.
        if seen == self._seen and now - self._last < IDLE_SECONDS - BUSY_SECONDS / 2:
            return None
        self._seen, self._last = seen, now
        return orjson.dumps(
            {
                "step": metrics.num_steps,
                "time": time.time(),
                "view": "all",
                "rates": self._rates.at(now, metrics.output_tokens, metrics.prompt_tokens_computed),
                **_gauges(metrics),
                "prefix": {
                    "prompt_tokens_cached": metrics.prompt_tokens_cached,
                    "prompt_tokens_computed": metrics.prompt_tokens_computed,
                },
                "drafts": {"drafted": metrics.drafted_tokens, "accepted": metrics.accepted_tokens},
                "experts": self._experts(self._engine.expert_counts(0)),
                "expert_reads": self._expert_reads(now, metrics),
                "expert_watch": None if self._watch is None else self._watch.document(),
                "inside": self._inside(now),
            }
        )

    def _inside(self, now: float) -> dict[str, Any] | None:
        """Half-lives and gates of a step, where another one was looked at. One a second is asked for: the step that is
        looked at takes longer."""
        if now - self._asked < GLANCE_SECONDS:
            return None
        from qnext.engine import glance_at

        self._asked, before = now, self._glance
        self._glance = glance_at(self._engine)
        if self._glance is None or self._glance is before:
            return None
        layers = [
            {"layer": each.layer, "half_life": [_short(life) for life in each.half_lives], "gate": each.gate}
            for each in self._glance.layers
        ]
        return {"rows": self._glance.num_rows, "layers": layers}

    def _expert_reads(self, now: float, metrics: EngineMetrics) -> dict[str, float | None] | None:
        """Of the last two seconds; bytes for each token that was read or written."""
        if metrics.experts is None:
            return None
        num_tokens = metrics.output_tokens + metrics.prompt_tokens_computed
        elapsed, (before, num_before) = self._reads.push(now, (metrics.experts, num_tokens))
        reads, num_fresh = metrics.experts.since(before), num_tokens - num_before
        waited = reads.all_seconds_waited
        return {
            "hit_ratio": reads.hit_ratio,
            "bytes_per_token": reads.bytes_read / num_fresh if num_fresh else None,
            "wait_ratio": None if waited is None else min(1.0, waited / elapsed) if elapsed > 0 else 0.0,
        }

    def _experts(self, counts: ExpertCounts | None) -> dict[str, Any]:
        if counts is None:
            return {"steps": 0, "layers": []}
        total_LE = counts.total_LE
        # The first tick has nothing before it: what happened while nobody looked is no news.
        now_LE = np.zeros_like(total_LE) if self._total_LE is None else total_LE - self._total_LE
        num_steps = 0 if self._total_LE is None else counts.num_steps - self._num_steps
        self._total_LE, self._num_steps = total_LE, counts.num_steps
        return {"steps": num_steps, "layers": _layers(counts.layers, now_LE, total_LE)}


class OwnTickMaker:
    """The ticks of one key: its own requests, and nothing that depends on others."""

    def __init__(self, own: Callable[[str], OwnWork], key_id: str) -> None:
        self._own = own
        self._key_id = key_id
        self._seen: dict[str, Any] | None = None
        self._last = -math.inf
        self._rates = _Rates()

    def make(self, now: float) -> bytes | None:
        """As `TickMaker.make`."""
        work = self._own(self._key_id)
        document = own_document(work)
        if document == self._seen and now - self._last < IDLE_SECONDS - BUSY_SECONDS / 2:
            return None
        self._seen, self._last = document, now
        rates = self._rates.at(now, work.totals.output_tokens, work.totals.prompt_tokens_computed)
        return orjson.dumps({"view": "own", "time": time.time(), "rates": rates, **document})


class _Recent(Generic[T]):
    """What counters were over the last two seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, T]] = deque()

    def push(self, now: float, value: T) -> tuple[float, T]:
        """Seconds since the first value of the window, and that value."""
        self._seen.append((now, value))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _RATE_SECONDS:
            self._seen.popleft()
        start, first = self._seen[0]
        return now - start, first


class _Rates:
    """Tokens per second over the last two seconds."""

    def __init__(self) -> None:
        self._tokens: _Recent[tuple[int, int]] = _Recent()

    def at(self, now: float, written: int, read: int) -> dict[str, float]:
        """With counters that only grow."""
        elapsed, (first_written, first_read) = self._tokens.push(now, (written, read))
        return {
            "output_tokens_per_second": (written - first_written) / elapsed if elapsed > 0 else 0.0,
            "prompt_tokens_per_second": (read - first_read) / elapsed if elapsed > 0 else 0.0,
        }


def _layers(indices: list[int], now_LE: NDArray[np.int64], total_LE: NDArray[np.int64]) -> list[dict[str, Any]]:
    now_bytes_LE, load_bytes_LE = _scaled(now_LE), _scaled(total_LE)
    sum_L = total_LE.sum(axis=1)
    share_LE = total_LE / np.maximum(sum_L, 1)[:, None]
    shape = expert_shape(total_LE)
    hot_LH = _hottest(total_LE)
    hot_share_LH = np.take_along_axis(share_LE, hot_LH, axis=1)
    return [
        {
            "layer": index,
            "now": b64encode(now_bytes_LE[row].tobytes()).decode("ascii"),
            "load": b64encode(load_bytes_LE[row].tobytes()).decode("ascii"),
            "entropy": float(shape.entropy_L[row]),
            "dead": int(shape.num_dead_L[row]),
            "hot": [
                [expert, share]
                for expert, share in zip(hot_LH[row].tolist(), hot_share_LH[row].tolist(), strict=True)
                if share
            ],
        }
        for row, index in enumerate(indices)
    ]


def _hottest(total_LE: NDArray[np.int64]) -> NDArray[np.intp]:
    """[L, up to 5] the experts with most tokens, the first of them first. A full sort takes ten times as long."""
    num_hot = min(_NUM_HOT, total_LE.shape[1])
    some_LH = np.argpartition(-total_LE, num_hot - 1, axis=1)[:, :num_hot]
    order_LH = np.argsort(-np.take_along_axis(total_LE, some_LH, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some_LH, order_LH, axis=1)


def _scaled(tokens_LE: NDArray[np.int64]) -> NDArray[np.uint8]:
    """[L, E] so that the largest of each layer is 255; whoever had a token has at least 1."""
    most_L = np.maximum(tokens_LE.max(axis=1, initial=0), 1)
    return np.ceil(tokens_LE * (255 / most_L)[:, None]).clip(0, 255).astype(np.uint8)


def _short(number: float) -> float:
    """With the digits that people read: a tick is made five times a second."""
    return float(f"{number:.3g}")


def _gauges(metrics: EngineMetrics) -> dict[str, Any]:
    gauges = metrics.gauges
    return {
        "requests": {"running": gauges.num_running, "waiting": gauges.num_waiting},
        "blocks": {
            "used": gauges.num_blocks_used,
            "total": gauges.num_blocks,
            "cached": gauges.num_blocks_cached,
        },
        "slots": {
            "used": gauges.num_slots_used,
            "total": gauges.num_slots,
            "running": gauges.num_slots_running,
            "cached": gauges.num_slots_cached,
        },
    }


def _model_document(engine: Engine) -> dict[str, Any]:
    config = engine.model_config
    has_mtp = bool(config.num_nextn_predict_layers)
    layers: list[dict[str, Any]] = []
    for index, kind in enumerate(config.layer_types):
        is_sparse = config.is_moe_layer(index)
        layers.append(
            {
                "index": index,
                "kind": "delta" if kind == "linear_attention" else "attention",
                "experts": config.num_experts if is_sparse else 0,
                "top_k": config.num_experts_per_tok if is_sparse else 0,
            }
        )
    if has_mtp:
        sizes = {"experts": config.num_experts, "top_k": config.num_experts_per_tok if config.num_experts else 0}
        layers.append({"index": config.num_hidden_layers, "kind": "attention", "mtp": True, **sizes})
    streams_experts = engine.metrics.experts is not None
    return {
        "layers": layers,
        "mtp": has_mtp,
        "streams_experts": streams_experts,
        "max_model_len": engine.max_model_len,
    }
