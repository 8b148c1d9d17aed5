"""The mark of an answer: tilted as published, no identity of answers is lost, and only the key shows it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qnext.engine import Engine, SamplingParams
from qnext.engine.policy.watermark_key import MarkedPlaces, WatermarkKey
from qnext.engine.sampling.constraint import Constraint
from qnext.engine.sampling.grammar import GrammarCompiler
from qnext.engine.sampling.watermark import Mark, bits_of, score, tournament_weights
from qnext.errors import UsageError
from tests.engine.drafting import draft_always, make_engine, prompts_of
from tests.engine.models import NATIVE, needs_native
from tests.engine.test_guide import MODEL, text_of, vocabulary
from tests.model.models import make_in_form

KEYS = {
    "tournament": WatermarkKey(b"t" * 32),
    "green": WatermarkKey(b"g" * 32, scheme="green", delta=3.0),
}
each_scheme = pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)


def log_softmax(seed: int, size: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=size) * 2
    return (logits - logits.max()).astype(np.float32)


def test_a_tournament_of_two_layers_by_all_its_draws() -> None:
    """Four tokens are drawn, two pairs, then their winners; ties are broken evenly."""
    key, seed, ids = replace(KEYS["tournament"], layers=2), 77, np.arange(5)
    scores = log_softmax(1, 5)
    p = np.exp(scores.astype(np.float64))
    p /= p.sum()
    bits = bits_of(seed, ids)
    wanted = np.zeros(5)

    def winners(one: int, other: int, layer: int) -> list[tuple[int, float]]:
        values = [int(bits[token]) >> layer & 1 for token in (one, other)]
        if values[0] == values[1]:
            return [(one, 0.5), (other, 0.5)]
        return [(one if values[0] else other, 1.0)]

    for drawn in itertools.product(range(5), repeat=4):
        chance = math.prod(p[token] for token in drawn)
        for (left, a), (right, b) in itertools.product(winners(*drawn[:2], 0), winners(*drawn[2:], 0)):
            for token, c in winners(left, right, 1):
                wanted[token] += chance * a * b * c
    assert np.allclose(tournament_weights(scores, ids, key=key, seed=seed), wanted, rtol=1e-12, atol=1e-15)


def test_no_token_becomes_likelier_over_all_keys() -> None:
    """The mean of so many seeds lies within five of its standard errors, token by token."""
    scores, ids, number = log_softmax(2, 12), np.arange(12), 1000
    p = np.exp(scores.astype(np.float64))
    p /= p.sum()
    found = np.stack([tournament_weights(scores, ids, key=KEYS["tournament"], seed=n * 7919) for n in range(number)])
    assert (np.abs(found.mean(0) - p) <= 5 * found.std(0) / math.sqrt(number)).all()
    assert np.allclose(found.sum(1), 1.0) and found.std(0).max() > 0.05


def test_a_green_list_has_its_share() -> None:
    key, row = replace(KEYS["green"], gamma=0.25), np.zeros(40_000, dtype=np.float32)
    raised = Mark(key, 5).with_green_list(row) != 0
    assert abs(raised.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(row))
    assert (Mark(key, 6).with_green_list(row) != 0).mean() == pytest.approx(0.25, abs=0.02)


def test_a_context_counts_once() -> None:
    key = KEYS["tournament"]
    ids = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 4, 4, 4, 4, 4, 4]
    marks = MarkedPlaces(key)
    marked = [marks.seed(ids[:place]) is not None for place in range(len(ids))]
    assert marked == [False] * 4 + [True] * 5 + [False] * 2 + [True] * 4 + [False]
    for start in range(1, len(ids)):
        window = MarkedPlaces(key)
        assert [window.seed(ids[:start], tuple(ids[start:end])) is not None for end in range(start, len(ids))] == (
            marked[start:]
        ), "a window of drafts sees what single steps see"
    assert score(ids, key).num_scored == sum(marked)


# ---- in the engine ----


def params_of(key: WatermarkKey | None, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "watermark": key, **more})


def answers(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    requests = [engine.add_request(*each) for each in zip(prompts, params, strict=True)]
    while engine.has_unfinished:
        engine.step()
    return [request.output_ids for request in requests]


@needs_native
@each_scheme
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_is_the_same_drafted_or_not_and_alone_or_beside_others(key: WatermarkKey, temperature: float) -> None:
    model = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    prompts = prompts_of(model, [5, 17, 40])
    params = [params_of(key, temperature=temperature, top_k=k, seed=k) for k in (0, 5, 20)]
    plain = answers(make_engine(model, speculation=False), prompts, params)
    drafted = make_engine(model)
    draft_always(drafted, seed=1)
    assert answers(drafted, prompts, params) == plain
    alone = [answers(make_engine(model, max_num_seqs=1), [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    assert alone == plain
    unmarked = answers(make_engine(model), prompts, [replace(each, watermark=None) for each in params])
    is_changed = [one != other for one, other in zip(plain, unmarked, strict=True)]
    assert is_changed == [key.scheme == "green" or temperature > 0] * 3
    assert all(one[:4] == other[:4] for one, other in zip(plain, unmarked, strict=True)), "there is no context yet"


@needs_native
@each_scheme
def test_drafts_of_marked_answers_are_accepted_as_often(key: WatermarkKey) -> None:
    """The drafter tilts as the verifier does: a layer that knows the model drafts what will be drawn."""
    model = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    prompts = prompts_of(model, [30, 31])
    rates = []
    for chosen in (key, None):
        engine = make_engine(model)
        draft_always(engine)
        params = [params_of(chosen, max_tokens=90, temperature=0.3, seed=n) for n in range(2)]
        requests = [engine.add_request(*each) for each in zip(prompts, params, strict=True)]
        while engine.has_unfinished:
            engine.step()
        drafted = sum(request.num_drafted for request in requests)
        rates.append(sum(request.num_accepted for request in requests) / drafted)
    assert rates[0] > 0.5 * rates[1]


@each_scheme
def test_seeds_give_different_answers_that_all_show_the_key(key: WatermarkKey) -> None:
    prompt = [5, 6, 7]
    found = answers(make_engine(MODEL), [prompt] * 4, [params_of(key, max_tokens=200, seed=n) for n in range(4)])
    assert len({tuple(each) for each in found}) == 4
    for ids in found:
        assert score(ids, key).p_value < 1e-6
        assert score(ids, replace(key, secret=b"x" * 32)).p_value > 1e-3
    for ids in answers(make_engine(MODEL), [prompt] * 4, [params_of(None, max_tokens=200, seed=n) for n in range(4)]):
        assert score(ids, key).p_value > 1e-3


@each_scheme
def test_a_constraint_is_kept(key: WatermarkKey) -> None:
    grammar = GrammarCompiler(vocabulary()).compile(Constraint("regex", "[a-f]{30}[0-9]{20}"))
    engine = make_engine(MODEL)
    params = [params_of(chosen, ignore_eos=False, seed=2) for chosen in (key, None)]
    requests = [engine.add_request([5, 6], each, guide=grammar.new_state()) for each in params]
    while engine.has_unfinished:
        engine.step()
    texts = [text_of(tuple(request.output_ids)) for request in requests]
    assert all(set(text[:30]) <= set("abcdef") and text[30:].isdigit() and len(text) == 50 for text in texts)
    assert texts[0] != texts[1]


# ---- looking for it ----


@each_scheme
def test_texts_without_the_mark_are_called_marked_as_often_as_promised(key: WatermarkKey) -> None:
    """Of so many texts of random tokens, with their repetitions; five standard errors."""
    rng, number = np.random.default_rng(3), 500
    p_values = []
    for _ in range(number):
        text = rng.zipf(1.5, size=60) % 500
        p_values.append(score([*text, *text[:30], *text], key).p_value)
    for level in (0.5, 0.1, 0.01):
        share = float(np.mean(np.array(p_values) <= level))
        assert share <= level + 5 * math.sqrt(level * (1 - level) / number)
    assert np.mean(np.array(p_values) <= 0.5) > 0.35, "and not as never"


def test_too_little_text_says_nothing() -> None:
    for key in KEYS.values():
        assert score([1, 2, 3, 4], key)[1:] == (0, 0.0, 0.0, 1.0) and score([1, 2, 3, 4, 5], key).num_scored == 1


def test_the_tail_is_that_of_coins() -> None:
    key = replace(KEYS["green"], gamma=0.5)
    ids = list(range(104))
    found = score(ids, key)
    count = round(found.mean * 100)
    wanted = sum(math.comb(100, k) for k in range(count, 101)) / 2**100
    assert found.p_value == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"scheme": "red"}, "scheme"),
        ({"context": 0}, "context"),
        ({"layers": 61}, "layers"),
        ({"gamma": 1.0}, "gamma"),
        ({"delta": float("nan")}, "delta"),
        ({"layers": 2.5}, "layers"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"watermark: {named} must be"):
        WatermarkKey(b"s" * 32, **values)
    for document in (
        [],
        {},
        {"qnext_watermark": 1},
        {**KEYS["green"].to_json(), "secret": "zz"},
        {"qnext_watermark": 2},
    ):
        with pytest.raises(UsageError, match="key of a watermark"):
            WatermarkKey.from_json(document)
    for key in KEYS.values():
        assert WatermarkKey.from_json(key.to_json()) == key and key.secret.hex() not in repr(key) + key.name
