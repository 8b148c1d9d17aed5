"""Few sizes of batches, for devices on which a recording is dear: sequences that are nobody's fill a batch up.

With sizes of one token in each sequence there are 35 up to 256. Where sequences have drafts, a recorded batch has as
many tokens in each on average: 1, 2 or more.
"""

from __future__ import annotations

from functools import cache

_SIZES = (1, 2, 4, *range(8, 257, 8))  # sequences of a recorded batch
NUM_EXACT = 2  # of so many sequences a recorded batch has none that was added


@cache
def padding_of(num_sequences: int, num_tokens: int, *, max_rows: int, max_tokens: int) -> tuple[int, ...] | None:
    """The tokens of each sequence that is added: those of the smallest recorded batch that holds so many sequences and
    tokens. A sequence has `max_rows` tokens at most, the batch `max_tokens`. None where no batch is large enough, and
    for longer sequences.

    >>> padding_of(5, 5, max_rows=1, max_tokens=64), padding_of(2, 3, max_rows=4, max_tokens=64)
    ((1, 1, 1), (1, 4))
    """
    found = []
    if num_tokens > num_sequences * max_rows:
        return None
    for each in range(1, max_rows + 1):
        for size in _SIZES:
            added, missing = size - num_sequences, size * each - num_tokens
            if size * each <= max_tokens and 0 <= added <= missing <= added * max_rows:
                found.append((size * each, size))
                break
    if not found:
        return None
    total, size = min(found)
    added, missing = size - num_sequences, total - num_tokens
    lengths = []
    for left in range(added, 0, -1):  # the last ones have the more
        lengths.append(missing // left)
        missing -= lengths[-1]
    return tuple(lengths)


def padded_sizes(max_num_seqs: int, max_rows: int, *, max_tokens: int) -> list[int]:
    """Tokens of each recorded batch that there may be, of up to so many sequences beside those that are added."""
    largest = next((size for size in _SIZES if size >= max_num_seqs), _SIZES[-1])
    if max_rows > 1:  # what is missing may take more sequences
        largest = _SIZES[-1]
    sizes = (size * each for each in range(1, max_rows + 1) for size in _SIZES if size <= largest)
    return [size for size in sizes if size <= max_tokens]
