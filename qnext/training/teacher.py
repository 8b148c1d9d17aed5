"""A teacher's answers on disk: files beside each other, of which a writer that was killed finds what it had made.

A file holds the rows with a label of some documents of one shard: `ids` (uint16, or uint32 for a large vocabulary); of
the largest probabilities `log_probs` and `log_tail`, of drawn tokens `entropy` (float16): see TeacherAnswers. Where the
routers were asked, it holds the same of the most probable experts of each: `router_ids` and so on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qnext import ops
from qnext.errors import UsageError
from qnext.model import Batch, CausalLM, RouterOutput
from qnext.text.tokenizer import Tokenizer
from qnext.training.arrays import ArrayFile, sound_file, write_arrays
from qnext.training.data import IGNORED, Document
from qnext.training.distill import KeptTokens, TaughtDocument, TeacherAnswers, answers_of
from qnext.training.losses import RouterTap, stack_logits, wide_logits
from qnext.training.samples import DOCUMENTS, in_order
from qnext.training.shards import DataShard

ANSWERS = ".answers"  # suffix of files beside the shards
_NARROW = 1 << 16  # tokens whose ids need two bytes
_ROWS_PER_FILE, _BYTES_PER_FILE = 1 << 16, 1 << 25  # what a killed writer may lose


@dataclass(frozen=True)
class Asking:
    """What is kept of each row: `count` of the `num_tokens` that student and teacher share, and of each of the first
    `num_routers` routers the `num_experts` most probable experts. Raises UsageError."""

    kept: KeptTokens
    count: int
    num_tokens: int
    temperature: float = 1.0
    seed: int = 0
    num_routers: int = field(default=0, kw_only=True)
    num_experts: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= (self.num_tokens if self.kept == "top" else 1 << 16):
            raise UsageError(f"{self.count} entries of {self.num_tokens} tokens cannot be kept")
        if not 0.0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be above zero, not {self.temperature}")

    @classmethod
    def within(
        cls,
        budget: int,
        kept: KeptTokens,
        num_tokens: int,
        *,
        num_routers: int = 0,
        num_experts: int = 0,
        **choices: Any,
    ) -> Asking:
        """As many entries as `budget` bytes per row hold beside the routers. Raises UsageError where that is none."""
        one = cls(kept, 1, num_tokens, num_routers=num_routers, num_experts=num_experts, **choices)
        entry = one.id_bytes + 2 * (kept == "top")
        count = (budget - one.bytes_per_row) // entry + 1
        if count < 1:
            raise UsageError(f"a budget of {budget} bytes per token is less than the {one.bytes_per_row} of one entry")
        return replace(one, count=min(count, num_tokens if kept == "top" else _NARROW))

    @property
    def id_bytes(self) -> int:
        return 2 if self.num_tokens <= _NARROW else 4

    @property
    def bytes_per_row(self) -> int:
        entry = self.id_bytes + 2 * (self.kept == "top")
        return self.count * entry + 2 + self.num_routers * (4 * self.num_experts + 2)

    @property
    def rows_per_file(self) -> int:
        return min(_ROWS_PER_FILE, max(1, _BYTES_PER_FILE // self.bytes_per_row))


def check_one_vocabulary(student: Tokenizer, teacher: Tokenizer, *, names: tuple[str, str]) -> int:
    """The number of tokens, which both have. Raises UsageError naming both and the first token that differs."""
    ours, theirs = student.token_table(), teacher.token_table()
    different = [i for i, (one, other) in enumerate(zip_longest(ours, theirs, fillvalue=b"")) if one != other]
    if different:
        first = different[0]
        here, there = (table[first] if first < len(table) else b"" for table in (ours, theirs))
        raise UsageError(
            f"{names[1]} has another vocabulary than {names[0]}: {len(different):,} tokens differ, the first is token "
            f"{first}, {there!r} there and {here!r} here; a teacher needs the student's vocabulary"
        )
    return len(ours)


class TaughtShard:
    """Documents of a shard with the teacher's answers, as samples of TAUGHT."""

    def __init__(self, shard: DataShard, first: int, file: ArrayFile, asking: Asking) -> None:
        self.path = file.path
        self._shard, self._first, self._file, self._asking = shard, first, file, asking
        self._starts = np.cumsum([0, *(_num_learned(shard[first + i]) for i in range(file.facts["num_documents"]))])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> TaughtDocument:
        rows = slice(self._starts[index], self._starts[index + 1])
        arrays = {name: array[rows] for name, array in self._file.arrays.items()}
        document, ids = self._shard[self._first + index], arrays["ids"]
        routers = _largest(arrays, "router_") if self._asking.num_routers else None
        if self._asking.kept == "top":
            return TaughtDocument(document, _largest(arrays), routers)
        logarithm = np.float32(np.log(self._asking.count))
        even, none = np.full(ids.shape, -logarithm), np.full(len(ids), -np.inf, dtype=np.float32)
        known = logarithm - arrays["entropy"].astype(np.float32)
        return TaughtDocument(document, TeacherAnswers(ids, even, none, known), routers)


def _largest(arrays: Mapping[str, np.ndarray], prefix: str = "") -> TeacherAnswers:
    ids, log_probs, log_tail = (arrays[prefix + name] for name in ("ids", "log_probs", "log_tail"))
    return TeacherAnswers(ids, log_probs, log_tail, np.zeros_like(log_tail))


def ask(
    model: Callable[[], CausalLM],
    shard: DataShard,
    folder: Path,
    asking: Asking,
    *,
    of: str,
    tokens_per_batch: int,
    rows_per_file: int | None = None,
    report: Callable[[int], None] | None = None,
) -> list[TaughtShard]:
    """What the teacher says of a shard's documents, from files in `folder` that are made where they are not there yet.
    Equal choices give equal bytes, however often the work was interrupted. `model` is called where one is missing.

    `of` tells the teacher from others; files of another one, or of other choices or data, are replaced. `report` gets
    the documents done. Raises OSError and DiskFull.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for first, end in _parts(shard, rows_per_file or asking.rows_per_file):
        path = folder / f"{shard.path.stem}.{first:06}{ANSWERS}"
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
            key = f"{shard.checksum}/{first}"
            write_arrays(path, facts, _asked(model(), documents, asking, key=key, size=tokens_per_batch))
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
) -> dict[str, np.ndarray]:
    """The arrays of a file."""
    seed = int.from_bytes(hashlib.blake2b(f"{asking.seed}/{key}".encode(), digest_size=7).digest(), "little")
    generator = torch.Generator(model.device).manual_seed(seed)
    found: list[dict[str, np.ndarray]] = []
    for batch in in_order(documents, DOCUMENTS, tokens_per_batch=size):
        batch = batch.to(model.device)
        is_learned_T = batch.labels_T != IGNORED
        hidden_TD, routed = _seen(model, batch.batch, wants_routers=asking.num_routers > 0)
        hidden_RD: Tensor = hidden_TD[is_learned_T]
        arrays = []
        for rows in hidden_RD.split(ops.rows_of_logits(model.config.vocab_size)):
            answers = answers_of(
                wide_logits(model, rows)[:, : asking.num_tokens],
                kept=asking.kept,
                count=asking.count,
                temperature=asking.temperature,
                generator=generator,
            )
            arrays.append(_stored(answers, asking))
        found.append(_concatenated(arrays))
        if asking.num_routers:
            logits_RLE = stack_logits(routed)[:, is_learned_T].transpose(0, 1)
            answers = answers_of(logits_RLE.flatten(0, 1), kept="top", count=asking.num_experts)
            found[-1] |= _routers(answers, asking)
    return _concatenated(found)


def _seen(model: CausalLM, batch: Batch, *, wants_routers: bool) -> tuple[Tensor, list[RouterOutput]]:
    """What the trunk makes of a batch, and what its routers decided."""
    if not wants_routers:
        return model(batch).hidden_TD, []
    tap = RouterTap(model, without_gradient=True)
    try:
        return model(batch).hidden_TD, tap.take()
    finally:
        tap.close()


def _concatenated(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _stored(answers: TeacherAnswers, asking: Asking) -> dict[str, np.ndarray]:
    ids, log_probs, log_tail, known = (tensor.cpu().numpy() for tensor in answers)
    ids = ids.astype(np.uint16 if asking.num_tokens <= _NARROW else np.uint32)
    if asking.kept == "sampled":
        return {"ids": ids, "entropy": (np.log(asking.count) - known).astype(np.float16)}
    return {"ids": ids, "log_probs": log_probs.astype(np.float16), "log_tail": log_tail.astype(np.float16)}


def _routers(answers: TeacherAnswers, asking: Asking) -> dict[str, np.ndarray]:
    ids, log_probs, log_tail, _ = (each.unflatten(0, (-1, asking.num_routers)).cpu().numpy() for each in answers)
    return {
        "router_ids": ids.astype(np.uint16),
        "router_log_probs": log_probs.astype(np.float16),
        "router_log_tail": log_tail.astype(np.float16),
    }
