"""The loss on samples that are not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qnext.model import CausalLM
from qnext.training.losses import head_loss_sum
from qnext.training.samples import SampleSet, in_order


@dataclass(frozen=True)
class HeldOutLoss:
    """In nats per learnt token."""

    loss: float
    num_samples: int
    num_learned: int

    @property
    def cost(self) -> float:
        return self.loss

    @property
    def summary(self) -> str:
        return f"held-out loss {self.loss:.4f} ({self.num_samples} samples, {self.num_learned} tokens)"


@torch.no_grad()
def held_out_loss(model: CausalLM, samples: SampleSet, *, tokens_per_batch: int, limit: int = 512) -> HeldOutLoss:
    """Over the first `limit` samples, packed as in training."""
    total, num_learned, count = 0.0, 0, min(limit, len(samples))
    for batch in in_order((samples[index] for index in range(count)), samples.kind, tokens_per_batch=tokens_per_batch):
        batch = batch.to(model.device)
        total += float(head_loss_sum(model, model(batch.batch).hidden_TD, batch.labels_T))
        num_learned += batch.num_labels
    return HeldOutLoss(total / max(1, num_learned), count, num_learned)
