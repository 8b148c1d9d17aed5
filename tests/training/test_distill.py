"""Distillation: what is kept of a teacher stands for all of it, exactly or on average, and comes back from the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import Batch, CausalLM
from qnext.model.transformer import TrunkOutput
from qnext.text.tokenizer import Tokenizer
from qnext.training.arrays import ArrayFile
from qnext.training.data import IGNORED
from qnext.training.distill import (
    TAUGHT,
    Distillation,
    KeptTokens,
    TaughtBatch,
    TaughtDocument,
    TeacherAnswers,
    answers_of,
    divergence,
)
from qnext.training.losses import RouterTap
from qnext.training.objective import Losses, TrainStep
from qnext.training.samples import DOCUMENTS
from qnext.training.shards import DataShard, write_shard
from qnext.training.teacher import Asking, TaughtShard, ask, check_one_vocabulary
from tests.text_folders import save_plain
from tests.training.models import VOCAB, tiny_model
from tests.training.test_samples import samples

LENGTHS = [12, 40, 7, 3, 21, 33]
TEMPERATURES = [1.0, 2.0]


def both_logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    teacher, student = 2.0 * torch.randn(2, 5, 11, dtype=torch.float64)
    return teacher, student.requires_grad_()


def exact(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_all_of_the_vocabulary_is_the_exact_divergence(temperature: float) -> None:
    teacher, student = both_logits()
    answers = answers_of(teacher, kept="top", count=11, temperature=temperature)
    found, expected = divergence(student, answers, temperature=temperature), exact(teacher, student, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_the_largest_and_the_tail_are_the_divergence_of_what_is_left_when_the_others_are_one(count: int) -> None:
    teacher, student = both_logits()
    found = divergence(student, answers_of(teacher, kept="top", count=count))
    order = teacher.argsort(-1, descending=True)
    p, q = (logits.softmax(-1).gather(1, order) for logits in (teacher, student))
    p, q = (torch.cat([each[:, :count], each[:, count:].sum(-1, keepdim=True)], -1) for each in (p, q))
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1), rtol=1e-10, atol=1e-14)
    assert (found <= exact(teacher, student, 1.0) + 1e-12).all(), "a lower bound"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_drawn_tokens_give_the_exact_divergence_and_gradient_on_average(temperature: float) -> None:
    """A fair draw leaves the interval of five standard errors, in one of 55 numbers, about once in 30,000 seeds; a
    teacher of another temperature always."""
    teacher, student = both_logits()
    generator = torch.Generator().manual_seed(1)
    draws, size = 400, 50
    found, values = [], []
    for _ in range(draws):
        answers = answers_of(teacher, kept="sampled", count=size, temperature=temperature, generator=generator)
        values.append(divergence(student, answers, temperature=temperature))
        found.append(torch.autograd.grad(values[-1].sum(), student)[0])
    gradients, estimates = torch.stack(found), torch.stack(values).detach()
    divergences = exact(teacher, student, temperature)
    assert ((estimates.mean(0) - divergences).abs() < 5 * estimates.std(0) / draws**0.5).all()
    (expected,) = torch.autograd.grad(divergences.sum(), student)
    p = (teacher / temperature).softmax(-1)
    error = (p * (1 - p) / (draws * size)).sqrt() / temperature
    assert ((gradients.mean(0) - expected).abs() < 5 * error).all()
    (other,) = torch.autograd.grad(exact(teacher, student, temperature + 1.0).sum(), student)
    assert ((gradients.mean(0) - other).abs() > 5 * error).any()


def shard_at(folder: Path) -> DataShard:
    write_shard(folder / "a.shard", samples(LENGTHS), {})
    return DataShard(folder / "a.shard")


def asked(folder: Path, asking: Asking, **more: int) -> list[TaughtShard]:
    options = {"tokens_per_batch": 50, "rows_per_file": 12, **more}
    return ask(lambda: tiny_model(seed=5), shard_at(folder), folder / "answers", asking, of="t", **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "answers").iterdir())}


@pytest.mark.parametrize("kept", ["top", "sampled"])
def test_the_loss_from_the_disk_is_that_of_the_teacher_at_hand(tmp_path: Path, kept: KeptTokens) -> None:
    """To the rounding of float16, half of the vocabulary kept; documents that stood in several files."""
    asking = Asking(kept, 26, VOCAB, temperature=2.0)
    parts = asked(tmp_path, asking)
    assert len(parts) > 2
    taught = [part[index] for part in parts for index in range(len(part))]
    assert [each.document.tolist() for each in taught] == [each.tolist() for each in samples(LENGTHS)]
    batch, student, teacher = TAUGHT.pack(taught), tiny_model(), tiny_model(seed=5)
    losses = Distillation(share=0.7, temperature=2.0)(student, batch, TrainStep([batch], 0.0, RouterTap(student)))
    is_learned = batch.rows.labels_T != IGNORED
    with torch.no_grad():
        logits, given = (each.logits(each(batch.batch).hidden_TD)[is_learned] for each in (student, teacher))
    answers = answers_of(given, kept="top", count=26, temperature=2.0) if kept == "top" else batch.answers
    expected = divergence(logits, answers, temperature=2.0).mean()
    torch.testing.assert_close(losses.values["teacher"], expected, rtol=2e-3, atol=1e-5)
    labels = torch.nn.functional.cross_entropy(logits, batch.rows.labels_T[is_learned])
    torch.testing.assert_close(losses.values["labels"], labels, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.values["main"], 0.3 * labels + 0.7 * 4.0 * losses.values["teacher"])
    if kept == "sampled":
        ids_RK, entry = batch.answers.ids_RK, 1.0 / 26
        drawn = torch.zeros(len(given), VOCAB).scatter_add(1, ids_RK, torch.full(ids_RK.shape, entry))
        likely = (given / 2.0).softmax(-1)
        chi = ((drawn.mean(0) - likely.mean(0)) / (likely.mean(0) / (26 * len(given))).sqrt()).abs()
        assert chi.max() < 5


ROUTERS = {"num_routers": 2, "num_experts": 2}
EVERYTHING = Distillation(share=0.7, temperature=2.0, mtp=0.4, router=0.3)


def losses_of(model: CausalLM, batch: TaughtBatch, objective: Distillation = EVERYTHING) -> Losses:
    tap = RouterTap(model)
    try:
        return objective(model, batch, TrainStep([batch], 0.0, tap))
    finally:
        tap.close()


def test_all_terms_are_their_plain_formulas() -> None:
    """Document by document, over the whole vocabulary; of the experts the two that the teacher takes, and the rest."""
    student, teacher = tiny_model(dtype=torch.float64), tiny_model(seed=5, dtype=torch.float64)
    taught, sums, counts = [], dict.fromkeys(("labels", "teacher", "mtp", "router"), torch.zeros(())), [0, 0]
    for document in samples(LENGTHS):
        rows = DOCUMENTS.pack([document])
        with torch.no_grad():
            given, said = routed(teacher, rows.batch)
            logits_TY = teacher.logits(given.hidden_TD)
        trunk, made = routed(student, rows.batch)
        drafts_TY = student.logits(student.draft_hidden(rows.next_ids_T, trunk, rows.batch))
        plain, learned = exact(logits_TY, student.logits(trunk.hidden_TD), 2.0), rows.labels_T != IGNORED
        for row, label in enumerate(rows.mtp_labels_T.tolist()):
            if label != IGNORED:
                loss = -drafts_TY[row].log_softmax(-1)[label]
                sums["mtp"] = sums["mtp"] + 0.3 * loss + 2.8 * exact(logits_TY[row + 1], drafts_TY[row], 2.0)
        for p, q in zip(said.softmax(-1).unbind(), made.softmax(-1).unbind(), strict=True):
            p, order = p.sort(-1, descending=True)
            p, q = (torch.cat([x[:, :2], x[:, 2:].sum(-1, keepdim=True)], -1) for x in (p, q.gather(1, order)))
            sums["router"] = sums["router"] + 0.5 * (p * (p / q).log()).sum(-1)[learned].sum()
        log_q = student.logits(trunk.hidden_TD)[learned].log_softmax(-1)
        sums["labels"] = sums["labels"] - log_q.gather(1, rows.labels_T[learned][:, None]).sum()
        sums["teacher"] = sums["teacher"] + plain[learned].sum()
        counts = [counts[0] + rows.num_labels, counts[1] + rows.num_mtp_labels]
        answers = answers_of(logits_TY[learned], kept="top", count=VOCAB, temperature=2.0)
        experts = answers_of(said[:, learned].transpose(0, 1).flatten(0, 1), kept="top", count=2)
        arrays = [TeacherAnswers(*(each.numpy() for each in one)) for one in (answers, experts)]
        arrays[1] = TeacherAnswers(*(each.reshape(-1, 2, *each.shape[1:]) for each in arrays[1]))
        taught.append(TaughtDocument(document, *arrays))
    expected = {name: value / counts[name == "mtp"] for name, value in sums.items()}
    expected["main"] = 0.3 * expected["labels"] + 2.8 * expected["teacher"]
    losses = losses_of(student, TAUGHT.pack(taught))
    for name, value in expected.items():
        torch.testing.assert_close(losses.values[name], value.detach(), rtol=1e-10, atol=0, msg=name)
    total = expected["main"] + 0.4 * expected["mtp"] + 0.3 * expected["router"]
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    ours, plain = (torch.autograd.grad(each, parameters, allow_unused=True) for each in (losses.total, total))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-11)


def routed(model: CausalLM, batch: Batch) -> tuple[TrunkOutput, Tensor]:
    """What a trunk makes of a batch, and the logits of its routers."""
    seen: list[Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(lambda *call: seen.append(call[2].logits_TE)) for gate in gates]
    trunk = model(batch)
    for hook in hooks:
        hook.remove()
    return trunk, torch.stack(seen)


def test_the_mean_is_over_the_rows_of_the_step_however_it_is_cut(tmp_path: Path) -> None:
    parts = asked(tmp_path, Asking("top", 9, VOCAB, 2.0, **ROUTERS))
    taught = [part[index] for part in parts for index in range(len(part))]
    gradients = []
    for cuts in ([taught], [taught[:1], taught[1:4], taught[4:]]):
        model, batches = tiny_model(dtype=torch.float64), [TAUGHT.pack(cut) for cut in cuts]
        for batch in batches:
            EVERYTHING(model, batch, TrainStep(batches, 0.0, RouterTap(model))).total.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_document_has_no_gradient_in_the_loss_of_another(tmp_path: Path) -> None:
    parts = asked(tmp_path, Asking("top", 9, VOCAB, 2.0, **ROUTERS))
    taught = [part[index] for part in parts for index in range(len(part))]
    model, batch, seen = tiny_model(dtype=torch.float64), TAUGHT.pack(taught), []
    starts = np.cumsum([0, *batch.batch.packing.lengths])
    inside = torch.zeros(batch.num_tokens, dtype=torch.bool)
    inside[starts[1] : starts[2]] = True
    is_learned = batch.rows.labels_T != IGNORED
    alone = batch._replace(
        rows=batch.rows._replace(
            labels_T=batch.rows.labels_T.masked_fill(~inside, IGNORED),
            mtp_labels_T=batch.rows.mtp_labels_T.masked_fill(~inside, IGNORED),
        ),
        answers=batch.answers.of(inside[is_learned]),
        routers=batch.routers.of(inside[is_learned]),
    )

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.model.embed_tokens.register_forward_hook(keep)
    losses = losses_of(model, alone)
    for gradient in torch.autograd.grad(losses.total, seen):
        assert gradient[~inside].eq(0).all() and gradient[inside].abs().sum() > 0
    assert len(seen) == 2, "the trunk's embeddings, and those of the MTP module"


@pytest.mark.parametrize("kept", ["top", "sampled"])
def test_a_killed_writer_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: KeptTokens
) -> None:
    from qnext.training import teacher

    asking = Asking(kept, 8, VOCAB, **ROUTERS)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    asked(whole, asking)
    write, made = teacher.write_arrays, []

    def killed(path: Path, *arguments: object) -> None:
        if len(made) % 2:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(path.name)
        write(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher, "write_arrays", killed)
    for _ in range(9):
        try:
            asked(cut, asking)
            break
        except KeyboardInterrupt:
            continue
    names = [name for name in made if name != "killed"]
    assert "killed" in made and len(names) == len(set(names)), "nothing is made twice"
    assert contents(cut) == contents(whole)


def test_files_of_other_choices_or_data_or_damaged_ones_are_made_again(tmp_path: Path) -> None:
    asked(tmp_path, Asking("sampled", 8, VOCAB))
    before = contents(tmp_path)
    path = tmp_path / "answers" / next(iter(before))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="damaged; it is made again"):
        asked(tmp_path, Asking("sampled", 8, VOCAB))
    assert contents(tmp_path) == before
    asked(tmp_path, Asking("sampled", 8, VOCAB, seed=1))
    other = contents(tmp_path)
    assert all(other[name] != data for name, data in before.items())
    write_shard(tmp_path / "a.shard", samples(LENGTHS, seed=1), {})
    options = {"tokens_per_batch": 50, "rows_per_file": 12}
    choices = Asking("sampled", 8, VOCAB, seed=1)
    ask(lambda: tiny_model(seed=5), DataShard(tmp_path / "a.shard"), tmp_path / "answers", choices, of="t", **options)  # type: ignore[arg-type]
    again = contents(tmp_path)
    assert all(again[name] != data for name, data in other.items() if name in again)


@pytest.mark.parametrize("kept", ["top", "sampled"])
@pytest.mark.parametrize(("budget", "num_tokens"), [(48, 50_000), (48, 151_936), (10, 70_000), (1000, 53)])
def test_a_budget_is_kept_and_used(tmp_path: Path, kept: KeptTokens, budget: int, num_tokens: int) -> None:
    """By what is on the disk too, where the vocabulary is that of the models."""
    routers = ROUTERS if budget > 40 else {}
    asking = Asking.within(budget, kept, num_tokens, **routers)
    entry = (4 if num_tokens > 65536 else 2) + (2 if kept == "top" else 0)
    assert asking.bytes_per_row <= budget
    assert asking.bytes_per_row + entry > budget or asking.count == num_tokens
    if num_tokens == VOCAB:
        parts = asked(tmp_path, asking)
        stored = sum(array.nbytes for part in parts for array in ArrayFile(part.path).arrays.values())
        num_learned = sum((document[1:] >= 0).sum() for document in samples(LENGTHS))
        assert stored == num_learned * asking.bytes_per_row
    with pytest.raises(UsageError, match="a budget of 1 bytes per token"):
        Asking.within(1, kept, num_tokens)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    ours, theirs = save_plain(tmp_path / "ours"), save_plain(tmp_path / "theirs")
    for file in theirs.glob("*token*.json"):
        file.write_text(file.read_text(encoding="utf-8").replace("<tool_call>", "<tool_kall>"), encoding="utf-8")
    student, teacher = (Tokenizer.from_folder(folder) for folder in (ours, theirs))
    assert check_one_vocabulary(student, student, names=("x", "y")) == student.vocab_size
    with pytest.raises(UsageError, match=r"models/x has another vocabulary than ours: 1 tokens differ, .* token 259, "):
        check_one_vocabulary(student, teacher, names=("ours", "models/x"))
