"""Steps of an engine that are replayed while a probe looks: the taps are those of steps that run in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.engine import Engine, SamplingParams
from qnext.engine.drafter import Drafter
from qnext.engine.probing import probed
from qnext.model import CausalLM
from qnext.ops import backends
from qnext.probe import EVERYWHERE, LAST, Captures, Edit, Where, same_bits, tap_names
from qnext.probe.names import is_between_ops
from tests.engine.drafting import draft_always, make_engine, prompts_of
from tests.model.models import make_in_form
from tests.model.wrapping import CONFIG

pytestmark = pytest.mark.skipif(backends.cpu_kernels() is None, reason="the native kernels are not built or not wanted")

TAPS = [name for name in tap_names(CONFIG) if is_between_ops(name)]
LENGTHS = [5, 33, 17, 1]  # more than there is room for: batches grow and shrink, slots change owners


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recordings that are made, and the replays."""
    events: list[str] = []

    class Counting:
        def __init__(self, recording: ops.Recording) -> None:
            self._recording, self.num_bytes = recording, recording.num_bytes

        def replay(self) -> None:
            events.append("replay")
            self._recording.replay()

    def record(compute: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
        result, recording = ops.record(compute, device)
        events.append("failure" if recording is None else "recording")
        return result, None if recording is None else Counting(recording)

    monkeypatch.setattr("qnext.engine.execution.recorded.record", record)
    return events


def make_model(form: str) -> CausalLM:
    changes = {"layer_types": CONFIG.layer_types, "num_nextn_predict_layers": 1}
    return make_in_form("next, sizes of the native kernels", form, **changes)


def engine_of(model: CausalLM, *, drafts: bool = False, **options: Any) -> Engine:
    engine = make_engine(model, prefix_cache=False, speculation=drafts, **{"max_num_seqs": 3, **options})
    if drafts:
        draft_always(engine, seed=0)
        assert isinstance(engine.drafter, Drafter)
        engine.drafter.lengths.may_probe = lambda *_, **__: False  # type: ignore[method-assign]  # it asks the clock
    return engine


def answers(engine: Engine, model: CausalLM) -> list[Any]:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0, logprobs=1)
    return [found.sampled for found in engine.generate(prompts_of(model, LENGTHS), params)]


def kept(captures: Captures) -> dict[str, tuple[list[Any], Tensor]]:
    return {tap: ([] if tap == "logits" else captures.places(tap), captures.values(tap)) for tap in captures.names()}


@pytest.mark.parametrize(
    ("form", "where", "drafts"),
    [
        ("float32", EVERYWHERE, False),
        ("bfloat16", LAST, True),
        ("int4-g32", Where(range(3, 20), frozenset({"request-1"})), True),
    ],
)
def test_a_replay_shows_what_python_shows(form: str, where: Where, drafts: bool, counted: list[str]) -> None:
    """Every tap between ops, bit for bit, at the same places and in the same order."""
    model = make_model(form)
    in_python, engine = engine_of(model, drafts=drafts, record_steps=False), engine_of(model, drafts=drafts)
    with probed(in_python, TAPS, where=where) as probe:
        wanted_answers = answers(in_python, model)
    assert not counted
    wanted = kept(probe.captures)
    with probed(engine, TAPS, where=where) as probe:
        assert answers(engine, model) == wanted_answers
    assert counted.count("replay") > 10
    found = kept(probe.captures)
    assert found.keys() == wanted.keys() and ("mtp.norm" in found) == drafts
    for tap, (places, values) in found.items():
        assert places == wanted[tap][0], tap
        assert same_bits(values, wanted[tap][1]), tap


def test_probes_come_and_go(counted: list[str]) -> None:
    """Each set of taps has recordings of its own, which wait for it. What a replay lacks runs in Python."""
    model = make_model("float32")
    engine = engine_of(model)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0))

    def events_of_steps(taps: Sequence[str], count: int, **options: Any) -> list[str]:
        counted.clear()
        with probed(engine, taps, **options) as probe:
            for _ in range(count):
                engine.step()
        if taps:
            assert len(probe.captures.values(taps[0])) == count
        return list(counted)

    norm, residual = ["norm"], ["layers.0.residual_out", "layers.1.router.probabilities"]
    engine.step()
    for taps in ([], norm, residual):
        assert "recording" in events_of_steps(taps, 6)
    for taps in (norm, [], residual, residual):
        assert events_of_steps(taps, 3) == ["replay"] * 3
    assert events_of_steps(norm, 2, where=LAST) == ["replay"] * 2
    # An op is computed once more; rows may change; somebody else has a hook.
    assert not events_of_steps(["layers.0.delta.core_out"], 2)
    assert not events_of_steps([], 2, edits=[Edit("norm", torch.clone)])
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    assert not events_of_steps(norm, 2)
    hook.remove()
    assert events_of_steps(norm, 1) == ["replay"]


@pytest.mark.parametrize("record_steps", [False, True])
def test_rows_have_the_names_of_their_requests(record_steps: bool) -> None:
    """Though a slot has one request after another, and the MTP layer looks up embeddings as well."""
    model = make_model("float32")
    engine = engine_of(model, drafts=True, record_steps=record_steps)
    with probed(engine, ["embedding", "mtp.joined"]) as probe:
        found = answers(engine, model)
    for number, (prompt, sampled) in enumerate(zip(prompts_of(model, LENGTHS), found, strict=True)):
        tokens = [*prompt, *(token.token_id for token in sampled)][:-1]
        positions, rows = probe.captures.of_sequence("embedding", f"request-{number}")
        assert positions[: len(tokens)] == list(range(len(tokens)))
        assert torch.equal(rows[: len(tokens)], model.model.embed_tokens.weight[tokens])
