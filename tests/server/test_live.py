"""The hub behind the live view: documents, ticks, viewers."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qnext import ops
from qnext.checkpoint import load_model
from qnext.checkpoint.streamed import plan_residency
from qnext.engine import Engine, EngineConfig, ExpertCounts, ExpertReads, SamplingParams
from qnext.server.view import live
from qnext.server.view.live import LiveHub, TickMaker, TooManyViewers
from tests.checkpoint.record_folders import RECORD_CONFIG, RecordForm, record_folder
from tests.engine.models import random_prompt, tiny_model


@pytest.fixture
def engine() -> Iterator[Engine]:
    torch.manual_seed(0)
    yield Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=2, num_blocks=16))


def run(engine: Engine, num_tokens: int) -> None:
    engine.add_request(random_prompt(9, seed=1), SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()


def values(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8)


def test_the_document_tells_what_the_model_is(engine: Engine) -> None:
    hub = LiveHub(engine, {"model": "tiny", "has_chat": True, "limits": {"n": 16}})
    assert json.loads(hub.model()) == {
        "model": "tiny",
        "has_chat": True,
        "limits": {"n": 16},
        "view": "all",
        "mtp": False,
        "streams_experts": False,
        "max_model_len": engine.max_model_len,
        "layers": [
            {"index": 0, "kind": "delta", "experts": 5, "top_k": 2},
            {"index": 1, "kind": "delta", "experts": 5, "top_k": 2},
            {"index": 2, "kind": "attention", "experts": 5, "top_k": 2},
        ],
    }


def test_layers_without_experts_and_the_mtp_layer_are_told() -> None:
    config = tiny_model("hybrid").config.with_(mlp_only_layers=(1,), intermediate_size=20, num_nextn_predict_layers=1)
    fake: Any = SimpleNamespace(model_config=config, max_model_len=64, metrics=SimpleNamespace(experts=None))
    layers = json.loads(LiveHub(fake, {}).model())["layers"]
    assert [layer["experts"] for layer in layers] == [5, 0, 5, 5]
    assert layers[1]["top_k"] == 0
    assert layers[3] == {"index": 3, "kind": "attention", "mtp": True, "experts": 5, "top_k": 2}


def test_a_tick_tells_what_came_since_the_last(engine: Engine) -> None:
    run(engine, 4)
    maker = TickMaker(engine)
    first = json.loads(maker.make(0.0) or b"")
    assert first["experts"]["steps"] == 0
    assert all(not values(layer["now"]).any() for layer in first["experts"]["layers"])
    before = engine.expert_counts()
    run(engine, 3)
    tick = json.loads(maker.make(0.5) or b"")
    after = engine.expert_counts()
    assert before is not None and after is not None
    assert tick["experts"]["steps"] == after.num_steps - before.num_steps > 0
    assert tick["step"] == engine.metrics.num_steps
    fresh_LE = after.total_LE - before.total_LE
    load = engine.expert_load()
    assert load is not None
    for row, layer in enumerate(tick["experts"]["layers"]):
        now, total_E = values(layer["now"]), after.total_LE[row]
        assert layer["layer"] == after.layers[row]
        assert now.max() == 255 and now.argmax() == fresh_LE[row].argmax()
        assert ((now > 0) == (fresh_LE[row] > 0)).all()
        assert (values(layer["load"]) == np.ceil(total_E * 255 / total_E.max())).all()
        assert layer["entropy"] == pytest.approx(load.layers[row].entropy)
        assert layer["dead"] == load.layers[row].num_dead
        shares = sorted((total_E / total_E.sum())[total_E > 0], reverse=True)
        assert [share for _, share in layer["hot"]] == pytest.approx(shares[:5])
        assert all(share == pytest.approx(total_E[expert] / total_E.sum()) for expert, share in layer["hot"])


def test_the_rest_of_a_tick(engine: Engine) -> None:
    maker = TickMaker(engine)
    maker.make(0.0)
    run(engine, 5)
    tick = json.loads(maker.make(2.0) or b"")
    metrics = engine.metrics
    assert tick["rates"] == {"output_tokens_per_second": 2.5, "prompt_tokens_per_second": 4.5}
    assert tick["requests"] == {"running": 0, "waiting": 0}
    assert tick["blocks"]["total"] == 16 and tick["blocks"]["used"] == metrics.gauges.num_blocks_used
    assert tick["slots"]["total"] == metrics.gauges.num_slots
    assert tick["prefix"] == {"prompt_tokens_cached": 0, "prompt_tokens_computed": 9}
    assert tick["drafts"] == {"drafted": 0, "accepted": 0}
    assert math.isclose(tick["time"], time.time(), abs_tol=60)


def test_a_step_is_looked_at_once_a_second(engine: Engine) -> None:
    """From the second tick on that comes a second after the first; what was told is not told again."""
    maker = TickMaker(engine)
    assert json.loads(maker.make(0.0) or b"")["inside"] is None
    run(engine, 3)
    assert json.loads(maker.make(0.5) or b"")["inside"] is None
    run(engine, 2)
    inside = json.loads(maker.make(1.2) or b"")["inside"]
    layers = engine.model_config.layer_types
    assert [layer["layer"] for layer in inside["layers"]] == list(range(len(layers)))
    heads = [len(layer["half_life"]) for layer in inside["layers"]]
    assert heads == [engine.model_config.linear_num_value_heads if kind == "linear_attention" else 0 for kind in layers]
    assert all(0 < layer["gate"] < 1 for layer in inside["layers"])
    assert json.loads(maker.make(2.4) or b"")["inside"] is None


def test_ticks_are_a_second_apart_when_nothing_happens(engine: Engine) -> None:
    maker = TickMaker(engine)
    made = [maker.make(n * 0.2) is not None for n in range(11)]
    assert made == [True, False, False, False, False, True, False, False, False, False, True]
    engine.add_request(random_prompt(3, seed=2), SamplingParams(max_tokens=2))
    assert maker.make(2.2) is not None


def test_rates_come_to_rest() -> None:
    fake = FakeEngine(2, 4)
    maker = TickMaker(fake)  # type: ignore[arg-type]
    for second in range(6):
        fake.tokens += 10 if second < 2 else 0
        tick = json.loads(maker.make(float(second)) or b"")
    assert tick["rates"]["output_tokens_per_second"] == 0.0


class FakeEngine:
    """Counters that are set by hand."""

    executor = None  # nothing to look at

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.total_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.tokens = 0
        self.reads: ExpertReads | None = None
        self.num_ticks = 0
        self.failure: Exception | None = None

    @property
    def metrics(self) -> Any:
        if self.failure is not None:
            raise self.failure
        self.num_ticks += 1
        gauges = SimpleNamespace(
            num_running=1,
            num_waiting=0,
            num_blocks_used=0,
            num_blocks=0,
            num_blocks_cached=0,
            num_slots_used=0,
            num_slots=0,
            num_slots_running=0,
            num_slots_cached=0,
        )
        return SimpleNamespace(
            num_steps=self.num_ticks,
            num_requests=0,
            gauges=gauges,
            output_tokens=self.tokens,
            prompt_tokens_computed=0,
            prompt_tokens_cached=0,
            drafted_tokens=0,
            accepted_tokens=0,
            experts=self.reads,
        )

    def expert_counts(self, num_steps: int) -> ExpertCounts:
        layers = list(range(len(self.total_LE)))
        return ExpertCounts(layers, self.num_ticks, 0, self.total_LE.copy(), self.total_LE.copy())


def hub_of(fake: FakeEngine, **options: Any) -> LiveHub:
    return LiveHub(fake, {}, **options)  # type: ignore[arg-type]


def test_an_engine_that_does_not_count_experts_has_ticks_all_the_same() -> None:
    engine = Engine.of(tiny_model("dense"), EngineConfig(max_num_seqs=1, num_blocks=8))
    tick = json.loads(TickMaker(engine).make(0.0) or b"")
    assert tick["experts"] == {"steps": 0, "layers": []}


def test_reads_of_experts_are_those_of_the_last_two_seconds() -> None:
    fake = FakeEngine(2, 4)
    maker = TickMaker(fake)  # type: ignore[arg-type]
    assert json.loads(maker.make(0.0) or b"")["expert_reads"] is None
    fake.reads = reads = ExpertReads(50, 50, 7, 8, 1000, 3.0, 4.0, 5, 10, 999)
    told = []
    for second in range(1, 7):
        if second in (2, 3):
            fake.tokens += 2
            reads = replace(reads, hits=reads.hits + 3, misses=reads.misses + 1, bytes_read=reads.bytes_read + 600)
            fake.reads = reads = replace(reads, sweep_seconds_waited=4.0 + 0.25 * (second - 1))
        told.append(json.loads(maker.make(float(second)) or b"")["expert_reads"])
    nothing = {"hit_ratio": None, "bytes_per_token": None, "wait_ratio": 0.0}
    busy = {"hit_ratio": 0.75, "bytes_per_token": 300.0, "wait_ratio": 0.25}
    assert told == [nothing, busy, busy, {**busy, "wait_ratio": 0.125}, nothing, nothing]
    fake.reads = replace(reads, seconds_waited=None)  # a GPU does not tell
    assert json.loads(maker.make(7.0) or b"")["expert_reads"]["wait_ratio"] is None


@pytest.mark.skipif(ops.instruction_set() is None, reason="records are read by the native kernels")
def test_an_engine_with_experts_on_disk_tells_what_it_reads(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", RecordForm("float16", 4, 32))
    memory = 2 * len(RECORD_CONFIG.layer_types) * 12288  # two of four experts a layer
    model = load_model(tmp_path / "m", residency=plan_residency(tmp_path / "m", expert_memory=memory))
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, num_blocks=16, max_model_len=128))
    assert json.loads(LiveHub(engine, {}).model())["streams_experts"] is True
    maker = TickMaker(engine)
    maker.make(0.0)
    run(engine, 9)
    metrics = engine.metrics
    reads, told = metrics.experts, json.loads(maker.make(2.0) or b"")["expert_reads"]
    assert reads is not None and told["hit_ratio"] == reads.hit_ratio
    assert told["bytes_per_token"] == reads.bytes_read / (metrics.output_tokens + metrics.prompt_tokens_computed)
    assert reads.all_seconds_waited is not None and told["wait_ratio"] == pytest.approx(reads.all_seconds_waited / 2)


def test_one_expert_and_none_used_are_even() -> None:
    for num_experts in (1, 3):
        tick = json.loads(TickMaker(FakeEngine(2, num_experts)).make(0.0) or b"")  # type: ignore[arg-type]
        for layer in tick["experts"]["layers"]:
            assert layer["entropy"] == 1.0 and layer["dead"] == num_experts and layer["hot"] == []


def test_all_who_look_get_the_same_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BUSY_SECONDS", 0.005)
    fake = FakeEngine(1, 4)

    async def look() -> None:
        hub = hub_of(fake)
        async with hub.watch() as one, hub.watch() as two:
            first = await anext(one)
            assert first == await anext(two)
            assert fake.num_ticks == 1
            second = await anext(one)
            assert second != first and second == await anext(two)

    asyncio.run(look())


def test_nothing_is_made_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BUSY_SECONDS", 0.005)
    fake = FakeEngine(1, 4)

    async def look() -> None:
        hub = hub_of(fake)
        await asyncio.sleep(0.03)
        assert fake.num_ticks == 0
        async with hub.watch() as ticks:
            await anext(ticks)
        made = fake.num_ticks
        await asyncio.sleep(0.03)
        assert fake.num_ticks == made
        async with hub.watch() as ticks:
            assert json.loads(await anext(ticks))["experts"]["steps"] == 0
            await anext(ticks)
        assert fake.num_ticks > made

    asyncio.run(look())


def test_who_is_slow_misses_ticks_and_gets_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BUSY_SECONDS", 0.005)
    fake = FakeEngine(1, 4)

    async def look() -> None:
        async with hub_of(fake).watch() as ticks:
            first = json.loads(await anext(ticks))["step"]
            while (made := fake.num_ticks) <= first + 3:
                await asyncio.sleep(0.01)
            newest = json.loads(await anext(ticks))["step"]
            assert newest == made > first + 3
            assert json.loads(await anext(ticks))["step"] > newest

    asyncio.run(look())


def test_too_many_viewers_are_refused_and_leave_room_again() -> None:
    async def look() -> None:
        hub = hub_of(FakeEngine(1, 4), max_viewers=2)
        async with hub.watch():
            async with hub.watch():
                with pytest.raises(TooManyViewers, match="2 others"):
                    async with hub.watch():
                        pass
            async with hub.watch() as ticks:
                await anext(ticks)

    asyncio.run(look())


def test_a_failure_reaches_who_looks_and_the_next_try_works() -> None:
    fake = FakeEngine(1, 4)

    async def look() -> None:
        hub = hub_of(fake)
        fake.failure = ValueError("broken counters")
        async with hub.watch() as ticks:
            with pytest.raises(ValueError, match="broken counters"):
                await anext(ticks)
        fake.failure = None
        async with hub.watch() as ticks:
            await anext(ticks)

    asyncio.run(look())


def test_closing_ends_the_ticks_of_all() -> None:
    async def look() -> None:
        hub = hub_of(FakeEngine(1, 4))
        async with hub.watch() as ticks:
            await anext(ticks)
            hub.close()
            assert [tick async for tick in ticks] == []
        async with hub.watch() as ticks:
            assert [tick async for tick in ticks] == []

    asyncio.run(look())


def test_the_module_needs_no_torch() -> None:
    from tests.test_house import reaches

    assert "torch" not in reaches("qnext.server.view.live")
