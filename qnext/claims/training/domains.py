"""Texts of three kinds that every machine has: code, prose and arithmetic."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from qnext.claims.training.texts import eval_documents, learnt_tokenizer
from qnext.eval import EvalDocument
from qnext.recipes.code import standard_library
from qnext.recipes.sums import exercises
from qnext.training.data import Document
from qnext.training.sources import TextFile, split_by_package, take_bytes, tokenize

DOMAINS = ("code", "prose", "arithmetic")
_SUMS_OF_A_TEXT = 40


@dataclass(frozen=True)
class DomainTexts:
    """Documents of all domains to train on, and held-out ones by domain."""

    train: list[Document]
    held_out: Mapping[str, list[EvalDocument]]
    end_id: int


@cache
def domain_texts(vocab_size: int, *, train_bytes: int, held_out_bytes: int) -> DomainTexts:
    """As many bytes of each domain. Code is split by package, prose by topic, sums by their seed."""
    sides = {"code": _code(), "prose": _prose(), "arithmetic": (_sums("train", 4000), _sums("held out", 400))}
    train = {name: take_bytes(side[0], limit=train_bytes) for name, side in sides.items()}
    files = [file for name in DOMAINS for file in train[name]]
    tokenizer = learnt_tokenizer(files, vocab_size)
    (end_id,) = tokenizer.eos_ids
    held_out = {
        name: eval_documents(take_bytes(side[1], limit=held_out_bytes), tokenizer) for name, side in sides.items()
    }
    return DomainTexts(tokenize([file.text for file in files], tokenizer, end_id=end_id), held_out, end_id)


def _code() -> tuple[list[TextFile], list[TextFile]]:
    corpus = standard_library(held_out_share=0.05)
    return corpus.train, corpus.held_out


def _prose() -> tuple[list[TextFile], list[TextFile]]:
    """The language reference that `help` shows, topic by topic."""
    topics = importlib.import_module("pydoc_data.topics").topics
    files = [TextFile(name, name, text) for name, text in sorted(topics.items())]
    return split_by_package(files, held_out_share=0.15)


def _sums(seed: str, count: int) -> list[TextFile]:
    """Sums of two numbers with their working, many to a text."""
    made = exercises(count * _SUMS_OF_A_TEXT, seed=f"claims {seed}")
    lines = [f"{each.question}: {each.thought}; {each.answer}\n" for each in made]
    starts = range(0, len(lines), _SUMS_OF_A_TEXT)
    return [
        TextFile(f"{seed}-{start}", f"{start}", "".join(lines[start : start + _SUMS_OF_A_TEXT])) for start in starts
    ]
