"""A server whose experts are on a disk that fails: who needs the bytes is told, the others get their answers."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qnext import ops
from qnext.checkpoint import load_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.records import ExpertRecords
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.model import residency_of
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.checkpoint.record_folders import RECORD_CONFIG, RecordForm, record_folder

from .serving import Running, running_server

pytestmark = pytest.mark.skipif(ops.instruction_set() is None, reason="records are read by the native kernels")

CONFIG = replace(RECORD_CONFIG, num_experts=32, num_experts_per_tok=2, max_position_embeddings=256)
LAYER = "model.layers.1"
MEMORY = 4 * len(CONFIG.layer_types) * 12288  # of 32 experts a layer
PROMPTS = ("a", "Z")
NUM_TOKENS = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record_folder(tmp_path / "m", RecordForm("float16", 4, 32), config=CONFIG)
    save_tokenizer(byte_level_tokenizer(), tmp_path / "m", model_max_length=256)
    return tmp_path / "m"


def records_of(folder: Path) -> ExpertRecords:
    return read_layout(folder).records[LAYER]


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "seed": 1,
        **more,
    }


def answer(running: Running, prompt: str, **more: Any) -> Any:
    with running.client() as client:
        return client.post("/v1/completions", json=body(prompt, **more))


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def forget(running: Running) -> None:
    """No expert is in memory any more."""
    residency = residency_of(running.server.worker.engine.executor.model)
    assert residency is not None
    residency.clear()


def is_ready(running: Running) -> bool:
    with running.client() as client:
        return bool(client.get("/health/ready").status_code == 200)


def test_a_file_that_is_cut_fails_requests_and_not_the_server(folder: Path) -> None:
    """Whole and streamed answers; when the bytes are back, so are the answers."""
    options = {"expert_memory": MEMORY, "speculation": False, "prefix_cache": False}
    with running_server(folder, engine_options=options) as running:
        expected = text_of(answer(running, "a"))
        records = records_of(folder)
        whole = records.records.file.read_bytes()
        os.truncate(records.records.file, records.records.start + 100)
        forget(running)
        failed = answer(running, "a")
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error", failed.text
        assert str(folder) not in failed.text, "a client learns nothing of the machine"
        streamed = answer(running, "a", stream=True)
        events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert "error" in json.loads(events[-1] if events[-1] != "[DONE]" else events[-2]), streamed.text
        assert is_ready(running)
        with records.records.file.open("r+b") as file:
            file.write(whole)
        assert text_of(answer(running, "a")) == expected


def test_a_file_that_is_replaced_is_read_as_it_was(folder: Path) -> None:
    options = {"expert_memory": MEMORY, "speculation": False, "prefix_cache": False}
    with running_server(folder, engine_options=options) as running:
        expected = text_of(answer(running, "a"))
        file = records_of(folder).records.file
        other = file.with_name("other")
        other.write_bytes(bytes(file.stat().st_size))
        other.replace(file)
        forget(running)
        assert text_of(answer(running, "a")) == expected and is_ready(running)


def used_experts(folder: Path) -> list[NDArray[np.bool_]]:
    """Of LAYER, by each of the prompts with its answer."""
    model, found, tokenizer = load_model(folder), [], byte_level_tokenizer()
    for prompt in PROMPTS:
        engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64, speculation=False))
        engine.generate([tokenizer.encode(prompt).ids], SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
        load = engine.expert_load()
        assert load is not None and load.layers[1].layer_index == 1
        found.append(np.array(load.layers[1].tokens) > 0)
    return found


def test_only_who_needs_a_damaged_expert_fails(folder: Path) -> None:
    first, second = used_experts(folder)
    expert = int(np.flatnonzero(first & ~second)[0])
    options = {"expert_memory": MEMORY, "speculation": False, "prefix_cache": False}
    with running_server(folder, engine_options=options) as running:
        expected = text_of(answer(running, PROMPTS[1]))
        records = records_of(folder)
        with records.records.file.open("r+b") as file:
            file.seek(records.records.start + expert * records.layout.stride + 7)
            file.write(b"harm")
        forget(running)
        with ThreadPoolExecutor(4) as pool:
            needing = [pool.submit(answer, running, PROMPTS[0]) for _ in range(2)]
            others = [pool.submit(answer, running, PROMPTS[1]) for _ in range(2)]
        assert [each.result().status_code for each in needing] == [500, 500]
        assert [text_of(each.result()) for each in others] == [expected] * 2
        assert is_ready(running)
