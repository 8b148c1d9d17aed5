"""The texts of the small models: Python that every machine has, as tokens of a vocabulary learnt on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from qnext.eval import EvalDocument
from qnext.files import scratch_folder
from qnext.recipes.code import standard_library
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import END_OF_TEXT, save_tokenizer, train_bpe
from qnext.training.data import Document
from qnext.training.sources import TextFile, take_bytes, tokenize


@dataclass(frozen=True)
class CodeText:
    """Documents to train on and documents of other packages; `tokenizer` is the one that made both."""

    train: list[Document]
    held_out: list[EvalDocument]
    end_id: int
    about: str


@cache
def code_text(vocab_size: int, *, train_bytes: int, held_out_bytes: int) -> CodeText:
    """The standard library of this Python, without its tests, split by package. Made once in a process."""
    corpus = standard_library(held_out_share=0.05)
    files = take_bytes(corpus.train, limit=train_bytes)
    tokenizer = learnt_tokenizer(files, vocab_size)
    (end_id,) = tokenizer.eos_ids
    held_out = eval_documents(take_bytes(corpus.held_out, limit=held_out_bytes), tokenizer)
    train = tokenize([file.text for file in files], tokenizer, end_id=end_id)
    return CodeText(train, held_out, end_id, corpus.description)


def learnt_tokenizer(files: list[TextFile], vocab_size: int) -> Tokenizer:
    learned = train_bpe((file.text for file in files), vocab_size=vocab_size)
    with scratch_folder() as folder:
        save_tokenizer(learned, folder, model_max_length=8192, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
        return Tokenizer.from_folder(folder, num_rows=vocab_size)


def eval_documents(files: list[TextFile], tokenizer: Tokenizer) -> list[EvalDocument]:
    (end_id,) = tokenizer.eos_ids
    texts = [file.text for file in files]
    encoded = tokenize(texts, tokenizer, end_id=end_id)
    return [EvalDocument(ids.tolist(), len(text.encode())) for ids, text in zip(encoded, texts, strict=True)]
