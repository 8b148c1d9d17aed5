"""Constrained output: which tokens may come next, for one request, through llguidance.

A mask is a row of int32 words with one bit per row of the model's head, lowest bit first. It holds every token whose
bytes some complete output could continue with; end tokens exactly when the output could end here; nothing that is
padding. Control tokens and other added tokens are in it only where a Lark grammar names them.

Legend: R rows, Y vocabulary.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.engine.sampling.constraint import Constraint, GrammarLimits, grammar_text
from qnext.errors import ConstraintFailed, UsageError

Mask = NDArray[np.int32]

_MARKER = 0xFF  # how the library marks names of special tokens; no UTF-8 text holds this byte
_MESSAGE_LENGTH = 200
_SLICE = 0.05  # seconds
_STACK_BYTES = 64 << 20  # the library recurses along rules
_STACK_LOCK = threading.Lock()  # the size holds for the next threads of the whole process


class Vocabulary:
    """The bytes of each token id, the ids that end an output, and those that are no text (added tokens).

    `size` is the number of rows of the model's head where it is more than the tokenizer's; the rows between are
    padding. Raises UsageError for ids outside of it, and without an end token.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        eos_ids: Collection[int],
        special_ids: Collection[int] = (),
        size: int | None = None,
    ) -> None:
        self.size = max(len(token_bytes), size or 0)
        self.eos_ids = frozenset(eos_ids)
        self.special_ids = frozenset(special_ids) | self.eos_ids
        if not self.eos_ids:
            raise UsageError("output cannot be constrained without an end token")
        if not all(0 <= token < self.size for token in self.special_ids):
            raise UsageError(f"end tokens and special tokens must be below the vocabulary size {self.size}")
        self.token_bytes = [*token_bytes, *([b""] * (self.size - len(token_bytes)))]
        usable = [
            bool(text) and (text[0] != _MARKER or i in self.special_ids) for i, text in enumerate(self.token_bytes)
        ]
        self.eos_mask = self._mask([token in self.eos_ids for token in range(self.size)])
        self.text_mask = self._mask(usable) & ~self.eos_mask  # everything that may stand in an output

    @property
    def num_words(self) -> int:
        return (self.size + 31) // 32

    def _mask(self, flags: Sequence[bool]) -> Mask:
        bits = np.zeros(32 * self.num_words, dtype=np.uint8)
        bits[: self.size] = flags
        mask: Mask = np.packbits(bits, bitorder="little").view(np.int32)
        mask.flags.writeable = False
        return mask


class _Tokenizer(llguidance.TokenizerWrapper):
    """What llguidance reads of a vocabulary."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        special = vocabulary.special_ids
        self.eos_token_id = min(vocabulary.eos_ids)
        self.special_token_ids = sorted(special)
        # A special token needs a name; one of the model's padding rows has none of its own.
        self.tokens = [
            (text or b"<%d>" % i) if i in special else (b"" if text[:1] == bytes([_MARKER]) else text)
            for i, text in enumerate(vocabulary.token_bytes)
        ]

    def _encode_string(self, s: str) -> list[int]:
        return []  # masks force no token, so nothing is ever tokenized

    __call__ = _encode_string


class CompiledGrammar:
    """A constraint that compiled, from which any number of requests start."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        limits: GrammarLimits,
        starts_after: tuple[int, ...] | None,
        opened_by: int | None = None,
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._limits = limits
        self._starts_after = starts_after
        self._opened_by = opened_by

    def new_state(self) -> GrammarState:
        return GrammarState(
            self._matcher, self._vocabulary, self._limits, self._starts_after or (), opened_by=self._opened_by
        )


class GrammarState:
    """How far the output of one request has come in its grammar. For one thread at a time.

    While the reasoning lasts (`is_asleep`) every token is allowed but the end tokens: an output that ended there
    would have dropped its constraint. After an end token only end tokens are allowed.
    """

    def __init__(
        self,
        template: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        limits: GrammarLimits,
        starts_after: tuple[int, ...],
        *,
        opened_by: int | None = None,
    ) -> None:
        self._template = template
        self._matcher = template.deep_copy()
        self._vocabulary = vocabulary
        self._limits = limits
        self._starts_after = starts_after
        self._tokens: list[int] = []
        self._opened_by = opened_by
        # Index of the first constrained token; None while the reasoning lasts.
        self._awake_from: int | None = None if starts_after and opened_by is None else 0
        self._ended_at: int | None = None  # index of the first end token
        self._mask: Mask | None = None  # of the present position

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def is_asleep(self) -> bool:
        return self._awake_from is None

    @property
    def is_finished(self) -> bool:
        """An end token was accepted: the output is complete and satisfies the constraint."""
        return self._ended_at is not None

    @property
    def can_end(self) -> bool:
        """The output so far satisfies the constraint."""
        return self.is_finished or (not self.is_asleep and bool(self._matcher.is_accepting()))

    @property
    def must_end(self) -> bool:
        """Nothing but an end token can follow, so that the request may be ended without drawing one."""
        if self.is_finished:
            return True
        return not self.is_asleep and not self._matcher.is_error() and bool(self._matcher.is_stopped())

    def allowed(self) -> Mask:
        """The mask of the next token, read-only. Raises ConstraintFailed where nothing can follow, or too costly."""
        if self._mask is None:
            self._mask = self._computed_mask()
            self._mask.flags.writeable = False
        return self._mask

    def allows(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocabulary.size and bool(self.allowed()[token_id >> 5] >> (token_id & 31) & 1)

    def accept(self, token_id: int) -> None:
        """Advance by one token. Raises ConstraintFailed, and stays where it is, for one that is not allowed."""
        if not self.allows(token_id):
            raise ConstraintFailed(f"token {token_id} does not fit the output constraint")
        if not self._tokens and token_id == self._opened_by:
            self._awake_from = None
        elif not self.is_asleep and not self.is_finished:
            if token_id in self._vocabulary.eos_ids:
                self._ended_at = len(self._tokens)
            elif not self._matcher.consume_token(token_id):
                reason = self._reason()
                self._restore(len(self._tokens))
                raise ConstraintFailed(f"the output constraint cannot be followed further: {reason}")
        self._tokens.append(token_id)
        self._mask = None
        count = len(self._starts_after)
        if self.is_asleep and tuple(self._tokens[-count:]) == self._starts_after:
            self._awake_from = len(self._tokens)

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens, as if they had never been accepted."""
        assert 0 <= num_tokens <= len(self._tokens)
        if num_tokens:
            self._restore(len(self._tokens) - num_tokens)

    def window(self, draft: Sequence[int]) -> NDArray[np.int32]:
        """Masks [n + 1, words] of the positions of a draft, of which the first n tokens are allowed; n may be 0.

        Row i is the mask after i tokens of the draft, the same as step by step; the state stays where it is.
        Raises ConstraintFailed where not even the first mask can be had.
        """
        masks = [self.allowed()]
        start = len(self._tokens)
        try:
            for token_id in draft:
                if not self.allows(token_id):
                    break
                self.accept(token_id)
                masks.append(self.allowed())
        except ConstraintFailed:
            pass  # a draft that leads where nothing can follow ends before; should it come true, the step will say so
        finally:
            self._restore(start)
            self._mask = masks[0]
        return np.stack(masks)

    def num_allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft are allowed, from the first on."""
        return len(self.window(draft)) - 1

    def copy(self) -> GrammarState:
        """The same state, from where both go their own ways."""
        other = GrammarState.__new__(GrammarState)
        other.__dict__.update(self.__dict__)
        other._matcher = self._matcher.deep_copy()
        other._tokens = list(self._tokens)
        return other

    def _computed_mask(self) -> Mask:
        vocabulary = self._vocabulary
        if self.is_asleep:
            return vocabulary.text_mask.copy()
        if self.is_finished:
            return vocabulary.eos_mask.copy()
        start = time.thread_time()
        bits = self._matcher.compute_bitmask()  # a word too many where the vocabulary fills the last one
        words = np.frombuffer(bits, dtype=np.int32, count=vocabulary.num_words)
        if self._matcher.is_error():
            raise ConstraintFailed(f"the output constraint cannot be followed further: {self._reason()}")
        if time.thread_time() - start > self._limits.step_seconds:
            raise ConstraintFailed("the output constraint is too complex: one mask took too long")
        mask: Mask = words & vocabulary.text_mask
        if self._opened_by is not None and not self._tokens:
            mask[self._opened_by >> 5] |= np.array(1 << (self._opened_by & 31), dtype=np.uint32).view(np.int32)
        if self._matcher.is_accepting():
            mask |= vocabulary.eos_mask
        if not mask.any():
            raise ConstraintFailed("the output constraint cannot be followed further: no token fits")
        return mask

    def _num_consumed(self, num_tokens: int) -> int:
        """How many of the first tokens the matcher has seen: none of the reasoning, no end token."""
        if self._awake_from is None:
            return 0
        end = num_tokens if self._ended_at is None else min(num_tokens, self._ended_at)
        return max(0, end - self._awake_from)

    def _restore(self, num_tokens: int) -> None:
        """Be where the first `num_tokens` led; a matcher in error is made anew."""
        behind = self._num_consumed(len(self._tokens)) - self._num_consumed(num_tokens)
        if self._matcher.is_error() or (behind and not self._matcher.rollback(behind)):
            self._matcher = self._template.deep_copy()
            first = self._awake_from or 0
            self._matcher.consume_tokens(self._tokens[first : first + self._num_consumed(num_tokens)])
        del self._tokens[num_tokens:]
        self._mask = None
        if self._ended_at is not None and self._ended_at >= num_tokens:
            self._ended_at = None
        if self._opened_by is not None and not num_tokens:
            self._awake_from = 0
        elif self._starts_after and self._awake_from is not None and self._awake_from > num_tokens:
            self._awake_from = None

    def _reason(self) -> str:
        reasons = {
            "ParserTooComplex": "the grammar is too ambiguous here",
            "LexerTooComplex": "the expressions are too complex here",
            "NoExtensionBias": "no token fits",
        }
        return reasons.get(self._matcher.stop_reason(), "the grammar failed here")


class GrammarCompiler:
    """Constraints to grammars, within limits, the last ones kept. For any number of threads.

    A grammar that takes too long is refused; its thread ends by itself when its fuel is spent, and there are at most
    `limits.compile_threads` of them. Other refusals are remembered like what compiled.
    """

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits | None = None) -> None:
        self.vocabulary = vocabulary
        self.limits = limits or GrammarLimits()
        self._tokenizer = llguidance.LLTokenizer(_Tokenizer(vocabulary), eos_token=sorted(vocabulary.eos_ids))
        self._parser_limits = llguidance.LLParserLimits(
            max_items_in_row=self.limits.max_items_in_row,
            initial_lexer_fuel=self.limits.initial_lexer_fuel,
            step_lexer_fuel=self.limits.step_lexer_fuel,
            step_max_items=self.limits.step_max_items,
            max_lexer_states=self.limits.max_lexer_states,
            max_grammar_size=self.limits.max_grammar_size,
            verbose_errors=False,
        )
        self._cache: OrderedDict[str, llguidance.LLMatcher | str] = OrderedDict()  # grammar text -> matcher or refusal
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.limits.compile_threads)

    def compile(self, constraint: Constraint) -> CompiledGrammar:
        """Raises UsageError, in one line, for a constraint that is malformed, impossible, too large or too slow."""
        starts_after = constraint.starts_after
        if starts_after and not all(0 <= token < self.vocabulary.size for token in starts_after):
            raise UsageError("starts_after: not a token id of this model")
        text = grammar_text(constraint, self.limits)
        with self._lock:
            found = self._cache.get(text)
            if found is not None:
                self._cache.move_to_end(text)
        if found is None:
            found = self._built(text)
            self._remember(text, found)
        if isinstance(found, str):
            raise UsageError(f"{constraint.kind}: {found}")
        opened_by = constraint.opened_by
        if opened_by is not None and self._can_begin_with(found, opened_by):
            return CompiledGrammar(found, self.vocabulary, self.limits, None)
        return CompiledGrammar(found, self.vocabulary, self.limits, starts_after, opened_by)

    def _can_begin_with(self, matcher: llguidance.LLMatcher, token_id: int) -> bool:
        """Whether an output of the grammar can begin with a special token, or with the text of its name."""
        name = self.vocabulary.token_bytes[token_id]
        spelled = [self.vocabulary.token_bytes.index(bytes([byte])) for byte in name]
        return any(matcher.deep_copy().validate_tokens(ids) == len(ids) for ids in ([token_id], spelled))

    def _remember(self, text: str, found: llguidance.LLMatcher | str) -> None:
        with self._lock:
            if text not in self._cache:
                self._cached_bytes += len(text)
            self._cache[text] = found
            limits = self.limits
            while len(self._cache) > limits.max_cached_grammars or self._cached_bytes > limits.max_cached_bytes:
                self._cached_bytes -= len(self._cache.popitem(last=False)[0])

    def _built(self, text: str) -> llguidance.LLMatcher | str:
        seconds = self.limits.compile_seconds
        if not self._slots.acquire(timeout=seconds):
            raise UsageError("too many output constraints are being compiled; send the request again later")
        found: list[llguidance.LLMatcher | str] = []

        def work() -> None:
            try:
                found.append(self._compiled(text))
            except BaseException as error:  # a panic of the library is no Exception
                found.append(_one_line(str(error)))
            finally:
                self._slots.release()

        thread = threading.Thread(target=work, name="grammar-compiler", daemon=True)
        with _STACK_LOCK:
            usual = threading.stack_size(_STACK_BYTES)
            thread.start()
            threading.stack_size(usual)
        # In slices, so that a machine that was suspended does not count as a grammar that was slow.
        for _ in range(math.ceil(seconds / _SLICE)):
            thread.join(_SLICE)
            if not thread.is_alive():
                break
        if not found:
            raise UsageError(f"the output constraint takes longer than {seconds:g} s to compile")
        return found[0]

    def _compiled(self, text: str) -> llguidance.LLMatcher | str:
        """A matcher that has its first mask and can be rolled back, or why there is none."""
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=self._parser_limits)
        if matcher.is_error():
            return _one_line(matcher.get_error())
        probe = GrammarState(matcher, self.vocabulary, self.limits, ())
        try:
            words = probe.allowed() & self.vocabulary.text_mask
            first = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[:1]
            for token_id in first.tolist():
                probe.accept(token_id)
        except ConstraintFailed as error:
            return str(error)
        if probe.num_tokens and not probe._matcher.rollback(1):
            return "max_tokens and stop are not supported inside a grammar; suffix and lazy are"
        return matcher


def apply_masks(logits_RY: Tensor, masks: Sequence[Mask | None]) -> None:
    """Set what the masks forbid to -inf, in place; rows with None stay untouched.

    Columns above the mask's last word are padding and forbidden.
    """
    assert logits_RY.shape[0] == len(masks)
    for row_Y, mask in zip(logits_RY, masks, strict=True):
        if mask is None:
            continue
        bits = np.unpackbits(mask.view(np.uint8), count=min(32 * len(mask), len(row_Y)), bitorder="little")
        forbidden = torch.from_numpy(bits == 0).to(row_Y.device)
        row_Y[: len(bits)].masked_fill_(forbidden, -math.inf)
        row_Y[len(bits) :] = -math.inf


def _one_line(message: str) -> str:
    """The line of a library's message that says what is wrong, without the text around it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    line = (named or lines or ["cannot be compiled"])[0]
    return line if len(line) <= _MESSAGE_LENGTH else line[:_MESSAGE_LENGTH] + "…"
