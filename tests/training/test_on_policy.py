"""On-policy distillation: the reverse divergence over the whole vocabulary, as its formula has it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qnext.model import CausalLM
from qnext.training.data import IGNORED, Document, TrainBatch
from qnext.training.losses import RouterTap
from qnext.training.objective import Losses, TrainStep
from qnext.training.on_policy import ReverseDistillation
from qnext.training.samples import DOCUMENTS
from tests.training.models import VOCAB, tiny_model
from tests.training.test_samples import samples

LENGTHS = [12, 40, 7, 21]
MTP = 0.4


def objective() -> ReverseDistillation:
    """A dense teacher of another width, whose vocabulary has rows without a token."""
    sizes = {"num_experts": 0, "intermediate_size": 30, "hidden_size": 16, "vocab_size": VOCAB + 3}
    return ReverseDistillation(tiny_model(seed=5, dtype=torch.float64, **sizes), VOCAB, mtp=MTP)


def losses_of(model: CausalLM, batch: TrainBatch, batches: list[TrainBatch] | None = None) -> Losses:
    tap = RouterTap(model)
    try:
        return objective()(model, batch, TrainStep(batches or [batch], 0.0, tap))
    finally:
        tap.close()


def plain(student: CausalLM, documents: list[Document]) -> Tensor:
    """Row by row, a document at a time, of main loss and MTP loss."""
    sums, counts = [torch.zeros(()), torch.zeros(())], [0, 0]
    for document in documents:
        rows = DOCUMENTS.pack([document])
        teacher = objective().teacher
        with torch.no_grad():
            log_p = teacher.logits(teacher(rows.batch).hidden_TD)[:, :VOCAB].log_softmax(-1)
        trunk = student(rows.batch)
        drafts = student.draft_hidden(rows.next_ids_T, trunk, rows.batch)
        for which, (hidden, labels) in enumerate(((trunk.hidden_TD, rows.labels_T), (drafts, rows.mtp_labels_T))):
            for row in torch.nonzero(labels != IGNORED).flatten().tolist():
                q = student.logits(hidden[row : row + 1])[0].softmax(-1)
                sums[which] = sums[which] + (q * (q.log() - log_p[row + which])).sum()
                counts[which] += 1
    return sums[0] / counts[0] + MTP * sums[1] / counts[1]


def test_the_loss_is_its_plain_formula_however_the_step_is_cut() -> None:
    model, documents = tiny_model(dtype=torch.float64), samples(LENGTHS)
    parameters = list(model.parameters())
    expected = plain(model, documents)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for cuts in ([documents], [documents[:1], documents[1:3], documents[3:]]):
        batches = [DOCUMENTS.pack(cut) for cut in cuts]
        total = sum((losses_of(model, batch, batches).total for batch in batches), torch.zeros(()))
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
        for one, other in zip(torch.autograd.grad(total, parameters, allow_unused=True), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-11)


def test_a_document_has_no_gradient_in_the_loss_of_another() -> None:
    model, batch, seen = tiny_model(dtype=torch.float64), DOCUMENTS.pack(samples(LENGTHS)), []
    starts = np.cumsum([0, *batch.batch.packing.lengths])
    inside = torch.zeros(batch.num_tokens, dtype=torch.bool)
    inside[starts[1] : starts[2]] = True
    alone = batch._replace(
        labels_T=batch.labels_T.masked_fill(~inside, IGNORED),
        mtp_labels_T=batch.mtp_labels_T.masked_fill(~inside, IGNORED),
    )

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.model.embed_tokens.register_forward_hook(keep)
    for gradient in torch.autograd.grad(losses_of(model, alone).total, seen):
        assert gradient[~inside].eq(0).all() and gradient[inside].abs().sum() > 0
    assert len(seen) == 2, "the trunk's embeddings, and those of the MTP module"
