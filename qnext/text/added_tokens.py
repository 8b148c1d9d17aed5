"""Tokens outside the merges: which of them text from outside may become, and where they stand in trusted text.

Three kinds. Control tokens frame a conversation (`special` in the file, and the family's own by name). Markup is what
the family's formats write around thoughts, calls and code, and every name that looks like a mark and stands in the
folder's chat template. Both are reserved: no text of a caller becomes one. All others are words that somebody added
to the vocabulary (items, molecules, units of speech); they are found in every text, as the merges are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tokenizers import AddedToken

FAMILY_CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
)
FAMILY_MARKUP = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

_MAX_ACCENTS = 64
_WINDOW = 1 << 16  # characters that one search looks at: it holds the interpreter's lock
_JOINERS = ("\u200c", "\u200d")
_NO_SPACE = "\x1c\x1d\x1e\x1f"  # Python calls them white space, Unicode's property does not


class Found(NamedTuple):
    """A reserved token in a text: it takes the place of the characters from `begin` to `end`."""

    begin: int
    end: int
    token_id: int


class AddedTokens:
    """The added tokens of a tokenizer, by kind.

    `normalize` is the tokenizer's normaliser; `template_text` the text of the folder's chat templates.
    """

    def __init__(
        self, added: Mapping[int, AddedToken], *, normalize: Callable[[str], str] = str, template_text: str = ""
    ) -> None:
        self.by_id = dict(added)
        self.ids = {token.content: index for index, token in added.items()}
        self.control_ids = frozenset(
            index for index, token in added.items() if token.special or token.content in FAMILY_CONTROL
        )
        self.reserved = {
            token.content: index
            for index, token in added.items()
            if index in self.control_ids
            or token.content in FAMILY_MARKUP
            or (_looks_like_a_mark(token.content) and token.content in template_text)
        }
        self.words = {name: index for name, index in self.ids.items() if name not in self.reserved}
        self._normalize = normalize
        names = [*self.reserved, *(word for word in self.words if self._covers_reserved(word))]
        self._pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        self._longest = max(map(len, names), default=0)

    def find(self, text: str, start: int, end: int, *, taken: int) -> Iterator[Found]:
        """The reserved tokens of `text[start:end]` in order, as the `tokenizers` library finds them.

        Around the names it looks at the whole text, of which the first `taken` characters are tokens already.
        """
        for match in self._matches(text, start, end):
            index = self.reserved.get(match.group())
            if index is None or not self._stands_alone(self.by_id[index], text, match):
                continue
            token = self.by_id[index]
            begin, stop = match.span()
            while token.lstrip and begin > taken and _is_space(text[begin - 1]):
                begin -= 1
            while token.rstrip and stop < len(text) and _is_space(text[stop]):
                stop += 1
            taken = stop
            yield Found(begin, stop, index)

    def _matches(self, text: str, start: int, end: int) -> Iterator[re.Match[str]]:
        """The names in `text[start:end]`, window by window: a match belongs to the window in which it begins."""
        while start < end:
            window = start + _WINDOW
            for match in self._pattern.finditer(text, start, min(end, window + self._longest)):
                if match.start() >= window:
                    break
                start = match.end()
                yield match
            start = max(start, window)

    def _covers_reserved(self, word: str) -> bool:
        """Whether a word wins over a reserved name in it: the longest does, but those for normalised text come last."""
        is_late = self.by_id[self.words[word]].normalized
        return any(
            name in word and (not is_late or self.by_id[index].normalized) for name, index in self.reserved.items()
        )

    def _stands_alone(self, token: AddedToken, text: str, match: re.Match[str]) -> bool:
        begin, end = match.span()
        before, behind = text[max(begin - 1, 0) : begin], text[end : end + 1]
        if token.single_word and (_is_word(before) or _is_word(behind)):
            return False
        # An accent behind the name may become one with its last character: the name is not there any more then.
        name = token.content
        if not token.normalized or behind <= "\x7f":
            return True
        last = end + 1
        while last < min(len(text), end + _MAX_ACCENTS) and unicodedata.combining(text[last]):
            last += 1
        return self._normalize(name + text[end:last]).startswith(self._normalize(name))


def _looks_like_a_mark(name: str) -> bool:
    return not name[:1].isalnum() and not name[:1].isspace()


def _is_space(character: str) -> bool:
    return character.isspace() and character not in _NO_SPACE


def _is_word(character: str) -> bool:
    """As Unicode's rules for regular expressions have it: letters with their marks, digits, connecting punctuation."""
    kind = unicodedata.category(character) if character else ""
    return kind[:1] in ("L", "M") or kind in ("Nd", "Nl", "Pc") or character in _JOINERS
