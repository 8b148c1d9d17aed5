"""Any bytes as token ids: valid UTF-8 as text, every other byte by the token that stands for it alone."""

from __future__ import annotations

import re

from qnext.errors import UsageError
from qnext.text.tokenizer import Tokenizer

_BROKEN = re.compile("[\udc80-\udcff]+")  # what surrogateescape makes of bytes that are no UTF-8


def encode_bytes(data: bytes, tokenizer: Tokenizer) -> list[int]:
    """Ids whose bytes, one after another, are `data`. Raises UsageError where the vocabulary lacks a byte that is
    needed; vocabularies of bytes lack none."""
    text = data.decode("utf-8", errors="surrogateescape")
    ids: list[int] = []
    end = 0
    alone: dict[bytes, int] = {}
    for broken in _BROKEN.finditer(text):
        if not alone:
            alone = {raw: number for number, raw in reversed(list(enumerate(tokenizer.token_table()))) if len(raw) == 1}
        ids += tokenizer.encode(text[end : broken.start()])
        for byte in broken[0].encode("utf-8", errors="surrogateescape"):
            number = alone.get(bytes([byte]))
            if number is None:
                raise UsageError(f"the tokenizer has no token for the byte {byte:#04x} outside of UTF-8")
            ids.append(number)
        end = broken.end()
    return ids + tokenizer.encode(text[end:])
