"""Writes while the caller computes: tensors go to a ShardWriter on a thread of its own."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from torch import Tensor

from qnext.checkpoint.files import ShardWriter

_MAX_WAITING_BYTES = 64 << 20


class WriteBehind:
    """The interface of ShardWriter, but `write` returns while the tensor waits. The tensor must not change any more.

    At most 64 MiB wait, or one larger tensor; then `write` waits too. A later call raises what went wrong, `finish` at
    the latest.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._num_bytes = 0
        self._lock = Lock()  # of the writer
        self._is_closed = False

    def write(self, name: str, tensor: Tensor, *, row: int | None = None) -> None:
        while self._waiting and (self._waiting[0][0].done() or self._num_bytes + tensor.nbytes > _MAX_WAITING_BYTES):
            self._wait_for_one()
        self._waiting.append((self._thread.submit(self._write, name, tensor, row), tensor.nbytes))
        self._num_bytes += tensor.nbytes

    def _wait_for_one(self) -> None:
        future, num_bytes = self._waiting.popleft()
        self._num_bytes -= num_bytes
        future.result()

    def sync(self) -> None:
        """All that was given is on the disk when it returns."""
        self._wait_for_all()
        self._writer.sync()

    def finish(self) -> None:
        self._wait_for_all()
        self._writer.finish()

    def _wait_for_all(self) -> None:
        while self._waiting:
            self._wait_for_one()

    def close(self) -> None:
        """Stop writing. Nothing is written after it returns, nor after it raises because of a signal."""
        try:
            self._close()
        finally:
            self._close()

    def _close(self) -> None:
        # The thread is not waited for, nor its futures: what a signal interrupts there is not known any more.
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._is_closed = True
            self._writer.close()

    def _write(self, name: str, tensor: Tensor, row: int | None) -> None:
        with self._lock:
            if not self._is_closed:
                self._writer.write(name, tensor, row=row)
