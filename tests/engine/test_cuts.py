"""Where an engine cuts prompts at any token, a row's bits depend on neither the cut nor what is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qnext.engine import Engine, EngineConfig
from qnext.model import CausalLM
from qnext.ops import DELTA_CHUNK_SIZE, backend_of
from tests.engine.models import KINDS, NATIVE, needs_native, tiny_model
from tests.engine.sequences import MAX_LEN, Sequences
from tests.model.models import PEER_CONFIGS, make_in_form

LENGTH = 90
CUTS = [[1] * LENGTH, [17, 2, 1, 64, 6], [64, 26], [1, 89]]
# Each alone is more or less than the kernels take.
ODD_SIZES: list[dict[str, Any]] = [
    {"head_dim": 10, "partial_rotary_factor": 0.4},
    {"head_dim": 16},
    {"hidden_size": 48},
    {"hidden_size": 24},
    {"linear_key_head_dim": 8},
    {"linear_value_head_dim": 12},
    {"linear_conv_kernel_dim": 9},
    {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "partial_rotary_factor": 0.5},
    {"moe_intermediate_size": 20},
    {"moe_intermediate_size": 48},
    {"shared_expert_intermediate_size": 28},
    {"mlp_only_layers": (1,), "intermediate_size": 52},
]


@torch.inference_mode()
def rows_in_cuts(model: CausalLM, cuts: Sequence[int], *, company: Sequence[int] = ()) -> Tensor:
    """[LENGTH, Y]: logits of one prompt in these cuts, with so many tokens of another one in each step."""
    sequences = Sequences(model, [LENGTH, MAX_LEN - 1])
    for number, count in enumerate(cuts):
        beside = [(1, company[number], False, company[number])] if number < len(company) else []
        sequences.step([(0, count, False, count), *beside])
    return torch.cat(sequences.logits[0])


def cuts_anywhere(model: CausalLM, **options: Any) -> bool:
    """Whether an engine of the model takes it for one whose prompts can be cut, and kept, at any token."""
    engine = Engine.of(model, EngineConfig(max_num_seqs=2, max_model_len=128, **options))
    assert engine.scheduler.limits.chunk_size in (1, DELTA_CHUNK_SIZE)
    return engine.scheduler.limits.chunk_size == 1


def check(model: CausalLM) -> None:
    if not cuts_anywhere(model):
        return
    whole = rows_in_cuts(model, [LENGTH])
    for cuts in CUTS:
        assert torch.equal(rows_in_cuts(model, cuts), whole), cuts
    assert torch.equal(rows_in_cuts(model, [LENGTH], company=[50]), whole)
    assert torch.equal(rows_in_cuts(model, CUTS[1], company=[1, 30, 1]), whole)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16", "int4-g32"])
@pytest.mark.parametrize("name", PEER_CONFIGS)
def test_every_family(name: str, form: str) -> None:
    if form.startswith("int") and not name.endswith("sizes of the native kernels"):
        pytest.skip("integer codes come in whole groups")
    model = make_in_form(name, form)
    if name.endswith("sizes of the native kernels") and form != "float16":
        assert model.is_cut_invariant == backend_of(model.device).is_cut_invariant
    check(model)


@pytest.mark.parametrize("changes", ODD_SIZES, ids=str)
def test_sizes_that_kernels_do_not_take(changes: dict[str, Any]) -> None:
    check(make_in_form(NATIVE, "float32", **changes))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiny_models_of_other_tests(kind: str) -> None:
    model = tiny_model(kind)
    assert model.is_cut_invariant == backend_of(model.device).is_cut_invariant
    check(model)


class Called(nn.Module):
    """In the place of a module, which it calls: no fused op reads its weight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


class Added(Called):
    """The same with a weight of its own, as a LoRA has."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__(inner)
        self.own = nn.Parameter(torch.randn(size, size), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.inner(x_TD @ self.own)


@needs_native
def test_modules_in_the_place_of_others() -> None:
    """A wrapped norm has the mixer computed in parts, and nobody knows what a foreign module multiplies."""
    model = make_in_form(NATIVE, "float32")
    assert model.is_cut_invariant
    layers = model.model.layers
    full = next(layer for layer in layers if hasattr(layer, "self_attn"))
    linear = next(layer for layer in layers if hasattr(layer, "linear_attn"))
    for owner, name, made in (
        (full.self_attn, "q_norm", Called),
        (linear.linear_attn, "norm", Called),
        (full.self_attn, "o_proj", lambda module: Added(module, module.in_features)),
    ):
        kept = getattr(owner, name)
        setattr(owner, name, made(kept))
        assert not model.is_cut_invariant, name
        check(model)
        setattr(owner, name, kept)
    full.self_attn.o_proj = Called(full.self_attn.o_proj)  # still one call of the kernel
    assert model.is_cut_invariant
    check(model)


@needs_native
def test_caches_that_kernels_do_not_read() -> None:
    model = make_in_form(NATIVE, "float32")
    assert cuts_anywhere(model) and cuts_anywhere(model, kv_dtype=torch.int8)
    assert not cuts_anywhere(model, kv_dtype=torch.float16)
    assert not cuts_anywhere(model, max_draft_tokens=100, speculation=False)
    assert not cuts_anywhere(model, state_dtype=torch.bfloat16)
