"""A long text in parts gives the tokens of the whole, whatever the tokenizer; and what cannot be cut can be ended."""

from __future__ import annotations

import threading
from functools import cache
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from qnext.confined.process import ConfinedLimits
from qnext.errors import UsageError
from qnext.text import tokenizer as tokenizer_module
from qnext.text.confined_tokenizer import ConfinedTokenizer, EncodingStopped, TooManyTokens, Watch
from qnext.text.cuts import LLAMA3_PATTERN, Cuts
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import train_bpe
from tests.pace import growth
from tests.text.conftest import CORPUS

# What splitters treat each in its own way, beside one another in every order.
CHARACTERS = (
    "ab Z's'RE1 23\n\n\r\t\u00a0\u3000\u200b\u200d\ufeff!?.,;_<|>-é\u0301\u0323\u0300世界。，가\u1100\u1161\u11a8🙂ⅷ२"
)
TEXTS = st.lists(
    st.one_of(
        st.text(CHARACTERS, max_size=12),
        st.text(max_size=6),
        st.sampled_from(
            ["it's ", "we'RE", "\r\n\r\n", "   \n", " \n x", "word", "1234", "x1", "new york", "York", "K\u030a", "  "]
        ),
    ),
    max_size=24,
).map("".join)


def _family(**more: Any) -> Backend:
    backend = train_bpe(CORPUS, vocab_size=700)
    for name, value in more.items():
        setattr(backend, name, value)
    return backend


def _splitter(pattern: str, *, behavior: str = "isolated", prefix: bool = False) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior=behavior),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )


def _with_words(*words: AddedToken) -> Backend:
    backend = _family()
    backend.add_tokens(list(words))
    return backend


KINDS: dict[str, tuple[Backend, bool]] = {  # and whether cuts are known
    "the family's": (_family(), True),
    "without a normaliser": (_family(normalizer=normalizers.Sequence([])), True),
    "of Llama 3": (_family(pre_tokenizer=_splitter(LLAMA3_PATTERN)), True),
    "of GPT-2": (_family(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)), True),
    "with a prefix": (_family(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
    "of another pattern": (_family(pre_tokenizer=_splitter(r"\s+|\S+")), False),
    "that merges with what precedes": (_family(pre_tokenizer=_splitter(LLAMA3_PATTERN, behavior="removed")), False),
    "of another normaliser": (_family(normalizer=normalizers.NFKC()), False),
    "with a word": (_with_words(AddedToken("word", normalized=True)), True),
    "with a word of two": (_with_words(AddedToken("new york", normalized=True)), False),
    "with a word that strips": (_with_words(AddedToken("York", lstrip=True, rstrip=True)), False),
    "with a word that stands alone": (_with_words(AddedToken("York", single_word=True)), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_are_known_for_these(kind: str) -> None:
    backend, are_known = KINDS[kind]
    tokenizer = Tokenizer(backend)
    assert (len(list(_cuts_of(tokenizer).parts("some words " * 400, 100))) > 1) is are_known


@cache
def tokenizers() -> dict[str, Tokenizer]:
    return {kind: Tokenizer(backend) for kind, (backend, _) in KINDS.items()}


def assert_parts_give_the_tokens_of_the_whole(text: str, size: int) -> None:
    """Of all kinds: to make a text up takes longer than to cut it and to encode it."""
    for kind, tokenizer in tokenizers().items():
        parts = list(_cuts_of(tokenizer).parts(text, size))
        assert "".join(parts) == text, kind
        assert list(chain.from_iterable(tokenizer.encode_batch(parts))) == tokenizer.encode_batch([text])[0], kind


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, size=st.integers(1, 40))
def test_parts_give_the_tokens_of_the_whole(text: str, size: int) -> None:
    assert_parts_give_the_tokens_of_the_whole(text, size)


@pytest.mark.slow
@settings(max_examples=1_000, deadline=None)
@given(text=TEXTS, size=st.integers(1, 40))
def test_parts_give_the_tokens_of_the_whole_at_length(text: str, size: int) -> None:
    assert_parts_give_the_tokens_of_the_whole(text, size)


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    return x\n\n" * 40_000, "你好，世界。" * 60_000, "1" * 200_000, "слово " * 50_000],
    ids=["code", "chinese", "digits", "russian"],
)
def test_ordinary_text_is_cut_into_small_parts(tokenizer: Tokenizer, text: str) -> None:
    assert max(map(len, _cuts_of(tokenizer).parts(text, 10_000))) <= 10_000


def _cuts_of(tokenizer: Tokenizer) -> Cuts:
    return tokenizer._cuts


def test_a_long_text_is_the_same_in_parts_and_apart(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all ways: cut, between reserved tokens, and as one word in the child process."""
    monkeypatch.setattr(tokenizer_module, "_PART", 50)
    monkeypatch.setattr(tokenizer_module, "_LONGEST", 200)
    text = "The lazy dog. " * 30 + "<|im_end|>" + "ab" * 400 + "<think>é\u0301" + "世界 " * 90 + "<|im_start|>" * 30
    for allow in (True, False):
        whole = tokenizer.backend.encode(text).ids if allow else tokenizer.encode_batch([text])[0]
        assert tokenizer.encode(text, allow_special=allow) == whole
        assert tokenizer.encode(text, allow_special=allow, watch=Watch()) == whole
    tokenizer.close()


def test_more_tokens_than_allowed_end_it_early(tokenizer: Tokenizer) -> None:
    text = "The lazy dog. " * 30_000

    def stop_early() -> None:
        with pytest.raises(TooManyTokens) as caught:
            tokenizer.encode(text, watch=Watch(most=100))
        assert 100 < caught.value.num_tokens < 40_000

    assert growth(stop_early, lambda: tokenizer.encode(text), tries=2) > 3


def test_a_stop_ends_a_word_in_the_child(tokenizer: Tokenizer) -> None:
    confined = ConfinedTokenizer(tokenizer.backend.to_str)
    watch = Watch()
    timer = threading.Timer(0.8, watch.stop)
    timer.start()
    try:
        with pytest.raises(EncodingStopped):
            while True:
                confined.encode("ab" * 1_000_000, watch=watch)
        assert confined.encode("The lazy dog", watch=Watch()) == tokenizer.encode("The lazy dog"), "another starts"
    finally:
        timer.join()
        confined.close()


def test_a_late_stop_never_ends_the_next_encoding() -> None:
    watch, is_ending, may_end = Watch(), threading.Event(), threading.Event()

    def end() -> None:
        is_ending.set()
        may_end.wait()

    stopper = threading.Thread(target=watch.stop)
    with watch.ends(end):
        stopper.start()
        is_ending.wait()
        threading.Timer(0.1, may_end.set).start()
    assert may_end.is_set(), "the context outlasts what ends it"
    stopper.join()


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (ConfinedLimits(seconds=0.2, cpu_seconds=10.0, memory_bytes=1 << 30, answer_bytes=1 << 20), "time"),
        (ConfinedLimits(seconds=30.0, cpu_seconds=20.0, memory_bytes=90 << 20, answer_bytes=1 << 20), "memory"),
    ],
    ids=["time", "memory"],
)
def test_a_word_beyond_its_limits_is_refused(tokenizer: Tokenizer, limits: ConfinedLimits, what: str) -> None:
    confined = ConfinedTokenizer(tokenizer.backend.to_str, limits=limits)
    try:
        with pytest.raises(UsageError, match=f"2000000 characters and no boundary between words takes too much {what}"):
            confined.encode("\u0301" * 2_000_000, watch=Watch())
        assert confined.encode("dog", watch=Watch()) == tokenizer.encode("dog")
    finally:
        confined.close()


def test_what_is_no_unicode_is_refused_there_too(tokenizer: Tokenizer) -> None:
    confined = ConfinedTokenizer(tokenizer.backend.to_str)
    try:
        with pytest.raises(UsageError, match="not valid Unicode"):
            confined.encode("a\ud800", watch=Watch())
    finally:
        confined.close()
