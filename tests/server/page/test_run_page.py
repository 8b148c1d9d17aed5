"""The page of a training run, in a browser and over plain HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from qnext.diagnostics.run_page.serving import serving
from qnext.training.health import Health
from qnext.training.metrics import ExpertStats, StepMetrics
from tests.forked import Program
from tests.server.page.conftest import Opened

HEALTH = Health(
    grad_norms={"matrix": 1.0, "router": 0.1},
    largest_grad=0.5,
    largest_grad_of="model.layers.1.mlp.gate.weight",
    activation_rms=[1.0, 2.0],
    activation_peak=[5.0, 250.0],
    router_entropy=[0.9, 0.8],
    delta_layers=[0],
    state_norm=[3.0],
    decay=[[0.9, 0.99]],
    long_memory=[0.5],
)
EXPERTS = ExpertStats([1.5, 2.0], [0, 1], [0.95, 0.9], [[6, 2, 4, 4], [8, 0, 4, 4]])


def step_line(step: int, **changes: Any) -> str:
    losses = {"loss": 5.0 / step, "mtp_loss": None, "balance": 1.0, "z_loss": 0.1, "lr": 1e-3, "grad_norm": 1.0}
    place = {"epoch": 0, "elapsed": 60.0 * step, "tokens_per_second": 900.0, "tokens": 1000 * step}
    values = {"step": step, "progress": step / 10, "was_skipped": False, "num_skipped": 0, **losses, **place, **changes}
    return json.dumps(asdict(StepMetrics(**values))) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "mine"
    run.mkdir()
    lines = [step_line(step, experts=EXPERTS, health=HEALTH) for step in (1, 2)]
    lines += [step_line(3, grad_norm=float("inf"), was_skipped=True, skipped_for="not finite", num_skipped=1)]
    lines += [json.dumps({"step": 3, "evaluation": {"bits_per_byte": 1.75}}) + "\n"]
    lines += [json.dumps({"step": 3, "sample": "<script>alert(1)</script>"}) + "\n"]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    with serving(folder, port=0) as address:
        yield address


def test_a_run_is_seen_and_followed(browser: Browser, folder: Path, address: str) -> None:
    context = browser.new_context(color_scheme="light")
    opened = Opened(context.new_page(), address)
    page = opened.page
    page.goto(address)
    page.wait_for_selector("html[data-ready]", state="attached")
    state = page.locator("#state")
    expect(state).to_have_text(re.compile(r"step 3, 1 skipped · 3,000 tokens .* 3 min so far · 7 min left"))
    assert page.locator("figure").count() >= 10
    assert page.locator("figure", has_text="Held out, bits per byte").locator("b").text_content() == "1.75"
    expect(page.locator("#experts-note")).to_have_text(re.compile("1 of 8 without a token"))
    alarms = page.locator("#layers td.alarm").all_text_contents()
    assert alarms == ["250", "1"], "the outlier and the dead expert"
    assert "model.layers.1.mlp.gate.weight" in (page.locator("#health-note").text_content() or "")
    assert page.locator("#texts pre").text_content() == "<script>alert(1)</script>"
    pixels = page.evaluate("[...document.querySelector('#load').getContext('2d').getImageData(0, 0, 4, 2).data]")
    cells = [tuple(pixels[4 * i : 4 * i + 4]) for i in range(8)]
    assert len(set(cells)) == 5 and cells[2] == cells[3] == cells[6] and cells[5] not in cells[:5], "0, 2, 4, 6, 8"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(step_line(4))
    expect(state).to_have_text(re.compile("^step 4 "))
    assert not opened.faults, "\n".join(opened.faults)
    context.close()


def ask(address: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=30)
    connection.request("GET", path, headers=headers)
    reply = connection.getresponse()
    return reply, reply.read()


def test_what_it_answers_and_refuses(folder: Path, address: str) -> None:
    reply, body = ask(address, "/")
    assert reply.status == 200 and b"run.js" in body
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert address.startswith("http://127.0.0.1:")
    for path in ("/page/run.js", "/page/chart.js", "/page/records.js", "/page/run.css", "/page/theme.css"):
        assert ask(address, path)[0].status == 200, path
    for path in ("/page/../serving.py", "/page/main.js", "/metrics.jsonl", "/page/%2e%2e/serving.py", "//etc/passwd"):
        assert ask(address, path)[0].status == 404, path
    assert ask(address, "/", Host="evil.example")[0].status == 403
    metrics = folder / "metrics.jsonl"
    head, *lines = ask(address, "/metrics")[1].decode().splitlines()
    place = json.loads(head)
    assert place["run"] == "mine" and place["next"] == metrics.stat().st_size
    assert lines == metrics.read_text().splitlines()
    with metrics.open("a") as file:
        file.write('{"step": 4, "half')
    more = f"/metrics?file={place['file']}&from={place['next']}"
    assert json.loads(ask(address, more)[1]) == place, "half a line is not given out"
    with metrics.open("a") as file:
        file.write('": 1}\n')
    assert ask(address, more)[1].decode().splitlines()[1:] == ['{"step": 4, "half": 1}']
    metrics.rename(folder / "old.jsonl")
    metrics.write_text('{"step": 1}\n')
    assert ask(address, more)[1].decode().splitlines()[1:] == ['{"step": 1}'], "another file begins anew"


def test_the_verb_prints_the_address_and_ends_by_a_signal(folder: Path) -> None:
    words = ["-m", "qnext", "watch", folder, "--port", 0]
    process = Program(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert ask(address, "/metrics")[0].status == 200
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (130, "interrupted")
