"""Plans are data: whoever is given them, and has the same model, computes the same bits."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pytest
import torch

from qnext.engine import Engine, EngineConfig, Request, SamplingParams
from qnext.engine.assembly import make_parts
from qnext.engine.drafter import Drafter
from qnext.engine.execution.executor import DraftOutput, StepOutput
from qnext.engine.execution.local import LocalExecutor
from qnext.engine.policy.step import DraftPlan, StepPlan
from tests.engine.drafting import draft_always
from tests.engine.models import NATIVE, needs_native, tiny_model
from tests.forked import context
from tests.model.models import make_in_form

CONFIG = EngineConfig(
    max_num_seqs=4, max_model_len=256, num_blocks=16, num_checkpoints=4, checkpoint_interval=32, poison=True
)


class Model(NamedTuple):
    name: str
    form: str


def executor_of(name: str, form: str) -> LocalExecutor:
    return make_parts(model_of(name, form), CONFIG).executor


def model_of(name: str, form: str) -> Any:
    return tiny_model(name) if form == "tiny" else make_in_form(name, form, num_nextn_predict_layers=1)


def serve(connection: Connection) -> None:
    """The other process: it is told a model, and then plans."""
    torch.set_num_threads(1)
    while (order := pickle.loads(connection.recv_bytes())) is not None:
        if isinstance(order, Model):
            executor = executor_of(*order)
            continue
        output = executor.execute(order) if isinstance(order, StepPlan) else executor.draft(order)
        connection.send_bytes(pickle.dumps(output))


@pytest.fixture(scope="module")
def another_process() -> Iterator[Connection]:
    processes = context()
    ours, theirs = processes.Pipe()
    process = processes.Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send_bytes(pickle.dumps(None))
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


class Twins(LocalExecutor):
    """Runs each plan here and in another process, which gets nothing but the plan, and compares the bits."""

    def __init__(self, executor: LocalExecutor, connection: Connection) -> None:
        vars(self).update(vars(executor))
        self.connection = connection
        self.plans: list[StepPlan] = []
        self.num_drafting = 0

    def execute(self, plan: StepPlan) -> StepOutput:
        output = super().execute(plan)
        theirs = self._theirs(plan)
        assert torch.equal(output.logits_RY, theirs.logits_RY)
        assert (output.order, output.prompt_tokens) == (theirs.order, theirs.prompt_tokens)
        self.plans.append(plan)
        return output

    def draft(self, plan: DraftPlan) -> DraftOutput:
        output = super().draft(plan)
        theirs = self._theirs(plan)
        assert output.tokens == theirs.tokens and torch.equal(output.logits_RY, theirs.logits_RY)
        self.num_drafting += 1
        return output

    def _theirs(self, plan: StepPlan | DraftPlan) -> Any:
        data = pickle.dumps(plan)
        assert pickle.loads(data) == plan
        self.connection.send_bytes(data)
        assert self.connection.poll(120)
        return pickle.loads(self.connection.recv_bytes())


def play(engine: Engine, vocab_size: int, seed: int) -> list[Request]:
    """Requests of all kinds, more of them than there is room for, whose prompts begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(vocab_size) for _ in range(70)]
    requests: list[Request] = []
    while len(requests) < 14 or engine.has_unfinished:
        if len(requests) < 14:
            prompt = shared[: rng.choice([0, 33, 70])] + [rng.randrange(vocab_size) for _ in range(rng.choice([1, 50]))]
            params = SamplingParams(
                max_tokens=rng.choice([1, 7, 60, 90]),
                ignore_eos=True,
                seed=rng.randrange(99),
                temperature=rng.choice([0.0, 0.0, 0.8]),
                prompt_logprobs=rng.choice([None, None, 1]),
            )
            requests.append(engine.add_request(prompt, params))
        engine.step()
        engine.check_integrity()
    return requests


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(NATIVE, "float32", marks=needs_native),
        pytest.param(NATIVE, "int4-g32", marks=needs_native),
        ("hybrid", "tiny"),
    ],
)
def test_another_process_computes_the_same_bits(another_process: Connection, name: str, form: str) -> None:
    """Over a schedule with prefixes that are shared, requests that are sent back and, with an MTP layer, drafts."""
    executor, scheduler, drafter, max_model_len = make_parts(model_of(name, form), CONFIG)
    another_process.send_bytes(pickle.dumps(Model(name, form)))
    twins = Twins(executor, another_process)
    engine = Engine(twins, scheduler, max_model_len=max_model_len)
    if drafter is not None:
        engine.drafter = Drafter(twins, max_draft_tokens=3)
        draft_always(engine, seed=1)
    requests = play(engine, twins.model_config.vocab_size, seed=2)
    metrics = engine.metrics
    assert metrics.num_preemptions and metrics.prefix.tokens_hit and any(plan.slot_copies for plan in twins.plans)
    if drafter is not None:
        assert metrics.accepted_tokens and twins.num_drafting and any(plan.accepted for plan in twins.plans)
    if form == "tiny":
        return  # its sizes are torch's, which promises no bits in company
    alone = Engine.of(twins.model, EngineConfig(max_num_seqs=1, max_model_len=256, prefix_cache=False))
    for request in requests:
        (wanted,) = alone.generate([request.prompt_ids], request.params)
        assert tuple(request.output_ids) == wanted.output_ids


def test_a_plan_names_blocks_once() -> None:
    """Tables are written as they grow: a plan holds the blocks that are new, and never an object of the scheduler."""
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1, max_model_len=64))
    plans: list[StepPlan] = []
    usual = engine.executor.execute

    def execute(plan: StepPlan) -> StepOutput:
        plans.append(plan)
        return usual(plan)

    engine.executor.execute = execute  # type: ignore[method-assign]
    engine.generate([list(range(20))], SamplingParams(max_tokens=20, ignore_eos=True))
    named = [(s.first_block, len(s.blocks)) for plan in plans for s in plan.sequences]
    assert named[0] == (0, 2) and [n for n in named[1:] if n[1]] == [(2, 1)]
    for plan in plans:
        assert pickle.loads(pickle.dumps(plan)) == plan and len(pickle.dumps(plan)) < 1000
