"""Documents that lie packed in one batch do not know of each other, neither forward nor backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.models import (
    PEER_CONFIGS,
    OneRequest,
    logits_of,
    make_model,
    next_config,
    plain_config,
    random_tokens,
)
from qnext.config import ModelConfig
from qnext.model import Batch, CausalLM

LENGTHS = [5, 70, 1, 64, 33]
CONFIGS = [
    next_config(num_nextn_predict_layers=1),
    PEER_CONFIGS["next, any pattern, dense layers"],
    plain_config(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=28),
]


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_packed_is_separate(config: ModelConfig) -> None:
    """In fp64, so that other summation orders stay far below any leak."""
    model = make_model(config, dtype=torch.float64)
    tokens = random_tokens(config, sum(LENGTHS))
    packed = logits_of(model, tokens, LENGTHS)
    separate = torch.cat([logits_of(model, piece) for piece in tokens.split(LENGTHS)])
    assert (packed - separate).abs().max() < 1e-10


@torch.no_grad()
def test_packed_drafts_are_separate() -> None:
    model = make_model(CONFIGS[0], dtype=torch.float64)
    tokens = random_tokens(CONFIGS[0], sum(LENGTHS))
    following = random_tokens(CONFIGS[0], sum(LENGTHS), seed=1)

    def drafts(tokens_T: Tensor, following_T: Tensor, lengths: list[int]) -> Tensor:
        batch = Batch.from_lengths(tokens_T, lengths)
        return model.draft_hidden(following_T, model(batch), batch)

    separate = [drafts(t, f, [len(t)]) for t, f in zip(tokens.split(LENGTHS), following.split(LENGTHS), strict=True)]
    assert (drafts(tokens, following, LENGTHS) - torch.cat(separate)).abs().max() < 1e-10


def embedding_gradients(model: CausalLM, loss_of_document: int, *, with_mtp: bool) -> list[Tensor]:
    """Gradient of one document's loss with respect to every embedded row, for each use of the embedding."""
    seen: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = model.model.embed_tokens.register_forward_hook(keep)
    tokens = random_tokens(model.config, sum(LENGTHS))
    batch = Batch.from_lengths(tokens, LENGTHS)
    hidden = model(batch)
    rows = model.draft_hidden(tokens.roll(-1), hidden, batch) if with_mtp else hidden.hidden_TD
    rows.split(LENGTHS)[loss_of_document].square().sum().backward()
    handle.remove()
    return [x.grad for x in seen if x.grad is not None]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("with_mtp", [False, True])
def test_no_gradient_crosses_a_document(config: ModelConfig, with_mtp: bool) -> None:
    if with_mtp and not config.num_nextn_predict_layers:
        config = config.with_(num_nextn_predict_layers=1)
    model = make_model(config)
    for document in range(len(LENGTHS)):
        gradients = embedding_gradients(model, document, with_mtp=with_mtp)
        assert len(gradients) == 1 + with_mtp
        for grad_TD in gradients:
            for other, rows in enumerate(grad_TD.split(LENGTHS)):
                if other == document:
                    assert rows.abs().max() > 0
                else:
                    assert (rows == 0).all(), (document, other)


@pytest.mark.parametrize("sizes", [[1] * 20, [64, 1, 65, 3], [130], [7, 126]])
@torch.no_grad()
def test_any_cut_of_a_request_gives_the_same(sizes: list[int]) -> None:
    """One prefill = chunked prefill = token by token, in fp64; unused pages and slots hold NaN."""
    config = next_config(num_nextn_predict_layers=1, layer_types=("full_attention", *next_config().layer_types))
    model = make_model(config, dtype=torch.float64)
    tokens = random_tokens(config, sum(sizes))
    request = OneRequest(model, max_tokens=sum(sizes))
    pieces = [model.logits(model(request.batch(piece)).hidden_TD) for piece in tokens.split(sizes)]
    assert (torch.cat(pieces) - logits_of(model, tokens)).abs().max() < 1e-10
