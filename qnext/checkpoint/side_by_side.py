"""Work on one tensor after another, several at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from qnext.ops import compute_alone

Piece = TypeVar("Piece")
Result = TypeVar("Result")
_BYTES_AHEAD = 64 << 20


def side_by_side(
    work: Callable[[Piece], Result], pieces: Iterable[tuple[Piece, int]], *, bytes_ahead: int = _BYTES_AHEAD
) -> Generator[Result, None, None]:
    """What `work` makes of each piece, in their order. Close the generator, which ends the threads.

    As many are worked on at once as torch has threads, by a thread each: one matrix is often too small to be shared.
    With each piece come the bytes that it takes; at most `bytes_ahead` of them are under way or not yet asked for, and
    a piece that is larger is worked on by all threads together, after those before it.
    """
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, initializer=compute_alone)
    waiting: deque[tuple[Future[Result], int]] = deque()
    ahead = 0
    try:
        for piece, num_bytes in pieces:
            while waiting and ahead + num_bytes > bytes_ahead:
                future, size = waiting.popleft()
                yield future.result()
                ahead -= size
            if num_bytes > bytes_ahead:
                yield work(piece)
                continue
            waiting.append((pool.submit(work, piece), num_bytes))
            ahead += num_bytes
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # a thread's own number becomes that of later threads
