"""The same weights in transformers give the same logits and gradients, for all three families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.models import PEER_CONFIGS, OneRequest, logits_of, make_model, make_peer, next_config, random_tokens
from qnext.config import FULL_ATTENTION
from qnext.model import Batch, CausalLM

transformers = pytest.importorskip("transformers")

NUM_TOKENS = 134
# Of the first family many single tokens, of the others those around 128, where a page and a chunk of states end.
NUM_PROMPTS = {name: 118 if place else 70 for place, name in enumerate(PEER_CONFIGS)}
# fp32 with about ten products of width 48 in sequence: rounding of 1e-6 at logits of order one, times a margin.
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", list(PEER_CONFIGS))
@torch.no_grad()
def test_prefill_and_cached_decode_agree(name: str) -> None:
    model = make_model(PEER_CONFIGS[name])
    peer = make_peer(model)
    tokens = random_tokens(model.config, NUM_TOKENS)
    theirs_whole = peer(tokens[None], use_cache=False).logits[0]
    assert 0.3 < theirs_whole.std() < 5.0, "logits must be of order one for the tolerance to mean something"
    ours_whole = logits_of(model, tokens)

    ours, theirs = _cached_decode(model, peer, tokens, NUM_PROMPTS[name])
    differences = {
        "prefill": (ours_whole - theirs_whole).abs().max().item(),
        "cached": (ours - theirs).abs().max().item(),
        "cached against whole": (ours - ours_whole).abs().max().item(),
    }
    report = f"{name}: " + ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
    print(report)
    assert max(differences.values()) < TOLERANCE, report


def _cached_decode(model: CausalLM, peer: Any, tokens: Tensor, num_prompt: int) -> tuple[Tensor, Tensor]:
    request = OneRequest(model, max_tokens=len(tokens))
    cache = transformers.DynamicCache(config=peer.config)
    can_cache = FULL_ATTENTION in model.config.layer_types  # their cache takes its length from an attention layer
    ours, theirs = [], []
    for piece in (tokens[:num_prompt], *tokens[num_prompt:].split(1)):
        position_ids = torch.arange(request.num_cached, request.num_cached + len(piece))[None]
        ours.append(model.logits(model(request.batch(piece)).hidden_TD))
        if can_cache:
            output = peer(piece[None], position_ids=position_ids, past_key_values=cache, use_cache=True)
            theirs.append(output.logits[0])
    if not can_cache:
        theirs = [peer(tokens[None], use_cache=False).logits[0]]
    return torch.cat(ours), torch.cat(theirs)


@pytest.mark.parametrize("name", ["next", "next, any pattern, dense layers", "qwen3_moe"])
@torch.no_grad()
def test_rounding_is_no_worse_than_theirs(name: str) -> None:
    """Both fp32 results against ours in fp64: their distance is rounding, not another formula."""
    model = make_model(PEER_CONFIGS[name])
    tokens = random_tokens(model.config, 134)
    theirs = make_peer(model)(tokens[None], use_cache=False).logits[0]
    ours = logits_of(model, tokens)
    exact = logits_of(model.double(), tokens)
    our_error, their_error = ((x - exact).square().mean().sqrt().item() for x in (ours, theirs))
    assert our_error < 3 * their_error < 3e-4, (our_error, their_error)


@torch.no_grad()
def test_bf16_loses_no_more_than_theirs() -> None:
    """Without experts, whose choice between near ties is no question of rounding order."""
    config = next_config(mlp_only_layers=(0, 1, 2, 3))
    our_errors, their_errors = [], []
    for seed in range(4):
        model = make_model(config, seed=seed)
        peer = make_peer(model).to(torch.bfloat16)
        tokens = random_tokens(config, 100, seed=seed)
        exact = logits_of(model, tokens)
        ours = logits_of(model.to(torch.bfloat16), tokens)
        assert model.dtype == torch.bfloat16
        theirs = peer(tokens[None], use_cache=False).logits[0]
        for logits, errors in ((ours, our_errors), (theirs, their_errors)):
            errors.append(((logits - exact).square().mean() / exact.square().mean()).item() ** 0.5)
    report = f"relative RMS in bf16: ours {sum(our_errors) / 4:.3f}, theirs {sum(their_errors) / 4:.3f}"
    print(report)
    assert sum(our_errors) < 1.2 * sum(their_errors), report


@pytest.mark.parametrize("name", ["next", "next, tied head, bias, raw top-k weights", "qwen3_moe"])
def test_gradients_of_a_training_loss_agree(name: str) -> None:
    model = make_model(PEER_CONFIGS[name])
    peer = make_peer(model)
    tokens = random_tokens(model.config, 130)
    for logits in (logits_of(model, tokens), peer(tokens[None], use_cache=False).logits[0]):
        torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    theirs = dict(peer.named_parameters())
    worst = ("", 0.0)
    for key, parameter in model.named_parameters():
        expected = theirs[key].grad
        assert parameter.grad is not None, key
        assert expected is not None, key
        assert expected.norm() > 0, key
        error = ((parameter.grad - expected).norm() / expected.norm()).item()
        worst = max(worst, (key, error), key=lambda pair: pair[1])
    print(f"{name}: worst gradient {worst[0]} {worst[1]:.1e}")
    assert worst[1] < 1e-3, worst


@pytest.mark.parametrize("uses_final_norm", [True, False])
@torch.no_grad()
def test_mtp_agrees_with_the_same_layer_of_transformers(uses_final_norm: bool) -> None:
    """There is no MTP module there, so its definition is spelt out around their decoder layer."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer, Qwen3NextRMSNorm

    config = next_config(num_nextn_predict_layers=1, mtp_uses_final_norm=uses_final_norm)
    model = make_model(config)
    peer = make_peer(make_model(config.with_(mtp_uses_final_norm=True)))
    weights = model.mtp.state_dict()
    full_layer = next(i for i, kind in enumerate(config.layer_types) if kind == "full_attention")
    layer = Qwen3NextDecoderLayer(peer.config, full_layer).eval()
    layer.load_state_dict({k.removeprefix("layers.0."): v for k, v in weights.items() if k.startswith("layers.0.")})

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        module = Qwen3NextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        module.load_state_dict({"weight": weights[f"{name}.weight"]})
        return module(x)

    tokens = random_tokens(config, 71)
    seen = {}
    peer.model.norm.register_forward_hook(lambda _, inputs, output: seen.update(before=inputs[0], after=output))
    peer(tokens[None, :-1], use_cache=False)
    hidden = seen["after" if uses_final_norm else "before"]
    embedded = peer.model.embed_tokens(tokens[None, 1:])
    x = torch.cat([norm("pre_fc_norm_embedding", embedded), norm("pre_fc_norm_hidden", hidden)], dim=-1)
    x = x @ weights["fc.weight"].T
    positions = torch.arange(70)[None]
    mask = torch.full((70, 70), float("-inf")).triu(1)[None, None]
    x = layer(x, peer.model.rotary_emb(x, positions), attention_mask=mask, position_ids=positions)
    expected = peer.lm_head(norm("norm", x))[0]

    batch = Batch.from_lengths(tokens[:-1], [70])
    whole = model.logits(model.draft_hidden(tokens[1:], model(batch), batch))
    difference = (whole - expected).abs().max().item()
    assert 0.3 < expected.std() < 5.0
    assert difference < TOLERANCE, difference

    request, pieces = OneRequest(model, max_tokens=70), []
    for piece, following in zip(tokens[:-1].split([40, 1, 29]), tokens[1:].split([40, 1, 29]), strict=True):
        cached = request.batch(piece)
        pieces.append(model.logits(model.draft_hidden(following, model(cached), cached)))
    assert (torch.cat(pieces) - expected).abs().max() < TOLERANCE
