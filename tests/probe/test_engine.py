"""Requests of an engine, seen and changed one by one: nothing else changes, whatever runs beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.engine import Engine, SamplingParams
from qnext.engine.probing import glance_at, probed
from qnext.errors import UsageError
from qnext.model import Batch
from qnext.ops import backends
from qnext.probe import Edit, ModelProbe, Where, same_bits, tap_names
from qnext.probe.names import READ_ONLY
from tests.engine.drafting import draft_always, make_engine, prompts_of
from tests.model.models import make_model
from tests.model.wrapping import CONFIG

MODEL = make_model(CONFIG)
PROMPTS = prompts_of(MODEL, [50, 33, 7])
PARAMS = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0.0, logprobs=2)
SCALED = "layers.0.mixer_out"


def engine_of(**options: Any) -> Engine:
    return make_engine(MODEL, **{"prefix_cache": False, "speculation": False, **options})


def answers(engine: Engine) -> list[Any]:
    return [found.sampled for found in engine.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("options", [{}, {"speculation": True}, {"max_num_batched_tokens": 67}], ids=str)
def test_identities_change_no_token_and_no_probability(options: dict[str, Any]) -> None:
    """In prefill, in pieces of a prompt, in steps of several requests, with drafts that are kept or not."""
    taps = tap_names(CONFIG)
    edits = [Edit(name, torch.clone) for name in taps if not name.endswith((*READ_ONLY, "delta.state"))]
    plain_engine, engine = engine_of(**options), engine_of(**options)
    if options.get("speculation"):
        draft_always(plain_engine, seed=0)
        draft_always(engine, seed=0)
    plain = answers(plain_engine)
    with probed(engine, taps, edits=edits):
        assert answers(engine) == plain
    assert answers(engine) == plain


def test_what_is_seen_of_a_request_is_what_it_computes_alone() -> None:
    engine = engine_of()
    with probed(engine, [SCALED, "layers.1.attention.core_out", "layers.0.delta.state"]) as probe:
        found = engine.generate(PROMPTS, PARAMS)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, found, strict=True)):
        tokens = torch.tensor([*prompt, *answer.output_ids[:-1]])
        with torch.no_grad(), ModelProbe(MODEL, probe.captures.names()) as alone:
            MODEL(Batch.from_lengths(tokens, [len(tokens)]))
        for tap in probe.captures.names():
            positions, values = probe.captures.of_sequence(tap, f"request-{number}")
            assert positions == list(range(len(tokens)))
            wanted = alone.captures.values(tap)
            if tap == SCALED and backends.cpu_kernels() is not None:
                assert same_bits(values, wanted)
            # steps in fp32, in other pieces
            assert torch.allclose(values, wanted, rtol=1e-3, atol=1e-5), tap


def half(x: Tensor) -> Tensor:
    return 0.5 * x


@pytest.mark.parametrize("tap", [SCALED, "layers.0.delta.value", "layers.1.attention.key", "layers.1.router.weights"])
@pytest.mark.parametrize("speculation", [False, True])
def test_an_edit_of_one_request_leaves_the_others(tap: str, speculation: bool) -> None:
    """And it is the same alone, and with drafts."""
    engine = engine_of(speculation=speculation)
    if speculation:
        draft_always(engine, seed=1)
    plain = answers(engine_of())
    with probed(engine, edits=[Edit(tap, half, Where.of("request-1"))]):
        edited = answers(engine)
    assert [edited[0], edited[2]] == [plain[0], plain[2]]
    assert edited[1] != plain[1]
    alone = engine_of()
    with probed(alone, edits=[Edit(tap, half)]):
        (found,) = alone.generate([PROMPTS[1]], PARAMS)
    assert [token.token_id for token in found.sampled] == [token.token_id for token in edited[1]]


def test_what_an_edit_needs() -> None:
    with pytest.raises(UsageError, match="prefix_cache=False"), probed(make_engine(MODEL), edits=[Edit(SCALED, half)]):
        pass
    state = Edit("layers.0.delta.state", half)
    with (
        pytest.raises(UsageError, match=r"layers\.0\.delta\.state: .*speculation"),
        probed(engine_of(speculation=True), edits=[state]),
    ):
        pass


def test_a_glance_at_a_step_changes_nothing() -> None:
    """Nobody asked: nothing is looked at. Its numbers are those of the taps."""
    plain = answers(engine_of())
    engine = engine_of()
    requests = [engine.add_request(prompt, PARAMS) for prompt in PROMPTS]
    assert glance_at(engine) is None
    while engine.has_unfinished:
        engine.step()
        glance_at(engine)
    assert [request.output_ids for request in requests] == [[token.token_id for token in each] for each in plain]
    assert not any(module._forward_hooks for module in MODEL.modules())
    with probed(engine, ["layers.0.delta.decay", "layers.0.delta.gate", "layers.1.attention.gate"]) as probe:
        glance_at(engine)
        engine.add_request(PROMPTS[0], PARAMS)
        engine.step()
    glance = glance_at(engine)
    assert glance is not None and glance.num_rows == len(PROMPTS[0])
    g, z, gate = (probe.captures.values(tap) for tap in probe.captures.names())
    delta, attention = glance.layers
    assert (delta.layer, attention.layer) == (0, 1) and attention.half_lives == ()
    assert delta.half_lives == pytest.approx((-torch.log(torch.tensor(2.0)) / g.median(0).values).tolist(), rel=1e-4)
    assert delta.gate == pytest.approx(float(torch.sigmoid(z).mean()), rel=1e-4)
    assert attention.gate == pytest.approx(float(torch.sigmoid(gate).mean()), rel=1e-4)
