"""What the MTP layer proposes in the engine is what the bare model would propose, and it changes no answer."""

from __future__ import annotations

import random

import pytest

from qnext.engine import Engine, Request, SamplingParams
from qnext.engine.drafter import Drafter
from qnext.errors import UsageError
from qnext.model import CausalLM
from tests.engine.drafting import (
    GREEDY,
    draft,
    draft_always,
    drafting_of,
    drafts_like_those_of,
    drafts_of_the_bare_model,
    make_engine,
    prompts_of,
)
from tests.engine.models import NATIVE, needs_native
from tests.model.models import make_in_form

OTHER = "next"


@pytest.mark.parametrize(
    ("name", "uses_final_norm"),
    [
        (NATIVE, True),
        (OTHER, False),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((NATIVE, False), (OTHER, True))),
    ],
)
def test_drafts_are_those_of_the_bare_model(name: str, uses_final_norm: bool) -> None:
    model = make_in_form(name, "float32", num_nextn_predict_layers=1, mtp_uses_final_norm=uses_final_norm)
    engine = make_engine(model)
    draft_always(engine)
    requests = [engine.add_request(prompt, GREEDY) for prompt in prompts_of(model, [5, 17, 40])]
    num_compared = 0
    while engine.has_unfinished:
        found = draft(engine)
        for request in requests:
            if drafts := found.get(request.id):
                assert list(drafts) == drafts_like_those_of(model, engine, request, drafts)
                num_compared += len(drafts)
        engine.step()
    assert num_compared > 100


def test_the_first_rows_after_a_long_prompt() -> None:
    model = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    engine = make_engine(model, max_num_batched_tokens=100)
    draft_always(engine)
    (prompt,) = prompts_of(model, [300])
    request = engine.add_request(prompt, GREEDY)
    while engine.has_unfinished:
        if drafts := draft(engine).get(request.id):
            assert drafting_of(engine, request).first_row == 300 - 32, "it stays where it began"
            assert list(drafts) == drafts_like_those_of(model, engine, request, drafts)
        engine.step()


def test_the_layer_sees_as_much_as_its_pages_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages go round: what lies more than so many pages back is forgotten."""
    for module in ("cache", "inputs"):
        monkeypatch.setattr(f"qnext.engine.execution.{module}.NUM_DRAFT_PAGES", 3)
    model = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    engine = make_engine(model)
    draft_always(engine)
    (prompt,) = prompts_of(model, [20])
    request = engine.add_request(prompt, SamplingParams(max_tokens=150, ignore_eos=True, temperature=0.0))
    has_forgotten = False
    while engine.has_unfinished:
        if drafts := draft(engine).get(request.id):
            begin = drafting_of(engine, request).first_row
            end = engine.scheduler.sequences[request.id].num_computed_tokens
            first = begin + 16 * max(0, (end - begin - 1) // 16 - 2)
            has_forgotten |= first > begin
            tokens = request.token_range(0, request.num_tokens)
            assert drafts[0] == drafts_of_the_bare_model(model, tokens, 1, first=first)[0]
        engine.step()
    assert has_forgotten


def test_rows_that_were_not_drafted_for_are_made_up_for() -> None:
    """Nothing is drafted for a while: a few rows are computed together; after many the layer begins anew."""
    model = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    for pause, begins_anew in ((2, False), (12, False), (30, True)):
        engine = make_engine(model)
        draft_always(engine)
        (prompt,) = prompts_of(model, [30])
        request = engine.add_request(prompt, SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0))
        drafter = engine.drafter
        while len(request.output_ids) < 10:
            engine.step()
        engine.drafter = None
        while len(request.output_ids) < 10 + pause:
            engine.step()
        engine.drafter = drafter
        drafts = draft(engine)[request.id]
        assert (drafting_of(engine, request).first_row > 0) == begins_anew
        assert len(drafts) == 3 and list(drafts) == drafts_like_those_of(model, engine, request, drafts)


def test_acceptance_is_known_before_anything_is_drafted() -> None:
    """The layer is asked about the prompt's last tokens: 16 of them, of which it gets right what it would."""
    model = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    engine = make_engine(model)
    assert isinstance(engine.drafter, Drafter)
    (prompt,) = prompts_of(model, [60])
    request = engine.add_request(prompt, GREEDY)
    while not request.output_ids:
        engine.step()
    engine.drafter.draft(engine.scheduler.decoding)
    assert engine.drafter.lengths.overall.num_trials == pytest.approx(15.7, abs=0.2)
    tokens = (*prompt, request.output_ids[0])
    right = sum(
        drafts_of_the_bare_model(model, tokens[:end], 1, first=60 - 32)[0] == tokens[end] for end in range(45, 61)
    )
    assert round(engine.drafter.lengths.overall._right[0]) == right


def run_traffic(model: CausalLM, *, seed: int, speculation: bool) -> tuple[list[tuple[int, ...]], Engine]:
    """Requests of all kinds arrive while others run; too few blocks, so that some are preempted and resumed."""
    rng = random.Random(seed)
    engine = make_engine(model, num_blocks=rng.choice([24, 40]), speculation=speculation, checkpoint_interval=32)
    if speculation:
        draft_always(engine, seed)
    shared = [rng.randrange(model.config.vocab_size) for _ in range(70)]
    requests: list[Request] = []
    while len(requests) < 14 or engine.has_unfinished:
        if len(requests) < 14 and len(requests) < 4 + engine.scheduler.limits.max_num_seqs * 3:
            prompt = shared[: rng.choice([0, 16, 33, 70])] + [
                rng.randrange(model.config.vocab_size) for _ in range(rng.choice([1, 20, 50]))
            ]
            params = SamplingParams(
                max_tokens=rng.choice([1, 7, 40, 90]),
                ignore_eos=True,
                seed=rng.randrange(99),
                temperature=rng.choice([0.0, 0.8]),
                frequency_penalty=rng.choice([0.0, 0.4]),
            )
            requests.append(engine.add_request(prompt, params))
        engine.step()
        engine.check_integrity()
    return [tuple(request.output_ids) for request in requests], engine


@needs_native
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-g32"])
def test_answers_are_those_without(form: str) -> None:
    model = make_in_form(NATIVE, form, num_nextn_predict_layers=1)
    num_preemptions = 0
    for seed in range(2):
        plain, _ = run_traffic(model, seed=seed, speculation=False)
        drafted, engine = run_traffic(model, seed=seed, speculation=True)
        assert drafted == plain
        num_preemptions += engine.scheduler.num_preemptions
        assert isinstance(engine.drafter, Drafter) and engine.drafter.lengths.overall.num_trials > 50
    assert num_preemptions


def test_the_first_drafts_of_a_cached_prefix() -> None:
    """Rows of the prefix are not there: the layer begins at the first page that is this request's own alone."""
    model = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    engine = make_engine(model)
    draft_always(engine)
    (prompt,) = prompts_of(model, [70])
    (first,) = engine.generate([prompt], GREEDY)
    request = engine.add_request([*prompt, *first.output_ids, 1, 2, 3], GREEDY)
    while engine.has_unfinished:
        if draft(engine).get(request.id):
            num_reused = engine.scheduler.sequences[request.id].num_reused_tokens
            assert drafting_of(engine, request).first_row >= num_reused >= 70
        engine.step()
    alone, _ = [make_engine(model, speculation=False) for _ in range(2)]
    assert tuple(request.output_ids) == alone.generate([request.prompt_ids], GREEDY)[0].output_ids


def test_speculation_that_cannot_be() -> None:
    model = make_in_form(NATIVE, "float32")
    with pytest.raises(UsageError, match="no layer for multi-token prediction"):
        make_engine(model, speculation=True)
    assert make_engine(model).drafter is None
    with_mtp = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    with pytest.raises(UsageError, match="at least 1"):
        make_engine(with_mtp, max_draft_tokens=0)
    assert make_engine(with_mtp).drafter is not None
    assert make_engine(with_mtp, speculation=False).drafter is None
