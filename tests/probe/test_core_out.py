"""Taps of core_out alone: the fused ops give them, to the bit, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.engine import SamplingParams
from qnext.engine.probing import probed
from qnext.model import Batch, CausalLM
from qnext.ops import backends
from qnext.probe import ModelProbe, same_bits
from tests.engine.drafting import draft_always, make_engine, prompts_of
from tests.model.models import OneRequest, make_in_form, random_tokens
from tests.model.wrapping import CONFIG

CORES = ["layers.0.delta.core_out", "layers.1.attention.core_out"]
GATES = ["layers.0.delta.gate", "layers.1.attention.gate"]
GATED = ["layers.0.delta.gated_out", "layers.1.attention.gated_out"]


def make_model(form: str = "float32") -> CausalLM:
    changes = {"layer_types": CONFIG.layer_types, "num_nextn_predict_layers": 1}
    return make_in_form("next, sizes of the native kernels", form, **changes)


@torch.no_grad()
def in_pieces(model: CausalLM) -> list[Tensor]:
    """Logits of a prompt in two pieces and of two decoded tokens; and what the caches hold."""
    request = OneRequest(model, 80)
    parts = random_tokens(CONFIG, 72).split([40, 30, 1, 1])
    logits = [model.logits(model(request.batch(part)).hidden_TD) for part in parts]
    kept = [tensor[1] for slots in request.delta.values() for tensor in slots.tensors]
    return [*logits, *kept, *(tensor[request.table_M[:4]] for tensor in request.kv[1].tensors)]


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_the_fused_ops_give_it(backend: str, form: str) -> None:
    """It leads to gated_out, is what the steps give but for their rounding, and whoever looks changes no bit."""
    model = make_model(form)
    plain = in_pieces(model)
    with ModelProbe(model, CORES + GATED) as probe:
        looked = in_pieces(model)
    assert all(same_bits(one, other) for one, other in zip(looked, plain, strict=True))
    with ModelProbe(model, CORES + GATES) as steps:
        in_pieces(model)
    seen = {tap: probe.captures.values(tap).double() for tap in probe.captures.names()}
    z, gate = (steps.captures.values(tap).double() for tap in GATES)
    norm = model.model.layers[0].linear_attn.norm
    core = seen[CORES[0]]
    normed = core * torch.rsqrt(core.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    wanted = {GATED[0]: normed * torch.nn.functional.silu(z), GATED[1]: seen[CORES[1]] * torch.sigmoid(gate)}
    is_wide = backend == "cpu" or form == "float32"  # else each step is rounded to bf16
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if is_wide else {"rtol": 3e-2, "atol": 3e-2}
    for tap, values in wanted.items():
        assert torch.allclose(seen[tap], values.flatten(1), **tolerance), tap
    # Two orders of summation; with bf16, keys and values that are read from pages are rounded by one of both.
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if form == "float32" else {"rtol": 3e-2, "atol": 3e-2}
    for tap in CORES:
        assert torch.allclose(seen[tap], steps.captures.values(tap).double(), **tolerance), tap


@pytest.mark.skipif(backends.cpu_kernels() is None, reason="the native kernels are not built or not wanted")
@pytest.mark.parametrize("options", [{}, {"speculation": True}, {"max_num_batched_tokens": 67}], ids=str)
def test_its_bits_are_those_of_a_sequence_alone(options: dict[str, Any]) -> None:
    """In batches, in pieces of a prompt, with drafts that are kept or not."""
    model = make_model()
    prompts = prompts_of(model, [50, 33, 7])
    params = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0.0, logprobs=2)
    engine, plain = (make_engine(model, **{"prefix_cache": False, "speculation": False, **options}) for _ in range(2))
    if options.get("speculation"):
        draft_always(engine, seed=0)
    with probed(engine, CORES) as probe:
        found = engine.generate(prompts, params)
    assert [each.sampled for each in found] == [each.sampled for each in plain.generate(prompts, params)]
    for number, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        tokens = torch.tensor([*prompt, *answer.output_ids[:-1]])
        with torch.no_grad(), ModelProbe(model, CORES) as alone:
            model(Batch.from_lengths(tokens, [len(tokens)]))
        for tap in CORES:
            positions, values = probe.captures.of_sequence(tap, f"request-{number}")
            assert positions[: len(tokens)] == list(range(len(tokens)))
            assert same_bits(values[: len(tokens)], alone.captures.values(tap)), tap
