"""What the page's live view shows: one document about the model, and ticks of its work for all who look.

Legend: L sparse layers, E experts.
"""

from __future__ import annotations

import asyncio
import math
import time
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

if TYPE_CHECKING:
    from qnext.engine import Engine, EngineMetrics, ExpertCounts

BUSY_SECONDS = 0.2  # between ticks while something happens
IDLE_SECONDS = 1.0
MAX_VIEWERS = 32
_RATE_SECONDS = 2.0  # that rates are taken over: a slow model brings less than one token in a tick
_NUM_HOT = 5


class TooManyViewers(Exception):
    """As many look at the live view as may."""


class LiveHub:
    """Makes each tick once, for all who look, and none while nobody does. Belongs to one event loop.

    `describe` adds to what the engine knows of itself in `model()`: "model", "limits", "sampling", "has_chat",
    "thinking".
    """

    def __init__(self, engine: Engine, describe: Mapping[str, Any], *, max_viewers: int = MAX_VIEWERS) -> None:
        self._engine = engine
        self._describe = dict(describe)
        self._max_viewers = max_viewers
        self._viewers: set[Ticks] = set()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def model(self) -> bytes:
        """The document of GET /live/model."""
        return orjson.dumps({**_model_document(self._engine), **self._describe})

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Ticks]:
        """Ticks as they are made, each a JSON document. Who is slow gets the newest and misses those before it.

        Raises TooManyViewers. An error in the making of a tick is raised for everyone who looks.
        """
        if len(self._viewers) >= self._max_viewers:
            raise TooManyViewers(f"{self._max_viewers} others look at the live view")
        ticks = Ticks()
        self._viewers.add(ticks)
        if self._is_closed:
            ticks.end(None)
        elif self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield ticks
        finally:
            self._viewers.discard(ticks)
            if not self._viewers and self._task is not None:
                self._task.cancel()
                self._task = None

    def close(self) -> None:
        """End the ticks of everyone, now and from here on: the server stops."""
        self._is_closed = True
        for viewer in self._viewers:
            viewer.end(None)

    async def _run(self) -> None:
        maker = TickMaker(self._engine)
        try:
            while True:
                tick = maker.make(time.monotonic())
                if tick is not None:
                    for viewer in self._viewers:
                        viewer.put(tick)
                await asyncio.sleep(BUSY_SECONDS)
        except Exception as error:
            self._task = None  # whoever comes next tries again
            for viewer in self._viewers:
                viewer.end(error)


class Ticks:
    """The ticks of one viewer; holds the newest that it has not had."""

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
    """Turns counters that grow into what happened between two ticks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: tuple[Any, ...] | None = None  # what the last tick told of
        self._last = -math.inf
        self._total_LE: NDArray[np.int64] | None = None
        self._num_steps = 0
        self._tokens: deque[tuple[float, int, int]] = deque()  # when, written, read

    def make(self, now: float) -> bytes | None:
        """The tick at `now`, in seconds of a clock that never goes back. None where nothing is new and the last tick is
        less than a second old."""
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
                "rates": self._rates(metrics, now),
                **_gauges(metrics),
                "prefix": {
                    "prompt_tokens_cached": metrics.prompt_tokens_cached,
                    "prompt_tokens_computed": metrics.prompt_tokens_computed,
                },
                "drafts": {"drafted": metrics.drafted_tokens, "accepted": metrics.accepted_tokens},
                "experts": self._experts(self._engine.expert_counts(0)),
            }
        )

    def _rates(self, metrics: EngineMetrics, now: float) -> dict[str, float]:
        self._tokens.append((now, metrics.output_tokens, metrics.prompt_tokens_computed))
        while len(self._tokens) > 2 and now - self._tokens[1][0] >= _RATE_SECONDS:
            self._tokens.popleft()
        start, written, read = self._tokens[0]
        elapsed = now - start
        return {
            "output_tokens_per_second": (metrics.output_tokens - written) / elapsed if elapsed > 0 else 0.0,
            "prompt_tokens_per_second": (metrics.prompt_tokens_computed - read) / elapsed if elapsed > 0 else 0.0,
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


def _layers(indices: list[int], now_LE: NDArray[np.int64], total_LE: NDArray[np.int64]) -> list[dict[str, Any]]:
    now_bytes_LE, load_bytes_LE = _scaled(now_LE), _scaled(total_LE)
    sum_L = total_LE.sum(axis=1)
    share_LE = total_LE / np.maximum(sum_L, 1)[:, None]
    entropy_L = _entropy(share_LE)
    dead_L = (total_LE == 0).sum(axis=1)
    hot_LH = _hottest(total_LE)
    hot_share_LH = np.take_along_axis(share_LE, hot_LH, axis=1)
    return [
        {
            "layer": index,
            "now": b64encode(now_bytes_LE[row].tobytes()).decode("ascii"),
            "load": b64encode(load_bytes_LE[row].tobytes()).decode("ascii"),
            "entropy": float(entropy_L[row]),
            "dead": int(dead_L[row]),
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


def _entropy(share_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L] over its largest possible value; 1 where no token was, as `LayerLoad` has it."""
    num_experts = share_LE.shape[1]
    if num_experts < 2:
        return np.ones(len(share_LE))
    logs_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    entropy_L: NDArray[np.float64] = -(share_LE * logs_LE).sum(axis=1) / math.log(num_experts)
    return np.where(share_LE.any(axis=1), np.clip(entropy_L, 0, 1), 1.0)


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
    config = engine.model.config
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
    return {"layers": layers, "mtp": has_mtp, "max_model_len": engine.max_model_len}
