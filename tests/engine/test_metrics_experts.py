"""Tokens of each expert are counted exactly, whatever steps they came in."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from qnext.engine import Engine, EngineConfig, Request, SamplingParams
from qnext.model import Batch, CausalLM, Router
from qnext.ops import backends
from tests.engine.counting import GREEDY, check, check_grown, check_load, make_engine
from tests.engine.drafts import GivenDrafts
from tests.engine.executors import local
from tests.engine.models import NATIVE, random_prompt, tiny_model
from tests.model.models import OneRequest, logits_of, make_in_form, make_model, next_config, random_tokens

DENSE_LAYERS = "next, any pattern, dense layers"


def play(engine: Engine, *, seed: int, with_drafts: bool) -> list[Request]:
    """Traffic with everything in it; the same for every engine of a model."""
    rng = random.Random(seed)
    requests: list[Request] = []
    system = random_prompt(80, seed=seed)
    metrics = engine.metrics
    given = GivenDrafts()
    if with_drafts:
        engine.drafter = given
    while len(requests) < 14 or engine.has_unfinished:
        if len(requests) < 14 and rng.random() < 0.5:
            head = system[: rng.choice((0, 64, 80))]
            prompt = [*head, *random_prompt(rng.randint(1, 40), seed=len(requests))]
            params = SamplingParams(
                max_tokens=rng.randint(1, 70), temperature=float(rng.random() < 0.5), seed=rng.getrandbits(9)
            )
            requests.append(engine.add_request(prompt, params))
        if requests and rng.random() < 0.05:
            engine.abort(rng.choice(requests).id)
        for request in requests:
            if with_drafts and request.output_ids and request.finish_reason is None:
                given[request.id] = tuple(rng.randrange(90) for _ in range(rng.randint(0, 3)))
        engine.step()
        before, metrics = metrics, engine.metrics
        check(metrics)
        check_grown(before, metrics)
    return requests


def model_named(name: str) -> CausalLM:
    if name == "tiny":
        return tiny_model("hybrid")
    if name == "int4":
        if backends.cpu_kernels() is None:
            pytest.skip("quantised weights lie otherwise without native kernels")
        return make_in_form(NATIVE, "int4-g32")
    return make_in_form(name, "float32")


@pytest.mark.parametrize(
    ("name", "with_drafts"),
    [
        *((NATIVE, True), (DENSE_LAYERS, False), ("int4", False), ("tiny", True)),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((NATIVE, False), (DENSE_LAYERS, True), ("int4", True), ("tiny", False))
        ),
    ],
)
def test_experts_are_counted_exactly(name: str, with_drafts: bool) -> None:
    """Against a count in Python by hooks, which keep that engine from recording its steps."""
    model = model_named(name)
    options: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 256, "num_blocks": 11, "num_checkpoints": 2}
    if with_drafts:
        options["max_draft_tokens"] = 3
    engine, executor = make_engine(model, **options)
    answers = [request.output_ids for request in play(engine, seed=10, with_drafts=with_drafts)]
    assert engine.metrics.prompt_tokens_cached
    assert engine.metrics.num_preemptions or backends.cpu_kernels() is None
    if backends.cpu_kernels() is not None and name in (NATIVE, "int4"):
        assert executor._decoding._batches, "steps are recorded while their tokens are counted"

    plain, plain_executor = make_engine(model, **options, count_experts=False)
    seen: dict[int, Counter[int]] = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda _, __, out, n=n: seen.setdefault(n, Counter()).update(out.routing.experts_TA.flatten().tolist())
        )
        for n, layer in enumerate(model.model.layers)
        if model.config.is_moe_layer(n)
    ]
    try:
        assert [request.output_ids for request in play(plain, seed=10, with_drafts=with_drafts)] == answers
    finally:
        for hook in hooks:
            hook.remove()
    assert not plain_executor._decoding._batches and plain.expert_load() is None
    for ours, theirs in zip(executor.rows, plain_executor.rows, strict=True):
        assert torch.equal(ours, theirs), "counting changes no bit"
    load = engine.expert_load()
    assert load is not None
    num_experts = model.config.num_experts
    assert {layer.layer_index: layer.tokens for layer in load.layers} == {
        n: tuple(counts[e] for e in range(num_experts)) for n, counts in seen.items()
    }
    check_load(engine, executor.num_tokens)
    assert plain.metrics.step_tokens == engine.metrics.step_tokens


def test_the_last_steps() -> None:
    model = make_in_form(NATIVE, "float32")
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=128))
    engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=80, ignore_eos=True))
    empty = engine.expert_load(3)
    assert empty is not None and (empty.num_steps, empty.num_recent_steps) == (0, 0)
    assert all(layer.num_dead == 8 and layer.entropy == 1.0 for layer in empty.layers)
    totals, recents = [empty], []
    while engine.has_unfinished:
        engine.step()
        load = engine.expert_load(1)
        assert load is not None and load.num_recent_steps == 1
        totals.append(load)
        recents.append(load)
    assert recents[0].num_steps == 1 and totals[-1].num_steps == len(recents) == 80
    for n, (before, load) in enumerate(zip(totals, recents, strict=False)):
        for old, layer in zip(before.layers, load.layers, strict=True):
            assert layer.recent == tuple(b - a for a, b in zip(old.tokens, layer.tokens, strict=True))
            assert sum(layer.recent) == 3 * (5 if n == 0 else 1)
            assert set(layer.recent) <= {0, 1} or n == 0
    for num_steps, expected in ((0, 0), (7, 7), (1000, 64)):
        last = engine.expert_load(num_steps)
        assert last is not None and last.num_recent_steps == expected
        for old, layer in zip(totals[80 - expected].layers, last.layers, strict=True):
            assert layer.recent == tuple(b - a for a, b in zip(old.tokens, layer.tokens, strict=True))


def test_entropy_and_dead_experts() -> None:
    """All scores alike: the lowest indices are chosen, three of eight."""
    model = make_model(next_config())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight.zero_()
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64))
    engine.generate([[1, 2, 3]], GREEDY)
    load = engine.expert_load()
    assert load is not None
    for layer in load.layers:
        assert sorted(layer.tokens) == [0] * 5 + [6] * 3 and layer.num_dead == 5
        assert layer.entropy == pytest.approx(torch.tensor(3.0).log().item() / torch.tensor(8.0).log().item())


def test_engines_of_one_model_count_for_themselves() -> None:
    model = make_in_form(NATIVE, "float32")
    engines = [Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64)) for _ in range(2)]
    for engine, length in zip(engines, (5, 9), strict=True):
        engine.add_request(random_prompt(length, seed=length), GREEDY)
    while any(engine.has_unfinished for engine in engines):
        for engine in engines:
            engine.step()
    logits_of(model, random_tokens(model.config, 20))  # past the engines: not counted
    check_load(engines[0], 5 + 3)
    check_load(engines[1], 9 + 3)


@torch.inference_mode()
def test_the_router_of_the_mtp_layer_counts_as_the_last_one() -> None:
    model = make_model(next_config(num_nextn_predict_layers=1))
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=64))
    mtp_index = model.config.num_hidden_layers
    assert list(local(engine).cache.expert_load) == list(range(mtp_index + 1))
    tokens_T = random_tokens(model.config, 9)
    serving = OneRequest(model, 32)
    batch = serving.batch(tokens_T)
    assert batch.cache is not None
    counted = Batch(
        batch.token_ids_T,
        batch.positions_T,
        batch.packing,
        replace(batch.cache, expert_load=local(engine).cache.expert_load),
    )
    trunk = model(counted)
    assert [int(local(engine).cache.expert_load[n].sum()) for n in range(mtp_index + 1)] == [27] * mtp_index + [0]
    model.draft_hidden(tokens_T.roll(-1), trunk, counted)
    assert int(local(engine).cache.expert_load[mtp_index].sum()) == 27
    engine.generate([[1, 2]], SamplingParams(max_tokens=1, ignore_eos=True))
    load = engine.expert_load()
    assert load is not None
    assert [sum(layer.tokens) for layer in load.layers] == [27 + 6] * mtp_index + [27]


def test_a_dense_model_has_no_experts() -> None:
    engine = Engine.of(tiny_model("dense"), EngineConfig(max_num_seqs=1, max_model_len=64))
    engine.generate([[1, 2]], GREEDY)
    assert engine.expert_load() is None and engine.metrics.output_tokens == 4
