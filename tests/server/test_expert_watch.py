"""The watch over the experts: looks, alerts that do not flap, metrics, log lines; and a server that has one."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qnext.planning.expert_alerts import ExpertThresholds
from qnext.planning.expert_baseline import ExpertBaseline
from qnext.server import expert_watch
from qnext.server.expert_watch import ExpertWatch, ExpertWatchConfig, keep_watching, release_of
from qnext.server.logs import log_to_stderr
from tests.server.serving import Running, running_server

EVEN, SKEWED = [128] * 8, [512, 256, 64, 64, 32, 32, 32, 32]  # of 512 tokens that choose two each


class Engine:
    """Only the counts of an engine: two layers of the trunk, and one that drafts and saw next to nothing."""

    def __init__(self) -> None:
        self.total_LE = np.zeros((3, 8), dtype=np.int64)

    def run(self, first: list[int], second: list[int]) -> Any:
        self.total_LE = self.total_LE + np.array([first, second, [1] * 8])
        return self.counts()

    def counts(self) -> Any:
        return SimpleNamespace(layers=[0, 1, 2], total_LE=self.total_LE.copy())


def new_watch(alerts: str, *, with_baseline: bool = True) -> ExpertWatch:
    even_BLE = np.random.default_rng(0).multinomial(128, [1 / 8] * 8, size=(60, 2))
    baseline = ExpertBaseline.of_blocks("m", (0, 1), even_BLE) if with_baseline else None
    return ExpertWatch(ExpertWatchConfig(ExpertThresholds.parse(alerts), baseline, top_k=2))


def alerted_watch() -> ExpertWatch:
    """One whose alert stands, as after two looks."""
    engine, watch = Engine(), new_watch("skew=2")
    for _ in range(2):
        watch.look(engine.run(EVEN, SKEWED))
    return watch


def values(watch: ExpertWatch) -> dict[tuple[str, ...], float]:
    families = watch.families({"model_name": "tiny"})
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "model_name")): sample.value
        for family in families
        for sample in family.samples
    }


def test_an_alert_begins_and_ends_without_flapping(caplog: pytest.LogCaptureFixture) -> None:
    """One look says nothing; between the threshold and 80 % of it an alert stays as it is."""
    engine, watch = Engine(), new_watch("skew=2,drift=0.1")
    with caplog.at_level(logging.WARNING, "qnext.experts"):
        assert not watch.look(engine.counts())
        assert watch.look(engine.run(EVEN, SKEWED))
        assert watch.alerts == []
        assert watch.look(engine.run(EVEN, SKEWED))
        assert watch.alerts == [(1, "drift"), (1, "skew")]
        for _ in range(3):
            watch.look(engine.run(EVEN, SKEWED))
        assert len(caplog.records) == 2, "nothing is told twice"
        (skew,) = [each.expert_alert for each in caplog.records if each.expert_alert["measure"] == "skew"]  # type: ignore[attr-defined]
        assert skew == {"is_on": True, "layer": 1, "measure": "skew", "value": 4.0, "threshold": 2.0}
        looks = 0
        while watch.alerts:
            watch.look(engine.run(EVEN, EVEN))
            looks += 1
        assert 4 < looks < 12  # the window is 8 looks long
    assert [each.getMessage()[:25] for each in caplog.records[2:]] == ["alert of experts ends: la"] * 2
    assert watch.num_begun == {"skew": 1, "drift": 1}


def test_a_value_at_the_threshold_does_not_flap() -> None:
    engine, watch = Engine(), new_watch("skew=2", with_baseline=False)
    turns = 0
    for step in range(60):
        before = watch.alerts
        watch.look(engine.run(EVEN, [256, 110, 110, 110, 110, 110, 109, 109] if step % 16 < 8 else [250] + [111] * 7))
        turns += watch.alerts != before
    assert turns <= 1
    assert release_of("skew", 2.0) == 1.8 and release_of("drift", 0.1) == pytest.approx(0.08)


def test_the_window_moves_on() -> None:
    """A measure is that of the last 4,096 tokens, and of no layer with too few."""
    engine, watch = Engine(), new_watch("skew=3")
    for _ in range(8):
        watch.look(engine.run(EVEN, SKEWED))
    for _ in range(8):
        assert watch.look(engine.run(SKEWED, EVEN))
    document = watch.document()
    assert document is not None and document["tokens"] == 4096
    first, second, drafting = document["layers"]
    assert (first["skew"], second["skew"]) == (4.0, 1.0)
    assert first["drift"] > 0.2 and second["drift"] == 0 and first["collapse"] > 0.1
    assert (drafting["skew"], drafting["drift"], drafting["alerts"]) == (None, None, [])
    assert first["alerts"] == ["skew"] and document["thresholds"] == {"skew": 3.0}
    json.dumps(document, allow_nan=False)


def test_metrics() -> None:
    engine, watch = Engine(), new_watch("skew=2,dead=0.5")
    assert values(watch) == {
        ("qnext_expert_alerts_total", "skew"): 0,
        ("qnext_expert_alerts_total", "dead"): 0,
        ("qnext_expert_alert_threshold", "skew"): 2,
        ("qnext_expert_alert_threshold", "dead"): 0.5,
    }
    for _ in range(2):
        watch.look(engine.run(EVEN, SKEWED))
    found = values(watch)
    assert found["qnext_expert_skew_ratio", "0"] == 1 and found["qnext_expert_skew_ratio", "1"] == 4
    assert ("qnext_expert_skew_ratio", "2") not in found
    assert found["qnext_expert_drift_ratio", "1"] > 0.3 > 0.02 > found["qnext_expert_drift_ratio", "0"]
    assert (found["qnext_expert_alert", "1", "skew"], found["qnext_expert_alert", "0", "skew"]) == (1, 0)
    assert (found["qnext_expert_alert", "1", "dead"], found["qnext_expert_dead_ratio", "1"]) == (0, 0)
    assert found["qnext_expert_alerts_total", "skew"] == 1


def test_log_lines_have_fields(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        log_to_stderr("json")
        engine, watch = Engine(), new_watch("skew=2", with_baseline=False)
        for _ in range(2):
            watch.look(engine.run(EVEN, SKEWED))
        line = json.loads(capsys.readouterr().err)
    finally:
        root.handlers[:], root.level = before
    assert line["level"] == "warning" and line["logger"] == "qnext.experts"
    assert line["expert_alert"] == {"is_on": True, "layer": 1, "measure": "skew", "value": 4.0, "threshold": 2.0}


def test_it_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_watch, "_PAUSE_SECONDS", 0.0)
    engine, watch = Engine(), new_watch("skew=2", with_baseline=False)

    async def run() -> None:
        task = asyncio.create_task(keep_watching(watch, lambda: engine.run(EVEN, SKEWED)))
        while not watch.alerts:
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())


@pytest.fixture
def watched(chat_model: Path) -> Any:
    watch = ExpertWatch(ExpertWatchConfig(ExpertThresholds.parse("skew=1.01"), None, top_k=2))
    with running_server(chat_model, expert_watch=watch) as running:
        yield running


def test_a_server_that_watches(watched: Running) -> None:
    watch = watched.server.expert_watch
    assert watch is not None
    for number in range(3):
        body = {"prompt": f"{number} " + "words " * 150, "max_tokens": 1}
        assert httpx2.post(f"{watched.url}/v1/completions", json=body, timeout=60.0).status_code == 200
        watched.call(lambda: watch.look(watched.server.worker.engine.expert_counts(0)))
    text = httpx2.get(f"{watched.url}/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert {sample.labels["layer"] for sample in found["qnext_expert_skew_ratio"].samples} >= {"0", "1"}
    assert any(sample.value for sample in found["qnext_expert_alert"].samples)
    with httpx2.stream("GET", f"{watched.url}/live/stream", timeout=60.0) as stream:
        line = next(line for line in stream.iter_lines() if line.startswith("data:"))
    assert json.loads(line[5:])["expert_watch"]["thresholds"] == {"skew": 1.01}
