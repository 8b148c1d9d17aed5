"""Constraints, deadlines and failures in the engine: each ends one request, and the others never notice."""

from __future__ import annotations

import pytest

from qnext.engine import EndEvent, Engine, EngineConfig, SamplingParams
from qnext.engine.sampling.constraint import Constraint
from qnext.engine.sampling.grammar import GrammarCompiler, Vocabulary
from qnext.errors import QnextError, UsageError
from tests.engine.models import VOCAB_SIZE, random_prompt, reference_greedy, tiny_model

EOS = 3
MODEL = tiny_model("hybrid")


def vocabulary() -> Vocabulary:
    """Digits, some letters and brackets as single bytes, the rest unused."""
    table = [b""] * VOCAB_SIZE
    for token, byte in enumerate(b'0123456789abcdef{}[]":, ', start=10):
        table[token] = bytes([byte])
    return Vocabulary(table, eos_ids={EOS}, special_ids=(), size=VOCAB_SIZE)


def text_of(vocab_ids: tuple[int, ...]) -> str:
    letters = '0123456789abcdef{}[]":, '
    return "".join(letters[t - 10] for t in vocab_ids if t != EOS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constrained_request_beside_free_ones(temperature: float) -> None:
    compiler = GrammarCompiler(vocabulary())
    grammar = compiler.compile(Constraint("regex", "[a-f]{3}[0-9]{2}"))
    engine = Engine.of(MODEL, EngineConfig(max_num_seqs=3, max_model_len=64))
    free = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [random_prompt(9, seed=n) for n in range(2)]
    others = [engine.add_request(prompt, free) for prompt in prompts]
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=5, n=2)
    guided = engine.add_requests([5, 6, 7], params, guide=grammar.new_state())
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    for request in guided:
        assert request.finish_reason == "stop" and request.output_ids[-1] == EOS
        text = text_of(tuple(request.output_ids))
        assert len(text) == 5 and set(text[:3]) <= set("abcdef") and text[3:].isdigit()
    for prompt, request in zip(prompts, others, strict=True):
        assert tuple(request.output_ids) == reference_greedy(MODEL, prompt, 12)


class Refusing:
    """Allows anything for some tokens, then fails."""

    def __init__(self, after: int) -> None:
        self.after = after

    def allowed(self) -> None:
        if self.after == 0:
            raise QnextError("no way on")

    def accept(self, token_id: int) -> None:
        self.after -= 1

    def copy(self) -> Refusing:
        return Refusing(self.after)


def test_a_failing_guide_ends_its_request_alone() -> None:
    engine = Engine.of(MODEL, EngineConfig(max_num_seqs=2, max_model_len=64))
    params = SamplingParams(max_tokens=9)
    bad = engine.add_request([5, 6], params, guide=Refusing(2))
    prompt = random_prompt(9, seed=1)
    good = engine.add_request(prompt, SamplingParams(max_tokens=9, ignore_eos=True))
    events = []
    while engine.has_unfinished:
        events += engine.step()
        engine.check_integrity()
    assert bad.finish_reason == "error" and len(bad.output_ids) == 2 and str(bad.failure) == "no way on"
    assert [e for e in events if isinstance(e, EndEvent)] == [EndEvent(bad.id, "error")]
    assert tuple(good.output_ids) == reference_greedy(MODEL, prompt, 9)
    with pytest.raises(QnextError, match="no way on"):
        list(engine._stream(engine.add_request([5, 6], params, guide=Refusing(1))))


def test_a_deadline_ends_a_request_in_any_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    engine = Engine.of(MODEL, EngineConfig(max_num_seqs=1, max_model_len=64))
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    running = engine.add_request([5, 6], params, timeout=10)
    waiting = engine.add_request([5, 7], params, timeout=5)
    patient = engine.add_request([5, 8], params)
    engine.step()
    now = 106.0
    assert EndEvent(waiting.id, "deadline") in engine.step()
    now = 111.0
    assert EndEvent(running.id, "deadline") in engine.step()
    engine.check_integrity()
    while engine.has_unfinished:
        engine.step()
    assert patient.finish_reason == "length"
    assert (running.times.arrived, running.times.first_token, running.times.finished) == (100.0, 100.0, 111.0)
    assert 0 < len(running.output_ids) < 30 and not waiting.output_ids


def test_contradictions_are_refused() -> None:
    engine = Engine.of(MODEL, EngineConfig(max_num_seqs=1, max_model_len=64))
    with pytest.raises(UsageError, match="ignore_eos"):
        engine.add_request([1], SamplingParams(ignore_eos=True), guide=Refusing(1))
    for timeout in (0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="timeout"):
            engine.add_request([1], timeout=timeout)
    assert not engine.has_unfinished and engine.scheduler.slots.num_used == 0
