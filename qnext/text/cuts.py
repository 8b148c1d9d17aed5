"""Where a long text may be cut so that the tokens of its parts, one after another, equal those of the whole text.

A cut is safe where a word of the tokenizer's splitter ends whatever stands before and behind it, and where no
normalisation and no added token reaches across. This is proved here for the patterns that the table names. A text of
any other tokenizer is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken

from qnext.text.train import QWEN2_PATTERN

LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# No word goes on over white space: before a space that follows something else a word has ended in all of them. The
# three characters left out are white space to some.
_BEFORE_SPACE = r"[^\s\u180e\u200b\ufeff](?= )"
# Only letters follow a letter within a word, and what follows here joins no letter in NFC.
_BEHIND_LETTER = r"[A-Za-z\u4e00-\u9fff](?=[\x00-@\[-`{-\x7f\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
# White space that ends with a newline is one word, and nothing but newlines follows it there.
_BEHIND_NEWLINE = r"\n(?=[!-~])"
# A digit is a word of its own.
_BEHIND_DIGIT = r"[0-9](?=[\x00-\x7f])"
_SAFE = {
    QWEN2_PATTERN: (_BEFORE_SPACE, _BEHIND_LETTER, _BEHIND_NEWLINE, _BEHIND_DIGIT),
    LLAMA3_PATTERN: (_BEFORE_SPACE, _BEHIND_LETTER, _BEHIND_NEWLINE),
    None: (_BEFORE_SPACE, _BEHIND_LETTER),  # GPT-2's, which is ByteLevel's own
}
_WINDOW = 4_096  # characters that one search looks at: it holds the interpreter's lock


class Cuts:
    """The safe cuts of one tokenizer.

    `description` is its tokenizer.json as an object, `words` the added tokens that every text may become, `normalize`
    its normaliser.
    """

    def __init__(
        self, description: Mapping[str, Any], words: Collection[AddedToken], *, normalize: Callable[[str], str] = str
    ) -> None:
        safe = _safe_for(description)
        found = None if safe is None else re.compile("|".join(safe))
        is_in_the_way = found is not None and any(_reaches_across(word, found, normalize) for word in words)
        self._pattern = None if is_in_the_way else found

    def parts(self, text: str, size: int) -> Iterator[str]:
        """The text in parts of at most `size` characters, or longer ones where there is no safe cut."""
        begin = 0
        while len(text) - begin > size and (end := self._cut(text, begin, size)) is not None:
            yield text[begin:end]
            begin = end
        yield text[begin:] if begin else text

    def _cut(self, text: str, begin: int, size: int) -> int | None:
        """The last safe cut of the next `size` characters, else the first behind them."""
        if self._pattern is None:
            return None
        for end in range(begin + size, begin, -_WINDOW):
            # One character more: a cut depends on what follows it.
            found = [match.end() for match in self._pattern.finditer(text, max(begin, end - _WINDOW), end + 1)]
            if found:
                return found[-1]
        for start in range(begin + size, len(text), _WINDOW):
            match = self._pattern.search(text, start, start + _WINDOW + 1)
            if match is not None:
                return match.end()
        return None


def _reaches_across(word: AddedToken, cuts: re.Pattern[str], normalize: Callable[[str], str]) -> bool:
    if word.lstrip or word.rstrip or word.single_word:
        return True
    return any(map(cuts.search, (word.content, normalize(word.content))))


def _safe_for(description: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The safe cuts of a splitter; None where none is known to be."""
    normalizer = description.get("normalizer") or {"type": "Sequence"}
    steps = normalizer.get("normalizers") or () if normalizer.get("type") == "Sequence" else (normalizer,)
    if any(step.get("type") != "NFC" for step in steps):
        return None
    splitter = description.get("pre_tokenizer") or {}
    if splitter.get("type") == "ByteLevel":
        return _SAFE[None] if splitter.get("use_regex", True) and not splitter.get("add_prefix_space") else None
    parts: list[Any] = list(splitter.get("pretokenizers") or ())
    if splitter.get("type") != "Sequence" or [part.get("type") for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = parts
    if byte_level.get("use_regex", True) or byte_level.get("add_prefix_space"):
        return None
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    pattern = (split.get("pattern") or {}).get("Regex")
    return None if pattern is None else _SAFE.get(pattern)
