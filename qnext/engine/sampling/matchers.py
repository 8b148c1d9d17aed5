"""Grammar texts to matchers of llguidance, for one vocabulary. Neither torch nor numpy: child processes hold it, too.

A text that compiled in one process compiles in another that has the same vocabulary and limits, at the same cost.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import llguidance

from qnext.engine.sampling.constraint import GrammarLimits
from qnext.errors import UsageError

MARKER = 0xFF  # how the library marks names of special tokens; no UTF-8 text holds this byte
_MESSAGE_LENGTH = 200
_STOP_REASONS = {
    "ParserTooComplex": "the grammar is too ambiguous here",
    "LexerTooComplex": "the expressions are too complex here",
    "NoExtensionBias": "no token fits",
}


class _GuidanceTokenizer(llguidance.TokenizerWrapper):
    """What llguidance reads of a vocabulary."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, token_bytes: Sequence[bytes], eos_ids: Collection[int], special_ids: Collection[int]) -> None:
        special = frozenset(special_ids)
        self.eos_token_id = min(eos_ids)
        self.special_token_ids = sorted(special)
        # A special token needs a name; one of the model's padding rows has none of its own.
        self.tokens = [
            (text or b"<%d>" % i) if i in special else (b"" if text[:1] == bytes([MARKER]) else text)
            for i, text in enumerate(token_bytes)
        ]

    def _encode_string(self, s: str) -> list[int]:
        return []  # masks force no token, so nothing is ever tokenized

    __call__ = _encode_string


class MatcherFactory:
    """Makes matchers. `token_bytes` of each id; `special_ids` hold the `eos_ids` as well."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        eos_ids: Collection[int],
        special_ids: Collection[int],
        limits: GrammarLimits,
    ) -> None:
        wrapper = _GuidanceTokenizer(token_bytes, eos_ids, special_ids)
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=sorted(eos_ids))
        self._usable = [bool(text) and i not in eos_ids for i, text in enumerate(wrapper.tokens)]
        self._step_seconds = limits.step_seconds
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=limits.max_items_in_row,
            initial_lexer_fuel=limits.initial_lexer_fuel,
            step_lexer_fuel=limits.step_lexer_fuel,
            step_max_items=limits.step_max_items,
            max_lexer_states=limits.max_lexer_states,
            max_grammar_size=limits.max_grammar_size,
            verbose_errors=False,
        )

    def build(self, text: str) -> llguidance.LLMatcher:
        """A matcher that has its first mask and can be rolled back. Raises UsageError, in one line, without one.

        The library recurses along rules: the caller's stack must hold that.
        """
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UsageError(one_line(matcher.get_error()))
        probe = matcher.deep_copy()
        start = time.thread_time()
        mask = int.from_bytes(probe.compute_bitmask(), "little")
        if probe.is_error():
            raise UsageError(f"the output constraint cannot be followed further: {stop_reason(probe)}")
        if time.thread_time() - start > self._step_seconds:
            raise UsageError("the output constraint is too complex: one mask took too long")
        first = self._first_usable(mask)
        if first is None:
            if not probe.is_accepting():
                raise UsageError("the output constraint cannot be followed further: no token fits")
            return matcher
        if not probe.consume_token(first):
            raise UsageError(f"the output constraint cannot be followed further: {stop_reason(probe)}")
        if not probe.rollback(1):
            raise UsageError("max_tokens and stop are not supported inside a grammar; suffix and lazy are")
        return matcher

    def _first_usable(self, mask: int) -> int | None:
        """The lowest token of a mask that is neither padding nor an end."""
        while mask:
            token_id = (mask & -mask).bit_length() - 1
            if token_id < len(self._usable) and self._usable[token_id]:
                return token_id
            mask &= mask - 1
        return None


def stop_reason(matcher: llguidance.LLMatcher) -> str:
    return _STOP_REASONS.get(matcher.stop_reason(), "the grammar failed here")


def one_line(message: str) -> str:
    """The line of a library's message that says what is wrong, without the text around it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    line = (named or lines or ["cannot be compiled"])[0]
    return line if len(line) <= _MESSAGE_LENGTH else line[:_MESSAGE_LENGTH] + "…"
