"""An engine calls modules that were put in the place of others: in prompts, steps of decode, and drafts."""

from __future__ import annotations

from copy import deepcopy

import pytest

from qnext.ops import backends
from tests.engine.drafting import GREEDY, draft_always, make_engine, prompts_of
from tests.model.models import make_model
from tests.model.wrapping import CONFIG, WRAPPED, multiply_weights, names_of, wrap


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_answers_are_those_of_changed_weights(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module is wrapped at once; drafts are accepted and rejected, and each step calls each module."""
    if backend == "torch":
        monkeypatch.setattr(backends, "cpu_kernels", lambda: None)
    elif backends.cpu_kernels() is None:
        pytest.skip("the native kernels are not built")
    model = make_model(CONFIG)
    expected = deepcopy(model)
    names = names_of(*WRAPPED)
    for name in names:
        multiply_weights(expected, name)
    wrappers = [wrap(model, name) for name in reversed(names)]  # those below before those around them
    prompts = prompts_of(model, [40, 7])
    answers = []
    for each in (expected, model):
        engine = make_engine(each)
        draft_always(engine, seed=0)
        answers.append([request.output_ids for request in engine.generate(prompts, GREEDY)])
        assert engine.metrics.drafted_tokens > engine.metrics.accepted_tokens > 0
    assert answers[0] == answers[1]
    assert all(wrapper.num_calls > 20 for wrapper in wrappers)
