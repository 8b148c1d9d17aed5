"""Adapters served together: each request answers as the model that its adapter makes, alone or beside others."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.errors import UsageError
from qnext.lora import Adapter, LoraConfig, adapter_of, attach
from qnext.lora.serving import serve_adapters
from qnext.model import CausalLM
from tests.lora.models import CONFIG, with_random_lora
from tests.model.models import make_model, random_tokens
from tests.ops.compare import relative_rms

from .executors import KeepingExecutor

LORAS = {
    "mixers": LoraConfig("attention", rank=3),
    "all": LoraConfig("all", rank=4, router=True),
    "some": LoraConfig("experts", rank=2, shares_outer=False, experts={0: (0, 1, 2), 1: (5,)}),
}
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def make_adapters(*names: str) -> dict[str, Adapter]:
    adapters = {}
    for name in names:
        adapter = adapter_of(with_random_lora(make_model(CONFIG), LORAS[name]))
        for part in adapter.parts.values():
            part.B.mul_(0.5 + len(name) / 4)
        adapters[name] = adapter
    return adapters


def make_engine(adapters: Mapping[str, Adapter], **options: object) -> Engine:
    model = make_model(CONFIG).requires_grad_(False)
    switch = serve_adapters(model, adapters)
    sizes = {"max_model_len": 256, "max_num_seqs": 4, "num_blocks": 64, **options}
    return Engine.of(model, EngineConfig(adapters=switch, poison=True, **sizes))  # type: ignore[arg-type]


def answer(engine: Engine, asked: list[tuple[str | None, list[int]]]) -> list[list[int]]:
    requests = [engine.add_request(prompt, PARAMS, adapter=adapter) for adapter, prompt in asked]
    while engine.has_unfinished:
        engine.step()
    assert all(request.failure is None for request in requests)
    return [list(request.output_ids) for request in requests]


def alone(adapter: Adapter | None, prompt: list[int]) -> list[int]:
    """By an engine of the model with this adapter and no other."""
    model = make_model(CONFIG)
    if adapter is not None:
        attach(model, adapter)
    engine = Engine.of(model, EngineConfig(max_model_len=256, max_num_seqs=1, num_blocks=32))
    return answer(engine, [(None, prompt)])[0]


def prompts(count: int) -> list[list[int]]:
    return [random_tokens(CONFIG, 40 + 3 * i, seed=i).tolist() for i in range(count)]


@pytest.mark.parametrize("names", [("mixers",), ("mixers", "all", "some")])
def test_a_mixed_batch_answers_as_each_adapter_alone(names: tuple[str, ...]) -> None:
    """Prefill, decode and drafts, base and adapters side by side; what the tokens are is the models' choice."""
    adapters = make_adapters(*names)
    asked = list(zip([None, *names], prompts(1 + len(names)), strict=True))
    found = answer(make_engine(adapters), [(name, prompt) for name, prompt in asked])
    assert found == [alone(adapters.get(name or ""), prompt) for name, prompt in asked]
    assert len({tuple(tokens) for tokens in found}) == len(found)


def test_one_prompt_has_an_answer_for_each_adapter() -> None:
    """Prefixes are kept apart: the same prompt again, in every order, answers as the first time."""
    adapters = make_adapters("mixers", "all")
    engine = make_engine(adapters)
    prompt = random_tokens(CONFIG, 150).tolist()
    first = {name: answer(engine, [(name, prompt)])[0] for name in (None, "mixers", "all")}
    assert len({tuple(tokens) for tokens in first.values()}) == 3
    again = answer(engine, [(name, prompt) for name in ("all", None, "mixers")])
    assert again == [first["all"], first[None], first["mixers"]]
    assert engine.metrics.prompt_tokens_cached > 0


def test_bits_do_not_depend_on_neighbours() -> None:
    """Rows of mixers' adapters keep the promise of the kernels, to the last bit, with any neighbours."""
    engine = make_engine(make_adapters("mixers"), speculation=False, prefix_cache=False)
    if not engine_model(engine).is_cut_invariant:
        pytest.skip("the native kernels are not built")
    keeping = KeepingExecutor(engine)
    one, two = prompts(2)

    def rows(asked: list[tuple[str | None, list[int]]]) -> list[Tensor]:
        keeping.rows.clear()
        answer(engine, asked)
        return [torch.stack(each) for each in keeping.rows.values()]

    together = rows([("mixers", one), (None, two), ("mixers", two), (None, one)])
    separate = [rows([asked])[0] for asked in (("mixers", one), (None, two), ("mixers", two), (None, one))]
    assert all(torch.equal(a, b) for a, b in zip(together, separate, strict=True))


def engine_model(engine: Engine) -> CausalLM:
    model = engine.executor.model  # type: ignore[attr-defined]
    assert isinstance(model, CausalLM)
    return model


def test_the_model_alone_is_not_changed() -> None:
    """Without an adapter in the batch the same ops run as without any adapter in the model."""
    plain = Engine.of(
        make_model(CONFIG), EngineConfig(max_model_len=256, max_num_seqs=1, num_blocks=32, speculation=False)
    )
    served = make_engine(make_adapters("mixers"), speculation=False)
    (prompt,) = prompts(1)
    found = []
    for engine in (plain, served):
        keeping = KeepingExecutor(engine)
        answer(engine, [(None, prompt)])
        found.append(torch.stack(next(iter(keeping.rows.values()))))
    assert torch.equal(*found)


def test_unknown_adapters_and_those_of_other_models_are_refused() -> None:
    engine = make_engine(make_adapters("mixers"))
    with pytest.raises(UsageError, match="no adapter 'other'; there are: mixers"):
        engine.add_request([1, 2], PARAMS, adapter="other")
    adapter = make_adapters("mixers")["mixers"]
    name, part = next(iter(adapter.parts.items()))
    wrong = Adapter({name: part._replace(A=part.A[:, 1:])})
    with pytest.raises(UsageError, match=r"adapter wrong: .*another model"):
        serve_adapters(make_model(CONFIG), {"wrong": wrong})


def test_fingerprints_tell_adapters_apart_and_not_their_names() -> None:
    adapters = make_adapters("mixers", "all", "some")
    switch = serve_adapters(make_model(CONFIG), {**adapters, "again": adapters["all"]})
    assert switch.fingerprints["again"] == switch.fingerprints["all"]
    assert len(set(switch.fingerprints.values())) == 3
    changed = {name: part._replace(B=part.B * 1.0001) for name, part in adapters["all"].parts.items()}
    other = serve_adapters(make_model(CONFIG), {"all": Adapter(changed, adapters["all"].places)})
    assert other.fingerprints["all"] != switch.fingerprints["all"]
    assert relative_rms(next(iter(changed.values())).B, next(iter(adapters["all"].parts.values())).B) < 1e-3
