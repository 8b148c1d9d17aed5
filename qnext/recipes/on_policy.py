"""On-policy distillation: the student's own engine writes answers, and the teacher says how to write them better."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from qnext.engine import SamplingParams
from qnext.errors import UsageError
from qnext.model import Batch, CausalLM
from qnext.recipes.distill import check_teacher
from qnext.recipes.drawing import DrawnTogether
from qnext.recipes.methods import Base
from qnext.recipes.rollouts import Draw, draw_answers
from qnext.recipes.sft import Sft, SftConfig
from qnext.session.folder import load_weights, open_folder
from qnext.text.lessons import Taught, Teacher
from qnext.training import TrainBatch, TrainConfig, TrainSource
from qnext.training.build import Tokenizing
from qnext.training.data import Document
from qnext.training.on_policy import ReverseDistillation
from qnext.training.samples import DOCUMENTS, SampleSet, SampleStream, in_order
from qnext.training.shards import DataShard

_NUM_HELD_OUT = 64


@dataclass(frozen=True)
class OnPolicyConfig(SftConfig):
    """The choices of on-policy distillation. Raises UsageError naming what is impossible."""

    epochs: float = 1.0
    taught: Taught = "last"  # the last answer of a conversation is what the student writes itself
    teacher: str = ""  # a model
    max_tokens: int = 256  # of an answer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taught != "last":
            raise UsageError("taught must be last: the student writes the last answer of a conversation")
        if not self.teacher:
            raise UsageError("--teacher MODEL is missing")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, not {self.max_tokens}")


class PromptBatch(NamedTuple):
    """Prompts whose answers fit into one micro batch."""

    prompts: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def batch(self) -> Batch:
        ids = torch.tensor([token for prompt in self.prompts for token in prompt])
        return Batch.from_lengths(ids, [len(prompt) for prompt in self.prompts])

    def to(self, device: torch.device) -> PromptBatch:
        return self


@dataclass(frozen=True)
class PromptKind:
    """Samples that are documents, of which the prompt alone is read: what stands before the last learnt tokens. Of a
    text, all of which is learnt, that is its first half."""

    max_tokens: int

    def num_rows(self, sample: Document) -> int:
        return len(prompt_of(sample)) + self.max_tokens - 1

    def pack(self, samples: Sequence[Document]) -> PromptBatch:
        return PromptBatch([prompt_of(sample) for sample in samples])


def prompt_of(document: Document) -> list[int]:
    """
    >>> prompt_of(np.array([~5, ~6, 7, 8])), prompt_of(np.array([~5, 6, 7, 8]))
    ([5, 6], [5, 6])
    """
    unlearned = np.flatnonzero(document < 0)
    end = int(unlearned[-1]) + 1 if len(unlearned) else 0
    end = end if end > 1 else max(1, len(document) // 2)
    return np.where(document < 0, ~document, document)[:end].tolist()


class AnswerWriting(NamedTuple):
    """What writes answers of at most `max_tokens`. An answer ends where the `context` of the model does."""

    draw: Draw
    context: int
    max_tokens: int
    num_tokens: int  # of the vocabulary
    end_ids: frozenset[int]


def written(writer: AnswerWriting, prompts: Sequence[Sequence[int]], *, seed: int) -> list[list[int]]:
    """An answer to each prompt, drawn at temperature 1."""
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=max(1, min(writer.max_tokens, writer.context - len(prompt))),
            seed=int.from_bytes(_hash(f"{seed}/{place}", 4), "little"),
        )
        for place, prompt in enumerate(prompts)
    ]
    return [list(each.output_ids) for each in writer.draw(prompts, params, end_ids=writer.end_ids)]


class WrittenSource:
    """A TrainSource of answers that the model writes when a micro batch is asked for. What it writes depends on the
    model, the seed and the place of the prompts alone, so a resumed run writes the same."""

    def __init__(self, writer: AnswerWriting, prompts: SampleStream) -> None:
        self._writer, self._prompts = writer, prompts

    @property
    def epoch(self) -> int:
        return self._prompts.epoch

    @property
    def num_tokens(self) -> int:
        return self._prompts.num_tokens

    @property
    def position(self) -> Mapping[str, Any]:
        return self._prompts.position

    def seek(self, position: Mapping[str, Any]) -> None:
        self._prompts.seek(position)

    def next_batch(self) -> TrainBatch:
        seed = int.from_bytes(_hash(json.dumps(self.position), 7), "little")
        return answered(self._writer, self._prompts.next_batch().prompts, seed=seed)


def answered(writer: AnswerWriting, prompts: Sequence[list[int]], *, seed: int) -> TrainBatch:
    """Prompts and the answers that are written to them, which alone have labels. An answer ends before a row of the
    vocabulary that has no token; where it begins with one, with the first that has."""
    documents = []
    for prompt, answer in zip(prompts, written(writer, prompts, seed=seed), strict=True):
        end = next((place for place, token in enumerate(answer) if token >= writer.num_tokens), len(answer))
        documents.append(np.array([*(~token for token in prompt), *(answer[:end] or [0])], dtype=np.int32))
    return DOCUMENTS.pack(documents)


@dataclass(frozen=True)
class HeldOutAnswers:
    """What the teacher makes of answers to prompts that are not trained on, in nats per token."""

    divergence: float
    mean_length: float
    num_answers: int

    @property
    def cost(self) -> float:
        return self.divergence

    @property
    def summary(self) -> str:
        return (
            f"held-out divergence to the teacher {self.divergence:.4f} ({self.num_answers} answers of "
            f"{self.mean_length:.1f} tokens)"
        )


class OnPolicy:
    """On-policy distillation as a Method. It keeps the teacher from `sets` on, so each run has one of its own. Of
    several processes each has a whole student to write with, and a whole teacher."""

    sample = "prompts"
    config = OnPolicyConfig
    asks_model = True

    def __init__(self) -> None:
        self._teacher: CausalLM | None = None
        self._drawn: DrawnTogether | None = None
        self._num_tokens = 0

    def tokenizing(self, config: OnPolicyConfig, teacher: Teacher, **facts: Any) -> Tokenizing:
        """Raises UsageError where the teacher has another vocabulary."""
        check_teacher(config.teacher, teacher.tokenizer)
        return Sft().tokenizing(config, teacher, **facts)

    def train_values(self, *, lr: float, sequence_length: int) -> dict[str, Any]:
        return {"tokens_per_batch": max(2 * sequence_length, 4096)}

    def sets(self, config: OnPolicyConfig, sources: Sequence[Sequence[DataShard]], base: Base) -> list[SampleSet]:
        folder = open_folder(config.teacher)
        self._num_tokens = folder.tokenizer.vocab_size
        self._teacher = load_weights(folder, progress=base.progress).eval().requires_grad_(False)
        return [SampleSet(shards, kind=PromptKind(config.max_tokens)) for shards in sources]

    def source(self, config: OnPolicyConfig, stream: SampleStream, base: Base) -> TrainSource:
        if base.ranks.num_cuts > 1:
            raise UsageError("--context-parallel: a teacher that is asked on the way reads whole rows; leave it out")
        self._drawn = DrawnTogether(base.model, base.ranks)
        return WrittenSource(self._writer(config, base.model, self._drawn), stream)

    def _writer(self, config: OnPolicyConfig, model: CausalLM, draw: Draw) -> AnswerWriting:
        ends = frozenset(model.config.eos_token_ids)
        return AnswerWriting(draw, model.config.max_position_embeddings, config.max_tokens, self._num_tokens, ends)

    def objective(self, config: OnPolicyConfig, train: TrainConfig) -> ReverseDistillation:
        assert self._teacher is not None
        return ReverseDistillation.of(self._teacher, self._num_tokens, train)

    @torch.no_grad()
    def evaluate(
        self, config: OnPolicyConfig, model: CausalLM, held_out: SampleSet, train: TrainConfig
    ) -> HeldOutAnswers:
        """On answers to the first prompts, drawn by the same numbers every time."""
        objective, kind = self.objective(config, train), PromptKind(config.max_tokens)
        total, lengths, count = 0.0, 0, min(_NUM_HELD_OUT, len(held_out))
        samples = (held_out[index] for index in range(count))
        assert self._drawn is not None
        model = self._drawn.whole()
        writer = self._writer(config, model, partial(draw_answers, model))
        for seed, batch in enumerate(in_order(samples, kind, tokens_per_batch=train.tokens_per_batch)):
            rows = answered(writer, batch.prompts, seed=seed).to(model.device)
            at = torch.nonzero(rows.labels_T >= 0).squeeze(1)
            total += float(objective.total(model, model(rows.batch).hidden_TD[at], objective.given(rows)[at]))
            lengths += rows.num_labels
        return HeldOutAnswers(total / max(1, lengths), lengths / max(1, count), count)


def _hash(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()
