"""The demo's model as one that answers: an Instruct and a Thinking variant, taught by questions with known answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.errors import UsageError, did_you_mean
from qnext.eval import EvalDocument, evaluate_perplexity
from qnext.files import write_file
from qnext.model import CausalLM
from qnext.recipes.code import standard_library
from qnext.recipes.questions import Question, messages, questions
from qnext.recipes.tuning import TuningData
from qnext.recipes.tuning_task import TuningTask
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message
from qnext.text.prompts import ChatPrompt
from qnext.text.thinking import THINK_END
from qnext.training.sources import take_bytes, tokenize

# Training goes on with the library beside the questions, so that the model keeps what it knew.
_TESTED_BYTES = 100_000
_SETTINGS = (
    "time_budget=155",
    "weights=4,1",
    "held_out=0",
    "optimizer=muon",
    "lr=4e-3",
    "muon_lr=1e-3",
    "tokens_per_batch=2048",
    "accumulation=2",
    "parallel_batches=2",
    "sequence_length=256",
    "decay_fraction=0.8",
    "mtp_coefficient=0.1",
    "mtp_start=0.7",
    "balance_coefficient=0.01",
    "eval_every=0",
    "snapshot_every=50",
)
_GREEDY = {"do_sample": False, "temperature": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class ChatRecipe:
    """A variant of a base. `thinks`: answers begin with a thought."""

    name: str
    thinks: bool
    settings: tuple[str, ...] = _SETTINGS
    num_questions: int = 30_000
    num_bytes: int = 3_000_000  # of texts of the library
    num_tested: int = 400  # held-out questions

    def task(self, base: str, folder: Path, settings: Sequence[str]) -> TuningTask:
        """Write the questions and texts into the folder of the run, and make the task of them."""
        asked = questions(self.num_questions, seed=0, held_out=False)
        texts = take_bytes(standard_library(held_out_share=0.05).train, limit=self.num_bytes)
        data: dict[str, list[dict[str, Any]]] = {
            "questions.jsonl": [messages(each, thinks=self.thinks) for each in asked],
            "library.jsonl": [{"text": each.text} for each in texts],
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in data.items():
            write_file(folder / name, "".join(json.dumps(value) + "\n" for value in values))
        paths = tuple(str((folder / name).absolute()) for name in data)
        template = "thinking" if self.thinks else "instruct"
        return TuningTask(base, paths, template, (*self.settings, *settings), _GREEDY, recipe=self.name)


RECIPES = {each.name: each for each in (ChatRecipe("instruct", False), ChatRecipe("thinking", True))}


def chat_recipe(name: str) -> ChatRecipe:
    """The recipe called `name`; UsageError lists the known names."""
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}; known: {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class Answers:
    """How many held-out questions a model answers, in all and by kind, and what it still knows of the library."""

    num_right: int
    num_asked: int
    right_by_kind: Mapping[str, float] = field(default_factory=dict)
    bits_per_byte: float = 0.0

    @property
    def cost(self) -> float:
        return 1.0 - self.num_right / self.num_asked

    @property
    def summary(self) -> str:
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in self.right_by_kind.items())
        return (
            f"{self.num_right} of {self.num_asked} held-out questions right ({self.num_right / self.num_asked:.1%}: "
            f"{kinds}); held-out files {self.bits_per_byte:.4f} bits per byte"
        )


class Examination:
    """Asks a model `num_questions` held-out questions, greedily, and measures it on held-out files of the library.

    `folder` is that of the tokenizer and its template.
    """

    def __init__(self, data: TuningData, folder: Path, *, num_questions: int) -> None:
        self._tokenizer, self._folder = data.tokenizer, folder
        self._questions = questions(num_questions, seed=0, held_out=True)
        (end_id,) = data.base.config.eos_token_ids[:1]
        texts = [file.text for file in take_bytes(standard_library(held_out_share=0.05).held_out, limit=_TESTED_BYTES)]
        self._documents = [
            EvalDocument(ids.tolist(), len(text.encode()))
            for ids, text in zip(tokenize(texts, self._tokenizer, end_id=end_id), texts, strict=True)
        ]

    def __call__(self, model: CausalLM) -> Answers:
        answers = self._ask(model)
        right: dict[str, list[bool]] = {}
        for question, answer in zip(self._questions, answers, strict=True):
            right.setdefault(question.kind, []).append(answer == question.answer)
        perplexity = evaluate_perplexity(model, self._documents, sequence_length=512, tokens_per_batch=2048)
        return Answers(
            sum(map(sum, right.values())),
            len(self._questions),
            {kind: sum(marks) / len(marks) for kind, marks in right.items()},
            perplexity.bits_per_byte,
        )

    def _ask(self, model: CausalLM) -> list[str]:
        chat_format = ChatFormat.for_folder(self._folder, tokenizer=self._tokenizer)
        prompts = [_prompt(question, chat_format, self._tokenizer) for question in self._questions]
        config = EngineConfig(max_num_seqs=32, max_model_len=160, eos_token_ids=self._tokenizer.eos_ids)
        engine = Engine.of(model, config)
        done = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=64))
        texts = [self._tokenizer.decode(list(request.output_ids), skip_special=True) for request in done]
        return [text.rpartition(THINK_END)[2].strip() for text in texts]


def _prompt(question: Question, chat_format: ChatFormat, tokenizer: Any) -> list[int]:
    return ChatPrompt([Message("user", question.text)]).encode(chat_format, tokenizer).token_ids
