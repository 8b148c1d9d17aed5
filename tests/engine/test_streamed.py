"""An engine whose experts are on disk gives the bits of one that has them in memory."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qnext import ops
from qnext.checkpoint import load_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.streamed import plan_residency
from qnext.engine import Engine, EngineConfig, Request, SamplingParams
from qnext.engine.storage.fingerprint import weights_digest
from qnext.errors import UsageError
from qnext.model import CausalLM, named_weights, residency_of
from qnext.residency.store import ResidencyPlan
from tests.checkpoint.record_folders import RECORD_CONFIG, RecordForm, record_folder

pytestmark = pytest.mark.skipif(ops.instruction_set() is None, reason="records are read by the native kernels")

# The kernels serve these sizes: elsewhere bits depend on where prompts are cut, and so on the clock.
CONFIG = replace(RECORD_CONFIG, num_experts=16, num_experts_per_tok=4, head_dim=32, linear_key_head_dim=16)
OPTIONS = EngineConfig(max_num_seqs=4, max_model_len=256, num_blocks=16, num_checkpoints=4, checkpoint_interval=32)
INT4 = RecordForm("float16", 4, 32)


def plan_of(folder: Path, slots: int, *, spare: int = 5) -> ResidencyPlan:
    num_layers = sum(not layer.startswith("mtp.") for layer in read_layout(folder).records)
    return ResidencyPlan((slots,) * num_layers, spare, ops.RecordReader("io_uring", 4, is_direct=True), half_life=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "m"
    record_folder(path, INT4, config=CONFIG)
    return path


@pytest.fixture(scope="module")
def resident(folder: Path) -> CausalLM:
    return load_model(folder)


def run(model: CausalLM, seed: int) -> list[Request]:
    """Requests that come and go on an engine which is too small for them: it preempts, drafts and shares prefixes."""
    chance = random.Random(seed)
    systems = [[chance.randrange(CONFIG.vocab_size) for _ in range(length)] for length in (70, 33)]
    waiting = []
    for _ in range(6):
        prompt = chance.choice(systems) + [chance.randrange(CONFIG.vocab_size) for _ in range(chance.randrange(1, 40))]
        params = SamplingParams(max_tokens=chance.randrange(4, 20), seed=chance.randrange(99), logprobs=2)
        waiting.append((prompt, replace(params, temperature=chance.choice([0.0, 0.8]))))
    engine, requests = Engine.of(model, OPTIONS), []
    while waiting or engine.has_unfinished:
        if waiting and chance.random() < 0.4:
            requests.append(engine.add_request(*waiting.pop()))
        engine.step()
    return requests


def answers(requests: list[Request]) -> list[object]:
    return [(request.output_ids, request.sampled, request.finish_reason) for request in requests]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 100))])
def test_streamed_is_resident(folder: Path, resident: CausalLM, seed: int) -> None:
    """Drafts, preemption, shared prefixes, sampling; three of sixteen experts a layer stay in memory."""
    streamed = load_model(folder, residency=plan_of(folder, 3))
    assert streamed.is_cut_invariant and resident.is_cut_invariant
    assert answers(run(streamed, seed)) == answers(run(resident, seed))


def test_the_experts_of_mtp_stay_in_memory(folder: Path) -> None:
    streamed = load_model(folder, residency=plan_of(folder, 3))
    records = {n: weight.records for n, weight in named_weights(streamed) if isinstance(weight, ops.RecordWeight)}
    on_disk = [name for name, each in records.items() if isinstance(each, ops.StreamedExperts)]
    assert len(on_disk) == 2 * len(CONFIG.layer_types) and not any(name.startswith("mtp") for name in on_disk)


def test_a_stored_prefix_serves_both(folder: Path, resident: CausalLM) -> None:
    """Its fingerprint is that of the same weights wherever they lie."""
    few, many = (load_model(folder, residency=plan_of(folder, slots)) for slots in (2, 9))
    assert weights_digest(few) == weights_digest(many) == weights_digest(resident)


def test_a_plan_for_other_layers_is_refused(folder: Path) -> None:
    plan = plan_of(folder, 3)
    with pytest.raises(UsageError, match="experts of 4 layers lie in records, 3 are planned"):
        load_model(folder, residency=replace(plan, slots=plan.slots[:-1]))


def test_a_request_that_meets_a_bad_record_ends_alone(folder: Path, tmp_path: Path) -> None:
    """The line names file, layer and expert; whoever does not need that expert gets his answer."""
    path = tmp_path / "m"
    record_folder(path, INT4, config=CONFIG)
    streamed = load_model(path, residency=plan_of(path, 1))
    layer = read_layout(path).records["model.layers.1"]
    with layer.records.file.open("r+b") as file:
        for expert in range(1, CONFIG.num_experts):
            file.seek(layer.records.start + expert * layer.layout.stride + 7)
            file.write(b"harm")
    engine = Engine.of(streamed, replace(OPTIONS, speculation=False))
    request = engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=4))
    while engine.has_unfinished:
        engine.step()
    assert request.finish_reason == "error" and request.failure is not None
    assert f"{layer.records.file}: model.layers.1, expert" in str(request.failure), request.failure
    assert torch.isfinite(streamed.lm_head.weight).all()


def test_metrics_tell_of_hits_misses_and_bytes(folder: Path, resident: CausalLM) -> None:
    """Every use of an expert is a hit or a miss; what is read is misses, and what a long prompt reads ahead."""
    streamed = load_model(folder, residency=plan_of(folder, 3))
    residency = residency_of(streamed)
    assert residency is not None
    engine = Engine.of(streamed, replace(OPTIONS, speculation=False))
    num_layers, stride = len(CONFIG.layer_types), residency.record_bytes
    start = engine.metrics.experts
    assert start is not None and (start.all_hits, start.all_misses, start.bytes_read) == (0, 0, 0)
    assert (start.num_resident, start.num_experts) == (3 * num_layers, 16 * num_layers)
    assert start.memory_bytes == residency.nbytes >= (3 * num_layers + 5) * stride and start.hit_ratio is None

    request = engine.add_request(list(range(1, 81)), SamplingParams(max_tokens=9, ignore_eos=True))
    while not request.output_ids:
        engine.step()
    prompt = engine.metrics.experts
    assert prompt is not None and prompt.sweep_hits + prompt.sweep_misses > 8 * num_layers
    assert prompt.hits + prompt.misses <= 4 * num_layers, "at most the last token comes alone"
    assert prompt.bytes_read >= (prompt.sweep_misses + prompt.misses) * stride
    while engine.has_unfinished:
        engine.step()
    end = engine.metrics.experts
    assert end is not None
    answer = end.since(prompt)
    assert answer.hits + answer.misses == 8 * 4 * num_layers, "eight tokens, each of four experts a layer"
    assert min(answer.hits, answer.misses) > 0 and answer.bytes_read >= answer.misses * stride
    assert answer.hit_ratio == answer.hits / (8 * 4 * num_layers) and answer.seconds_waited > 0
    assert (answer.sweep_hits, answer.sweep_misses, answer.sweep_seconds_waited) == (0, 0, 0)

    later = Engine.of(streamed, OPTIONS).metrics.experts
    assert later is not None and later.all_misses == 0 and later.num_resident == end.num_resident
    assert Engine.of(resident, OPTIONS).metrics.experts is None


def test_a_step_that_fails_counts_what_it_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    record_folder(path, INT4, config=CONFIG)
    layer = read_layout(path).records["model.layers.1"]
    with layer.records.file.open("r+b") as file:
        for expert in range(CONFIG.num_experts):
            file.seek(layer.records.start + expert * layer.layout.stride + 7)
            file.write(b"harm")
    engine = Engine.of(load_model(path, residency=plan_of(path, 1)), replace(OPTIONS, speculation=False))
    engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=4))
    engine.step()
    reads = engine.metrics.experts
    assert not engine.has_unfinished and reads is not None and reads.bytes_read > 0


def test_memory_for_experts_is_planned_and_told(folder: Path, resident: CausalLM) -> None:
    """The least that is allowed; what is asked for is what is taken, and the engine's plan says so."""
    records = read_layout(folder).records["model.layers.0"].layout.stride
    num_layers = len(CONFIG.layer_types)
    planned = plan_residency(folder, expert_memory=2 * num_layers * records)
    assert planned is not None and planned.slots == (1,) * num_layers and planned.num_spare == num_layers
    assert plan_residency(folder) is None, "all of it fits"
    engine = Engine.of(load_model(folder, residency=planned), OPTIONS)
    assert engine.memory_plan.expert_bytes == 2 * num_layers * records
    assert "experts from disk in" in engine.memory_plan.describe()
    assert "from disk" not in Engine.of(resident, OPTIONS).memory_plan.describe()


def test_memory_for_experts_needs_records(tmp_path: Path) -> None:
    record_folder(tmp_path / "m", INT4, config=CONFIG, plain=tmp_path / "plain")
    with pytest.raises(UsageError, match="--records` writes a folder where they can"):
        plan_residency(tmp_path / "plain", expert_memory=1 << 20)
