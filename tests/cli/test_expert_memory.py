"""Verbs on a model whose experts stay on disk: the same results as from memory, and what the disk cost."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qnext import ops
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.streamed import plan_residency
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.checkpoint.record_folders import RECORD_CONFIG, RecordForm, record_folder

from .command import Capture, run

pytestmark = pytest.mark.skipif(ops.instruction_set() is None, reason="records are read by the native kernels")

CONFIG = replace(RECORD_CONFIG, num_experts=16, num_experts_per_tok=4, max_position_embeddings=256)
STRIDE, NUM_LAYERS = 12288, len(CONFIG.layer_types)
MEMORY = 6 * NUM_LAYERS * STRIDE  # of sixteen experts a layer
TEXT = "The delta rule forgets; attention does not. " * 3
STAGE = r"(\d+)% hits, ([\d.]+) MB per token, (\d+)% of the time waiting"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "streamed"
    record_folder(path, RecordForm("float16", 4, 32), config=CONFIG)
    save_tokenizer(byte_level_tokenizer(), path, model_max_length=256)
    return path


def test_an_answer_tells_what_it_read(folder: Path, capsys: Capture) -> None:
    arguments = ["generate", folder, TEXT, "--max-tokens", "12", "--ignore-eos", "--no-speculation"]
    resident = json.loads(run(capsys, *arguments, "--json").out)
    result = run(capsys, *arguments, "--json", "--expert-memory", str(MEMORY))
    found = json.loads(result.out)
    assert found["token_ids"] == resident["token_ids"] and "experts" not in resident["timings"]
    experts, timings = found["timings"]["experts"], found["timings"]
    planned = plan_residency(folder, expert_memory=MEMORY)
    assert planned is not None and experts["memory_bytes"] == MEMORY
    assert experts["resident_ratio"] == sum(planned.slots) / (16 * NUM_LAYERS)
    decode, prefill = experts["decode"], experts["prefill"]
    assert decode["hits"] + decode["misses"] == 11 * 4 * NUM_LAYERS
    assert decode["bytes_read"] >= decode["misses"] * STRIDE  # more where a likely expert was read early, and in vain
    assert decode["bytes_read"] == pytest.approx(11 * decode["bytes_per_token"])
    assert 0 < decode["wait_seconds"] < timings["decode_seconds"]
    assert prefill["hits"] + prefill["misses"] > 0 and prefill["bytes_read"] >= prefill["misses"] * STRIDE
    assert prefill["bytes_per_token"] == prefill["bytes_read"] / len(TEXT)
    assert 0 < prefill["wait_seconds"] < timings["prefill_seconds"]

    *_, line = result.err.splitlines()
    both = re.fullmatch(f"experts from disk: prompt {STAGE}; answer {STAGE}", line)
    assert both is not None, line
    assert int(both[4]) == round(100 * decode["hits"] / (decode["hits"] + decode["misses"]))
    assert float(both[5]) == pytest.approx(decode["bytes_per_token"] / 1e6, abs=0.06)
    assert "experts from disk" not in run(capsys, *arguments).err


def test_an_answer_of_one_token_has_no_rate(folder: Path, capsys: Capture) -> None:
    arguments = ["generate", folder, "a", "--max-tokens", "1", "--expert-memory", str(MEMORY)]
    assert run(capsys, *arguments).err.endswith("; answer nothing\n")
    timings = json.loads(run(capsys, *arguments, "--json").out)["timings"]
    assert timings["experts"]["decode"]["bytes_per_token"] is None


def test_a_conversation_tells_it_where_times_are_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    arguments = ["chat", folder, "--max-tokens", "5", "--expert-memory", str(MEMORY)]
    for more, count in ((["--stats"], 2), ([], 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there\nAnd again\n"))
        result = run(capsys, *arguments, *more)
        assert len(re.findall(rf"\nexperts from disk: prompt {STAGE}; answer", result.err)) == count, result.err


def test_the_load_of_experts_is_the_same_from_disk(folder: Path, capsys: Capture) -> None:
    arguments = ["experts", folder, TEXT, "--max-tokens", "5", "--json"]
    resident, streamed = (json.loads(run(capsys, *arguments, *more).out) for more in ([], ["--expert-memory", MEMORY]))
    assert streamed == resident and sum(streamed["layers"][0]["counts"]) == 4 * (len(TEXT) + 5)


def test_a_text_calibrates_experts_in_records_as_plain_ones(tmp_path: Path, capsys: Capture) -> None:
    """Layers are read one at a time, wherever their experts lie; codes in records are no weights to begin with."""
    (tmp_path / "text").write_text("The delta rule forgets; attention does not. " * 20)
    records, plain = tmp_path / "records", tmp_path / "plain"
    config = replace(CONFIG, layer_types=CONFIG.layer_types[-2:], num_experts=5)
    record_folder(records, RecordForm("bfloat16"), config=config, plain=plain)
    written = []
    for source in (records, plain):
        save_tokenizer(byte_level_tokenizer(), source, model_max_length=256)
        out = tmp_path / f"{source.name}-int4"
        result = run(capsys, "quantize", source, out, "--scheme", "int4-g32", "--text", tmp_path / "text")
        assert result.code == 0 and "perplexity" in result.out + result.err, result.err
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_damaged_record_ends_a_verb_with_a_clear_line(
    folder: Path, tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    layer = read_layout(path).records["model.layers.1"]
    with layer.records.file.open("r+b") as file:
        for expert in range(CONFIG.num_experts):
            file.seek(layer.records.start + expert * layer.layout.stride + 7)
            file.write(b"harm")
    for verb in ("generate", "experts"):
        result = run(capsys, verb, path, "Hello there", "--expert-memory", str(MEMORY))
        assert result.code == 5 and result.out == "" and "Traceback" not in result.err, result.err
        last = result.err.splitlines()[-1].removeprefix(f"qnext {verb}: {layer.records.file}: model.layers.1, expert ")
        assert re.fullmatch(r"\d+: its checksum does not agree", last), result.err
        assert not any(record.exc_info for record in caplog.records), "the message says it all"
