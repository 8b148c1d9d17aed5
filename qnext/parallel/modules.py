"""Modules in the place of a model's own, on a rank that has a part of the weights.

Legend: T tokens, D hidden, I inputs of all ranks, O outputs of all ranks, Y vocabulary, E experts, A experts per token,
P pairs of a token and an expert, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.model import CausalLM, DecoderLayer, Experts, SparseMoE
from qnext.model.batch import KeepsRouting
from qnext.model.layers import MLP, Embedding, Linear, fusable
from qnext.parallel.link import Link
from qnext.parallel.shard import VECTOR, RankShard


class OnRank(NamedTuple):
    """What makes a model one rank's part of it."""

    shard: RankShard
    link: Link


def make_sharded(shard: RankShard, link: Link) -> CausalLM:
    """A model of the sizes of one rank. Its parameters have the names of the whole model, and no values yet.

    >>> with torch.device("meta"):
    ...     model = make_sharded(shard, link)
    """
    whole, mesh = shard.whole, shard.mesh
    model = CausalLM(shard.config)
    layers = [*model.model.layers, *(() if model.mtp is None else model.mtp.layers)]
    for index, layer in enumerate(layers):
        assert isinstance(layer, DecoderLayer)
        if isinstance(layer.mlp, SparseMoE):
            layer.mlp = SparseShard(shard, index, link)
    if mesh.tensor == 1:
        return model
    hidden = whole.hidden_size
    model.model.embed_tokens = EmbeddingShard(whole.vocab_size, hidden, shard, link)
    model.lm_head = HeadShard(hidden, whole.vocab_size, shard, link)
    if whole.tie_word_embeddings:
        model.lm_head.set_weight("weight", model.model.embed_tokens.get_parameter("weight"))
    query_dim = whole.num_attention_heads * whole.head_dim
    for layer in layers:
        assert isinstance(layer, DecoderLayer)
        if layer.is_linear:
            layer.linear_attn.out_proj = OutputShard(whole.linear_value_dim, hidden, shard, link)
        else:
            layer.self_attn.o_proj = OutputShard(query_dim, hidden, shard, link, bias=whole.attention_bias)
        if isinstance(layer.mlp, MLP):
            _cut_dense(layer.mlp, shard, link)
    return model


def _cut_dense(mlp: MLP, shard: RankShard, link: Link) -> None:
    hidden, width = shard.whole.hidden_size, shard.whole.intermediate_size
    start, end = shard.mesh.span(width, unit=VECTOR)
    mlp.gate_proj, mlp.up_proj = (Linear(hidden, end - start, bias=False) for _ in range(2))
    mlp.down_proj = OutputShard(width, hidden, shard, link, unit=VECTOR)


class OutputShard(Linear):
    """Some outputs of a Linear whose inputs come from all ranks: both sides are gathered, and every sum is whole."""

    def __init__(
        self, inputs: int, outputs: int, shard: RankShard, link: Link, *, bias: bool = False, unit: int = 1
    ) -> None:
        self.in_widths, self.out_widths = shard.mesh.widths(inputs, unit=unit), shard.mesh.widths(outputs)
        super().__init__(inputs, self.out_widths[shard.mesh.part], bias=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs))
        self.link = link

    def forward(self, x_TI: Tensor) -> Tensor:
        x_TI = self.link.gather(x_TI, self.in_widths)
        out_TO = self.link.gather(ops.linear(x_TI, self.weight), self.out_widths)
        return out_TO if self.bias is None else out_TO + self.bias


class HeadShard(Linear):
    """The scores of some tokens of the vocabulary, gathered to those of all."""

    def __init__(self, inputs: int, outputs: int, shard: RankShard, link: Link) -> None:
        self.out_widths = shard.mesh.widths(outputs)
        super().__init__(inputs, self.out_widths[shard.mesh.part], bias=False)
        self.link = link

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.link.gather(super().forward(x_TD), self.out_widths)


class EmbeddingShard(Embedding):
    """The rows of some tokens. Each token's row comes from the rank that has it."""

    def __init__(self, num_rows: int, hidden: int, shard: RankShard, link: Link) -> None:
        self.first, self.end = shard.mesh.span(num_rows)
        super().__init__(self.end - self.first, hidden)
        self.widths = shard.mesh.widths(num_rows)
        self.link = link

    def forward(self, token_ids_T: Tensor) -> Tensor:
        own_TD = super().forward((token_ids_T - self.first).clamp(0, self.end - self.first - 1))
        all_TRD = self.link.gather(own_TD, [own_TD.shape[1]] * len(self.widths)).unflatten(1, (len(self.widths), -1))
        ends_R = torch.tensor(self.widths, device=token_ids_T.device).cumsum(0)
        owner_T = torch.bucketize(token_ids_T, ends_R, right=True)
        return all_TRD[torch.arange(len(token_ids_T), device=token_ids_T.device), owner_T]

    def keeps_bits(self) -> bool:
        """See model.layers.keeps_bits: rows are copied."""
        return True


class SparseShard(SparseMoE):
    """Some of the routed experts of a layer, and on one rank the shared one. What each makes of a token goes to all
    ranks, and all add that up as one process does, so that results keep their bits."""

    def __init__(self, shard: RankShard, layer: int, link: Link) -> None:
        whole, own = shard.whole, shard.stacked(layer)
        super().__init__(whole)
        self.experts = Experts(whole.with_(num_experts=len(own), num_experts_per_tok=1))
        self.has_shared = self.shared_expert is not None
        if not shard.has_shared_expert(layer):
            self.shared_expert = None
        self.link, self.rank, self.num_ranks = link, shard.mesh.rank, shard.mesh.num_ranks
        self.owner_of_shared = shard.owner_of_shared(layer)
        # On the CPU whatever the default device is: a model is made on the meta device.
        owners = shard.placement.owners(layer)
        repeated = [[ranks[n % len(ranks)] for n in range(self.num_ranks)] for ranks in owners]
        self._owners_ER = torch.tensor(repeated, device="cpu")
        self._place_E = torch.full((whole.num_experts,), -1, device="cpu")
        self._place_E[list(own)] = torch.arange(len(own), device="cpu")

    def forward(
        self,
        x_TD: Tensor,
        *,
        load_E: Tensor | None = None,
        chosen_TA: Tensor | None = None,
        pages: KeepsRouting | None = None,
    ) -> Tensor:
        routing = self.route(x_TD, load_E=load_E, chosen_TA=chosen_TA, pages=pages)
        owner_P = self._owners(routing.experts_TA).flatten()
        order_P = owner_P.argsort(stable=True)
        counts = owner_P.bincount(minlength=self.num_ranks).tolist()
        start = sum(counts[: self.rank])
        own_P = order_P[start : start + counts[self.rank]]
        try:
            made = [self._made_by_routed(x_TD, routing.experts_TA, own_P)]
        except ops.RecordError as error:  # of one expert, and the other ranks wait for rows
            self.link.tell_fault(error)
            made = [x_TD.new_full((len(own_P), x_TD.shape[1]), torch.nan)]
        places_P, num_shared = torch.arange(len(order_P), device=x_TD.device), len(x_TD) if self.has_shared else 0
        if num_shared:
            places_P += num_shared * (owner_P[order_P] > self.owner_of_shared)
            if self.shared_expert is not None:
                made.append(self.shared_expert(x_TD))
        first_shared = sum(counts[: self.owner_of_shared + 1])
        counts[self.owner_of_shared] += num_shared
        rows_PD = self.link.gather_rows(torch.cat(made), counts)
        places_TA = torch.empty_like(places_P).index_copy_(0, order_P, places_P).view_as(routing.experts_TA)
        shared = self._shared(x_TD, rows_PD[first_shared : first_shared + num_shared]) if num_shared else None
        return ops.combine_experts(rows_PD, routing.weights_TA, places_TA, shared)

    def _owners(self, experts_TA: Tensor) -> Tensor:
        """[T, A]. Which rank computes an expert that several have is decided by what else the token chose."""
        turn_T1 = experts_TA.sum(1, keepdim=True) % self.num_ranks
        return self._owners_ER.to(experts_TA.device)[experts_TA, turn_T1]

    def _made_by_routed(self, x_TD: Tensor, experts_TA: Tensor, pairs_P: Tensor) -> Tensor:
        """[P, D]: what experts of this rank make of tokens."""
        if not len(pairs_P):
            return x_TD.new_empty(0, x_TD.shape[1])
        experts_P1 = self._place_E.to(x_TD.device)[experts_TA.flatten()[pairs_P], None]
        weights_P1 = torch.ones(experts_P1.shape, device=x_TD.device)
        return self.experts(x_TD[pairs_P // experts_TA.shape[1]], ops.Routing(weights_P1, experts_P1))

    def _shared(self, x_TD: Tensor, rows_TD: Tensor) -> ops.MadeByShared:
        gate_1D = fusable(self.shared_expert_gate)
        if isinstance(gate_1D, Tensor):
            return ops.MadeByShared(x_TD, rows_TD, gate_1D)
        return ops.MadeByShared(x_TD, torch.sigmoid(self.shared_expert_gate(x_TD)) * rows_TD, None)
