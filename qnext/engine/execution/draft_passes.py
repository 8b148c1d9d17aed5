"""Passes of the MTP layer.

Row p of the layer reads the trunk's row of position p and the token at p + 1, and leads to the token at p + 2. The
trunk leaves its last rows of each sequence in the cache. Tokens that are drafted one after another take the layer's own
result for the trunk's row that is not there yet.

Legend: N sequences, T rows, R rows of one sequence, K drafted tokens one after another, D hidden, Y vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from qnext.engine.execution.cache import Cache
from qnext.engine.execution.executor import AdapterSwitch, DraftOutput
from qnext.engine.execution.inputs import DraftInputs
from qnext.engine.execution.recorded import ModelWatch, RecordedBatches
from qnext.engine.policy.draft_lengths import DraftCosts
from qnext.engine.policy.step import DraftPlan
from qnext.model import Batch, CausalLM, SparseMoE, held_bytes
from qnext.ops import argmax, embedding, put_rows

_COMPARED = 16  # rows of a "known" pass, at most


class DraftPasses:
    """Those of one model on one cache."""

    def __init__(self, model: CausalLM, cache: Cache, watch: ModelWatch, adapters: AdapterSwitch | None = None) -> None:
        self._model, self._cache, self._watch, self._adapters = model, cache, watch, adapters
        make_inputs = partial(DraftInputs, cache)
        self._chains = RecordedBatches(
            cache, watch, make_inputs, self._draft_chain, without=lambda drafts_KN, count, _: drafts_KN[:, :count]
        )
        self._passes = RecordedBatches(
            cache, watch, make_inputs, self._draft_rows, without=lambda logits_NY, count, _: logits_NY[:count]
        )
        self._known = RecordedBatches(cache, watch, make_inputs, self._compare_rows)

    @torch.inference_mode()
    def run(self, plan: DraftPlan) -> DraftOutput:
        if not plan.goes_on:
            self._watch.look()
        recurs = plan.recurs and not any(self._cache.adapters[rows.slot] for rows in plan.rows)
        if plan.kind == "chain":
            drafts_KN = self._chains.run(plan.rows, depth=plan.depth, recurs=recurs)
            return DraftOutput(drafts_KN.T.tolist(), torch.empty(0), self._chains.was_prepared)
        batches = self._passes if plan.kind == "next" else self._known
        logits_RY = batches.run(plan.rows, recurs=recurs)
        return DraftOutput([], logits_RY, batches.was_prepared)

    def _draft_rows(self, inputs: DraftInputs) -> Tensor:
        """fp32 logits [N, Y] of the last row of each sequence. Its result is kept as the source of the next one."""
        return self._next_logits(inputs, inputs.batch)

    def _draft_chain(self, inputs: DraftInputs) -> Tensor:
        """[K, N]: the most likely tokens, one after another."""
        logits_NY = self._next_logits(inputs, inputs.batch)
        for ids_N, later in zip_longest(inputs.drafts_KN.unbind(0), inputs.later):
            argmax(logits_NY, ids_N)
            if later is not None:
                logits_NY = self._next_logits(later, replace(later.batch, token_ids_T=ids_N))
        return inputs.drafts_KN

    def _next_logits(self, inputs: DraftInputs, batch: Batch) -> Tensor:
        hidden_TD = self._layer(inputs, batch)
        is_last = hidden_TD.shape[0] == len(inputs.last_rows_N)
        last_ND = hidden_TD if is_last else embedding(inputs.last_rows_N, hidden_TD)
        put_rows(last_ND, inputs.next_source_index_N, self._cache.sources.flatten(0, 1))
        return self._model.logits(last_ND).to(torch.float32)

    def _compare_rows(self, inputs: DraftInputs) -> Tensor:
        """fp32 logits of the rows that lead to known tokens, the last of them; the very last row leads to none."""
        return self._model.logits(self._layer(inputs, inputs.batch)[:-1][-_COMPARED:]).to(torch.float32)

    def _layer(self, inputs: DraftInputs, batch: Batch) -> Tensor:
        """[T, D]: what the layer makes of rows and their sources."""
        if self._adapters is not None:
            self._adapters.select(inputs.adapters_T)
        source_TD = embedding(inputs.source_index_T, self._cache.sources.flatten(0, 1))
        return self._model.draft_step(batch.token_ids_T, source_TD, batch)


def draft_costs(model: CausalLM) -> DraftCosts:
    """Of the weights of a model with an MTP layer, as they lie in memory."""
    config, mtp = model.config, model.mtp
    assert mtp is not None
    layers = [held_bytes(layer) for layer in model.model.layers]
    experts, of_mtp = (_expert_bytes(module) for module in (model.model, mtp))
    share = config.num_experts_per_tok / config.num_experts if config.num_experts else 0.0
    head = held_bytes(model.lm_head)
    return DraftCosts(
        other_bytes=sum(layers) - experts + head,
        expert_bytes=experts,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        mtp_bytes=int(held_bytes(mtp) - of_mtp * (1 - share)) + head,
    )


def _expert_bytes(module: nn.Module) -> int:
    return sum(held_bytes(below.experts) for below in module.modules() if isinstance(below, SparseMoE))
