"""Tokenising under a watch: it can end early, and a text that cannot be cut is tokenised in a child process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from qnext.confined.process import ConfinedFailure, ConfinedLimits, ConfinedProcess
from qnext.errors import DoesNotFit, UsageError

_WORKER = Path(__file__).with_name("tokenizer_worker.py")
_IDS_AT_ONCE = 1 << 15  # reading JSON holds the interpreter's lock
# A word of two million characters takes 3 to 6 s and 730 MiB, 150 of them for a vocabulary of 151,936.
_LIMITS = ConfinedLimits(seconds=60.0, cpu_seconds=20.0, memory_bytes=1 << 30, answer_bytes=1 << 20)
_PATIENCE = 0.05  # seconds between two looks at the watch


class TooManyTokens(DoesNotFit):
    """A text has more tokens than its watch allows; `num_tokens` were counted by then."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the text has at least {num_tokens} tokens")
        self.num_tokens = num_tokens


class EncodingStopped(UsageError):
    """The tokens are no longer needed."""


class NoTokenizerProcess(Exception):
    """The child process did not start. Waiting may help."""


class Watch:
    """Ends an encoding at more than `most` tokens, or when another thread calls `stop`."""

    def __init__(self, *, most: int | None = None) -> None:
        self._most = most
        self._is_stopped = False
        self._end: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            if self._end is not None:
                self._end()

    def check(self, num_tokens: int) -> None:
        """Raises EncodingStopped, or TooManyTokens where `num_tokens` exceeds the limit."""
        if self._is_stopped:
            raise EncodingStopped("nobody wants the tokens any more")
        if self._most is not None and num_tokens > self._most:
            raise TooManyTokens(num_tokens)

    @contextlib.contextmanager
    def ends(self, end: Callable[[], None]) -> Iterator[None]:
        """While the context lasts, `stop` calls `end` as well; `end` is never called, nor running, after it."""
        with self._lock:
            self._end = end
        try:
            self.check(0)
            yield
        finally:
            with self._lock:
                self._end = None


class ConfinedTokenizer:
    """A tokenizer in a child process, which starts with the first text. Any thread may call it; one text runs at a
    time.

    `description` gives the tokenizer.json.
    """

    def __init__(self, description: Callable[[], str], *, limits: ConfinedLimits = _LIMITS) -> None:
        self._description = description
        self._limits = limits
        self._process: ConfinedProcess | None = None
        self._lock = threading.Lock()

    def encode(self, text: str, *, num_before: int = 0, watch: Watch) -> list[int]:
        """Token ids of a text. `num_before` tokens count for the watch too.

        Raises what the watch raises, UsageError where the text takes more time or memory than it may, and
        NoTokenizerProcess.
        """
        while not self._lock.acquire(timeout=_PATIENCE):
            watch.check(num_before)
        try:
            process = self._running()
            with watch.ends(process.interrupt):
                return self._encode(process, text, num_before, watch)
        except ConfinedFailure as failure:
            watch.check(num_before)  # it may be the watch that ended it
            much = "time" if failure.cause == "time" else "memory"
            raise UsageError(
                f"a part of the text with {len(text)} characters and no boundary between words takes too much {much} "
                "to be tokenized"
            ) from None
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the child process; a later text starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _running(self) -> ConfinedProcess:
        process = self._process
        if process is None or not process.is_alive():
            try:
                process = ConfinedProcess(_WORKER, self._limits, setup={"tokenizer": self._description()})
            except OSError as error:
                raise NoTokenizerProcess(str(error)) from None
            self._process = process
        return process

    @staticmethod
    def _encode(process: ConfinedProcess, text: str, num_before: int, watch: Watch) -> list[int]:
        answer = process.ask({"text": text})
        if "count" not in answer:
            raise UsageError("the text is not valid Unicode, or breaks the tokenizer's pattern for words")
        count = answer["count"]
        watch.check(num_before + count)
        ids: list[int] = []
        for begin in range(0, count, _IDS_AT_ONCE):
            ids += process.ask({"begin": begin, "end": begin + _IDS_AT_ONCE})["ids"]
            watch.check(num_before + len(ids))
        return ids
