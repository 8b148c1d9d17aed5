"""Writing beside computing: tensors go to a ShardWriter on a thread of its own."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from qnext.checkpoint.files import ShardWriter

_MAX_WAITING_BYTES = 64 << 20


class WriteBehind:
    """What ShardWriter is, but `write` returns while the tensor waits, which must not change any more.

    At most 64 MiB wait, or one tensor that is larger; then `write` waits too. What went wrong is raised by a later
    call, `finish` at the latest.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._num_bytes = 0

    def write(self, name: str, tensor: Tensor) -> None:
        while self._waiting and (self._waiting[0][0].done() or self._num_bytes + tensor.nbytes > _MAX_WAITING_BYTES):
            self._wait_for_one()
        self._waiting.append((self._thread.submit(self._writer.write, name, tensor), tensor.nbytes))
        self._num_bytes += tensor.nbytes

    def _wait_for_one(self) -> None:
        future, num_bytes = self._waiting[0]
        wait([future])
        self._waiting.popleft()
        self._num_bytes -= num_bytes
        future.result()

    def finish(self) -> None:
        while self._waiting:
            self._wait_for_one()
        self._writer.finish()

    def close(self) -> None:
        """Nothing is written any more when it returns, nor when a signal comes meanwhile and it raises."""
        try:
            self._settle()
        finally:
            self._settle()
            self._writer.close()

    def _settle(self) -> None:
        # Not by joining the thread: a join that a signal ends takes the thread for ended too.
        self._thread.shutdown(wait=False, cancel_futures=True)
        wait([future for future, _ in self._waiting if not future.cancelled()])
