"""What experts on disk, or on a GPU's host, cost one answer: its prompt, and the tokens after the first. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from qnext.engine import Engine, ExpertReads


class StageReads(NamedTuple):
    """What a number of tokens cost, and the seconds that they took."""

    reads: ExpertReads
    num_tokens: int
    seconds: float

    @property
    def bytes_per_token(self) -> float | None:
        """None where there was no token."""
        return self.reads.bytes_read / self.num_tokens if self.num_tokens > 0 else None

    def describe(self) -> str:
        hits, size = self.reads.hit_ratio, self.bytes_per_token
        if hits is None or size is None or self.seconds <= 0:
            return "nothing"
        waited = self.reads.all_seconds_waited
        times = "" if waited is None else f", {waited / self.seconds:.0%} of the time waiting"
        return f"{hits:.0%} hits, {size / 1e6:.1f} MB per token{times}"

    def document(self) -> dict[str, float | int | None]:
        return {
            "hits": self.reads.all_hits,
            "misses": self.reads.all_misses,
            "bytes_read": self.reads.bytes_read,
            "bytes_per_token": self.bytes_per_token,
            "wait_seconds": self.reads.all_seconds_waited,
        }


class AnswerReads(NamedTuple):
    """Of the prompt, and of the answer behind its first token."""

    prefill: StageReads
    decode: StageReads

    def describe(self) -> str:
        """One line."""
        source = "the host" if self.decode.reads.seconds_waited is None else "disk"
        return f"experts from {source}: prompt {self.prefill.describe()}; answer {self.decode.describe()}"

    def document(self) -> dict[str, Any]:
        """For programs."""
        reads = self.decode.reads
        return {
            "resident_ratio": reads.resident_ratio,
            "memory_bytes": reads.memory_bytes,
            "prefill": self.prefill.document(),
            "decode": self.decode.document(),
        }


class ReadMarks:
    """An engine's counters when an answer begins, which is when this is made, at its first token and at its end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._start = self._first = self._end = engine.metrics.experts

    def mark_first_token(self) -> None:
        self._first = self._end = self._engine.metrics.experts

    def mark_end(self) -> None:
        self._end = self._engine.metrics.experts

    def reads(
        self, *, num_prompt: int, num_decoded: int, prefill_seconds: float, decode_seconds: float
    ) -> AnswerReads | None:
        """`num_prompt` tokens that were computed and `num_decoded` after the first one of the answer. None where all
        experts are in memory."""
        if self._start is None or self._first is None or self._end is None:
            return None
        return AnswerReads(
            StageReads(self._first.since(self._start), num_prompt, prefill_seconds),
            StageReads(self._end.since(self._first), num_decoded, decode_seconds),
        )
