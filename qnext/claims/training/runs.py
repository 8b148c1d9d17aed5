"""A small model, trained on text or on recall, or read from where an earlier call left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from qnext import ops
from qnext.checkpoint import load_model, save_model
from qnext.claims.training.arms import Arm, RunBudget
from qnext.claims.training.texts import CodeText
from qnext.eval import EvalDocument, evaluate_perplexity
from qnext.eval.ids import IdShape, id_problems
from qnext.model import Batch, CausalLM, initialize
from qnext.planning.expert_shape import expert_shape
from qnext.training import Losses, NextToken, PackedStream, TrainBatch, TrainConfig, Trainer, TrainStep
from qnext.training.data import Document
from qnext.training.losses import RouterTap, expert_counts


@dataclass(frozen=True)
class MicroBatchBalance(NextToken):
    """NextToken, but each micro batch balances the experts over its own tokens alone."""

    def __call__(self, model: CausalLM, batch: TrainBatch, step: TrainStep) -> Losses:
        return super().__call__(model, batch, step._replace(counts_LE=None))


def trained(arm: Arm, budget: RunBudget, documents: Sequence[Document], *, seed: int, folder: Path) -> CausalLM:
    """The arm after its budget. Where `folder` holds it, it is read; otherwise it is trained and written there."""
    if (folder / "config.json").exists():
        return load_model(folder).eval()
    model = CausalLM(arm.config(budget.base))
    initialize(model, seed=seed)
    config = _train_config(arm, budget, seed=seed)
    stream = PackedStream(
        documents, tokens_per_batch=config.tokens_per_batch, sequence_length=config.sequence_length, seed=seed
    )
    objective = (MicroBatchBalance if arm.micro_batch_balance else NextToken).of(config)
    Trainer(model, stream, config, objective=objective).run()
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, folder)
    return model.eval()


def _train_config(arm: Arm, budget: RunBudget, *, seed: int) -> TrainConfig:
    return TrainConfig(
        lr=budget.lr,
        muon_lr=budget.muon_lr,
        tokens_per_batch=budget.tokens_per_step // arm.micro_batches,
        accumulation=arm.micro_batches,
        sequence_length=budget.sequence_length,
        total_steps=budget.steps(arm),
        optimizer="muon",
        seed=seed,
        decay_fraction=0.5,
        mtp_coefficient=0.0 if budget.base.num_nextn_predict_layers == 0 else 0.1,
        expert_stats_every=0,
        health_every=0,
    )


def text_measures(model: CausalLM, text: CodeText, *, sequence_length: int) -> dict[str, float]:
    """Bits per byte on held-out text, and how evenly it uses the experts: means over the layers."""
    found = evaluate_perplexity(model, text.held_out, sequence_length=sequence_length)
    counts_LE = expert_loads(model, text.held_out, length=sequence_length)
    shape = expert_shape(counts_LE)
    return {
        "bits_per_byte": found.bits_per_byte,
        "max_over_mean": float((1 / shape.balance_L).mean()),
        "entropy": float(shape.entropy_L.mean()),
        "dead": float(shape.num_dead_L.mean()),
    }


@torch.no_grad()
def expert_loads(model: CausalLM, documents: Sequence[EvalDocument], *, length: int) -> np.ndarray:
    """int64 [layers, experts]: tokens that each expert got of the first `length` tokens of each document."""
    tap = RouterTap(model, without_gradient=True)
    total = None
    try:
        for document in documents:
            ids_T = torch.tensor(document.token_ids[:length])
            model(Batch.from_lengths(ids_T, [len(ids_T)]))
            counts = expert_counts(tap.take(), num_experts=model.config.num_experts).numpy()
            total = counts if total is None else total + counts
    finally:
        tap.close()
    assert total is not None
    return total


def recall_documents(task: str, shapes: Sequence[IdShape], count: int, *, seed: int) -> list[Document]:
    """Problems of token ids to train on, the shapes in turn. Only their answers are learnt."""
    made = [islice(id_problems(task, shape, seed=f"train {seed}"), -(-count // len(shapes))) for shape in shapes]
    documents: list[Document] = []
    for problems in zip(*made, strict=True):
        for problem in problems:
            ids = np.array(problem.token_ids, dtype=np.int32)
            coded = ~ids
            places = np.array(problem.answer_places)
            coded[places] = ids[places]
            documents.append(coded)
    return documents


def use_one_thread() -> None:
    """Small models are no faster on more threads, and runs beside each other do not wait for one another."""
    ops.set_num_threads(1)
