"""Streamed text equals the decoded whole, cut at the first stop string wherever the token borders lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import UsageError
from qnext.text.stream import TextStream
from qnext.text.tokenizer import Tokenizer


def run(tokenizer: Tokenizer, text: str, stop: list[str]) -> tuple[list[str], str | None]:
    stream = TextStream(tokenizer, stop=stop)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
        if stream.stop_string is not None:
            break
    pieces.append(stream.finish())
    return pieces, stream.stop_string


def test_without_stop_strings_everything_passes(tokenizer: Tokenizer) -> None:
    text = "naïve café 🙂, 你好"
    pieces, stopped = run(tokenizer, text, [])
    assert "".join(pieces) == text and stopped is None
    assert "\ufffd" not in "".join(pieces)


def test_a_stop_string_may_span_tokens(byte_tokenizer: Tokenizer) -> None:
    pieces, stopped = run(byte_tokenizer, "Hello User: more", ["User:"])
    assert ("".join(pieces), stopped) == ("Hello ", "User:")
    assert pieces[:6] == list("Hello ")


def test_a_possible_beginning_is_held_and_given_back(byte_tokenizer: Tokenizer) -> None:
    stream = TextStream(byte_tokenizer, stop=["aab"])
    assert [stream.push(token) for token in byte_tokenizer.encode("xaaa")] == ["x", "", "", "a"]
    assert stream.finish() == "aa"
    assert stream.stop_string is None


def test_the_earliest_stop_string_wins(tokenizer: Tokenizer) -> None:
    pieces, stopped = run(tokenizer, "one two three", ["three", "two"])
    assert ("".join(pieces), stopped) == ("one ", "two")


def test_nothing_comes_after_a_stop(byte_tokenizer: Tokenizer) -> None:
    stream = TextStream(byte_tokenizer, stop=["b"])
    assert "".join(stream.push(token) for token in byte_tokenizer.encode("abcd")) + stream.finish() == "a"


def test_control_tokens_are_hidden_and_an_unfinished_character_shows(byte_tokenizer: Tokenizer) -> None:
    stream = TextStream(byte_tokenizer, stop=["z"])
    assert stream.push(byte_tokenizer.token_id("<|im_end|>")) == ""
    assert stream.push(byte_tokenizer.encode("é")[0]) == ""
    assert stream.finish() == "\ufffd"


def test_an_empty_stop_string_is_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="empty"):
        TextStream(byte_tokenizer, stop=["a", ""])


@given(text=st.text(alphabet="abé🙂\n", max_size=40), stop=st.lists(st.text(alphabet="abé\n", min_size=1, max_size=4)))
def test_cut_at_the_first_completed_stop_string(byte_tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    pieces, stopped = run(byte_tokenizer, text, stop)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert "".join(pieces) == text and stopped is None
        return
    seen = text[: min(ends)]  # one token per byte: the text is looked at after every character
    assert "".join(pieces) == seen[: min(seen.find(s) for s in stop if s in seen)]
    assert stopped in stop
