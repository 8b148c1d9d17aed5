"""A teacher's answers on disk: files beside each other, of which a writer that was killed finds what it had made.

A file holds the rows with a label of some documents of one shard: `ids` (uint16, or uint32 for a large vocabulary), and
of the largest probabilities `log_probs` and `log_tail` (float16): see TeacherAnswers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.text.tokenizer import Tokenizer
from qnext.training.arrays import ArrayFile, sound_file, write_arrays
from qnext.training.data import IGNORED, Document
from qnext.training.distill import KeptTokens, TaughtDocument, TeacherAnswers, answers_of
from qnext.training.losses import rows_of_logits, wide_logits
from qnext.training.samples import DOCUMENTS, in_order
from qnext.training.shards import DataShard

_NARROW = 1 << 16  # tokens whose ids need two bytes
_ROWS_PER_FILE = 1 << 16


@dataclass(frozen=True)
class Asking:
    """What is kept of each row: `count` of the `num_tokens` that student and teacher share. Raises UsageError."""

    kept: KeptTokens
    count: int
    num_tokens: int
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= (self.num_tokens if self.kept == "top" else 1 << 16):
            raise UsageError(f"{self.count} entries of {self.num_tokens} tokens cannot be kept")
        if not 0.0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be above zero, not {self.temperature}")

    @classmethod
    def within(
        cls, budget: int, kept: KeptTokens, num_tokens: int, *, temperature: float = 1.0, seed: int = 0
    ) -> Asking:
        """As many entries as `budget` bytes per row hold. Raises UsageError where that is none."""
        id_bytes = 2 if num_tokens <= _NARROW else 4
        count = budget // id_bytes if kept == "sampled" else min(num_tokens, (budget - 2) // (id_bytes + 2))
        if count < 1:
            raise UsageError(f"a budget of {budget} bytes per token is less than one entry takes")
        return cls(kept, count, num_tokens, temperature, seed)

    @property
    def bytes_per_row(self) -> int:
        id_bytes = 2 if self.num_tokens <= _NARROW else 4
        return self.count * id_bytes if self.kept == "sampled" else self.count * (id_bytes + 2) + 2


def check_one_vocabulary(student: Tokenizer, teacher: Tokenizer, *, name: str) -> int:
    """The number of tokens that both have. Raises UsageError naming the first token that differs."""
    ours, theirs = student.token_table(), teacher.token_table()
    different = [i for i, (one, other) in enumerate(zip_longest(ours, theirs, fillvalue=b"")) if one != other]
    if different:
        first = different[0]
        there, here = (table[first] if first < len(table) else b"" for table in (theirs, ours))
        raise UsageError(
            f"{name}: {len(different):,} tokens of its vocabulary are others, the first is token {first}, "
            f"{there!r} there and {here!r} here; a teacher needs the student's vocabulary"
        )
    return min(len(ours), len(theirs))


class TaughtShard:
    """Documents of a shard with the teacher's answers, as samples of TAUGHT."""

    def __init__(self, shard: DataShard, first: int, file: ArrayFile, asking: Asking) -> None:
        self._shard, self._first, self._file, self._asking = shard, first, file, asking
        self._starts = np.cumsum([0, *(_num_learned(shard[first + i]) for i in range(file.facts["num_documents"]))])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> TaughtDocument:
        rows = slice(self._starts[index], self._starts[index + 1])
        ids = self._file.arrays["ids"][rows]
        document = self._shard[self._first + index]
        if self._asking.kept == "top":
            return TaughtDocument(
                document, ids, self._file.arrays["log_probs"][rows], self._file.arrays["log_tail"][rows]
            )
        even = np.full(ids.shape, -np.log(self._asking.count), dtype=np.float32)
        return TaughtDocument(document, ids, even, np.full(len(ids), -np.inf, dtype=np.float32))


def ask(
    model: CausalLM,
    shard: DataShard,
    folder: Path,
    asking: Asking,
    *,
    of: str,
    tokens_per_batch: int,
    rows_per_file: int = _ROWS_PER_FILE,
    report: Callable[[int], None] | None = None,
) -> list[TaughtShard]:
    """What the teacher `model` says of a shard's documents, from files in `folder` that are made where they are not
    there yet. Equal choices give equal bytes, however often the work was interrupted.

    `of` tells the teacher from others; files of another one, or of other choices or data, are replaced. `report` gets
    the documents done. Raises OSError and DiskFull.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for first, end in _parts(shard, rows_per_file):
        path = folder / f"{shard.path.stem}.{first:06}.answers"
        facts = {
            "teacher": of,
            "documents": shard.checksum,
            "num_documents": end - first,
            "tokens_per_batch": tokens_per_batch,
            **asdict(asking),
        }
        file = sound_file(path, facts)
        if file is None:
            documents = [shard[index] for index in range(first, end)]
            answers = _asked(model, documents, asking, key=f"{shard.checksum}/{first}", size=tokens_per_batch)
            write_arrays(path, facts, _stored(answers, asking))
            file = ArrayFile(path)
        found.append(TaughtShard(shard, first, file, asking))
        if report is not None:
            report(end)
    return found


def _parts(shard: DataShard, rows_per_file: int) -> Iterator[tuple[int, int]]:
    first, rows = 0, 0
    for index in range(len(shard)):
        rows += _num_learned(shard[index])
        if rows >= rows_per_file or index + 1 == len(shard):
            yield first, index + 1
            first, rows = index + 1, 0


def _num_learned(document: Document) -> int:
    return int((document[1:] >= 0).sum())


@torch.no_grad()
def _asked(
    model: CausalLM, documents: Sequence[Document], asking: Asking, *, key: str, size: int
) -> list[TeacherAnswers]:
    seed = int.from_bytes(hashlib.blake2b(f"{asking.seed}/{key}".encode(), digest_size=7).digest(), "little")
    generator = torch.Generator(model.device).manual_seed(seed)
    found: list[TeacherAnswers] = []
    for batch in in_order(documents, DOCUMENTS, tokens_per_batch=size):
        batch = batch.to(model.device)
        hidden_RD: Tensor = model(batch.batch).hidden_TD[batch.labels_T != IGNORED]
        for rows in hidden_RD.split(rows_of_logits(model.config.vocab_size)):
            logits_RY = wide_logits(model, rows)[:, : asking.num_tokens]
            found.append(
                answers_of(
                    logits_RY,
                    kept=asking.kept,
                    count=asking.count,
                    temperature=asking.temperature,
                    generator=generator,
                )
            )
    return found


def _stored(answers: Sequence[TeacherAnswers], asking: Asking) -> dict[str, np.ndarray]:
    ids, log_probs, tails = (torch.cat(parts).cpu().numpy() for parts in zip(*answers, strict=True))
    ids = ids.astype(np.uint16 if asking.num_tokens <= _NARROW else np.uint32)
    if asking.kept == "sampled":
        return {"ids": ids}
    return {"ids": ids, "log_probs": log_probs.astype(np.float16), "log_tail": tails.astype(np.float16)}
