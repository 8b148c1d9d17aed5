"""The trunk and the causal language model around it.

Legend: T tokens, D hidden, Y vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qnext import ops
from qnext.config import LINEAR_ATTENTION, ModelConfig
from qnext.model.attention import Attention
from qnext.model.batch import Batch
from qnext.model.delta_net import GatedDeltaNet
from qnext.model.layers import MLP, Embedding, Linear, RotaryEmbedding, is_plain, keeps_bits, make_norm
from qnext.model.moe import SparseMoE
from qnext.model.mtp import MultiTokenPredictor


class DecoderLayer(nn.Module):
    """h <- h + mixer(norm(h)); h <- h + feed_forward(norm(h))."""

    def __init__(self, config: ModelConfig, layer_index: int, *, kind: str, is_moe: bool) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.is_linear = kind == LINEAR_ATTENTION
        self.is_moe = is_moe
        self.is_recomputed = False  # keeps its input alone for the backward pass, which computes the rest again
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config, layer_index)
        else:
            self.self_attn = Attention(config, layer_index)
        self.mlp: nn.Module = SparseMoE(config) if is_moe else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)

    def forward(self, hidden_TD: Tensor, batch: Batch, rope: ops.Rope) -> Tensor:
        if not (self.is_recomputed and torch.is_grad_enabled()):
            return self._compute(hidden_TD, batch, rope)
        # A layer draws no random numbers.
        compute = ops.in_this_mode(self._compute)
        return checkpoint(compute, hidden_TD, batch, rope, use_reentrant=False, preserve_rng_state=False)

    def _compute(self, hidden_TD: Tensor, batch: Batch, rope: ops.Rope) -> Tensor:
        norm = self.input_layernorm
        if self.is_linear:
            if is_plain(self.linear_attn, GatedDeltaNet):
                mid_TD = self.linear_attn.add_to(hidden_TD, norm, batch)
            else:
                mid_TD = ops.add(hidden_TD, self.linear_attn(norm(hidden_TD), batch))
        elif is_plain(self.self_attn, Attention):
            mid_TD = self.self_attn.add_to(hidden_TD, norm, batch, rope)
        else:
            mid_TD = ops.add(hidden_TD, self.self_attn(norm(hidden_TD), batch, rope))
        return self.finish(mid_TD, batch)

    def finish(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """The second half: what comes after the mixer was added."""
        mlp, norm, how = self.mlp, self.post_attention_layernorm, self._routing(batch) if self.is_moe else {}
        if isinstance(mlp, (SparseMoE, MLP)) and (is_plain(mlp, SparseMoE) or is_plain(mlp, MLP)):
            return mlp.add_to(hidden_TD, norm, **how)
        return ops.add(hidden_TD, mlp(norm(hidden_TD), **how))

    def _routing(self, batch: Batch) -> dict[str, Any]:
        """What the router replays, and where it counts and writes: see SparseMoE.route."""
        chosen_TA, cache = batch.routing.get(self.layer_index), batch.cache
        if cache is None:
            return {"chosen_TA": chosen_TA}
        load_E, pages = cache.load_of(self.layer_index), cache.kept_routing(self.layer_index)
        return {"load_E": load_E, "chosen_TA": chosen_TA, "pages": pages}


class TrunkOutput(NamedTuple):
    hidden_TD: Tensor  # after the final norm: what the head and the MTP module read
    residual_TD: Tensor  # before it


class Transformer(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, kind=kind, is_moe=config.is_moe_layer(i))
            for i, kind in enumerate(config.layer_types)
        )
        self.norm = make_norm(config, config.hidden_size)
        self.rotary = RotaryEmbedding(config)

    def forward(self, batch: Batch) -> TrunkOutput:
        hidden_TD = self.embed_tokens(batch.token_ids_T)
        rope = self.rotary(batch.positions_T)
        for layer in self.layers:
            hidden_TD = layer(hidden_TD, batch, rope)
        return TrunkOutput(self.norm(hidden_TD), hidden_TD)


class CausalLM(nn.Module):
    """A whole model. Parameter names are those of the released checkpoints, experts stacked.

    >>> with torch.device("meta"):
    ...     model = CausalLM(preset("80b-a3b"))
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.set_weight("weight", self.model.embed_tokens.get_parameter("weight"))
        self.mtp: MultiTokenPredictor | None = None
        if config.num_nextn_predict_layers:
            layer_index = config.num_hidden_layers
            # The MTP layer is never linear; it is sparse where the trunk is.
            layer = DecoderLayer(config, layer_index, kind="full_attention", is_moe=config.num_experts > 0)
            self.mtp = MultiTokenPredictor(config, layer)

    @property
    def device(self) -> torch.device:
        return next(self.model.embed_tokens.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.embed_tokens.parameters()).dtype

    @property
    @torch.no_grad()
    def is_cut_invariant(self) -> bool:
        """Whether inference gives a row the same bits wherever its sequence is cut and whatever else is in the batch.

        It does where kernels serve every op of trunk and head. Drafts only guess: the MTP layer is not asked.
        """
        backend = ops.backend_of(self.device)
        is_in_its_width = ops.activation_dtype(next(self.model.embed_tokens.parameters())) == backend.activation_dtype
        parts = (*self.model.modules(), *self.lm_head.modules())
        return backend.is_cut_invariant and is_in_its_width and all(map(keeps_bits, parts))

    def stretch(self, factor: float) -> None:
        """Stretch the context by static YaRN from now on. Weights stay unchanged. Caches made before no longer fit."""
        self.config = self.config.with_yarn(factor)
        self.model.rotary = RotaryEmbedding(self.config)

    def forward(self, batch: Batch) -> TrunkOutput:
        """Hidden states of the trunk. `logits` turns rows of them into scores."""
        return self.model(batch)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, D] rows of TrunkOutput.hidden_TD or of the MTP output -> [R, Y] in the dtype of the rows."""
        return self.lm_head(hidden_RD)

    def draft_hidden(self, next_token_ids_T: Tensor, trunk: TrunkOutput, batch: Batch) -> Tensor:
        """[T, D]: row i is computed from the trunk's row i and the token after it, and predicts the token after that
        one.

        `batch` gives packing, positions and cache; its token ids are not read. Needs num_nextn_predict_layers = 1.
        """
        return self.draft_step(next_token_ids_T, self.draft_source(trunk), batch)

    def draft_source(self, trunk: TrunkOutput) -> Tensor:
        """[T, D]: the rows of the trunk that the MTP layer reads."""
        return trunk.hidden_TD if self.config.mtp_uses_final_norm else trunk.residual_TD

    def draft_step(self, next_token_ids_T: Tensor, source_TD: Tensor, batch: Batch) -> Tensor:
        """[T, D]: as `draft_hidden`, from rows of `draft_source` or of this function's own result. In the second case
        row i stands for a drafted token, one position later."""
        assert self.mtp is not None
        rope = self.model.rotary(batch.positions_T)
        return self.mtp(self.model.embed_tokens(next_token_ids_T), source_TD, batch, rope)
