"""Added tokens in text: as the tokenizers library finds them, and never a reserved one in text from outside."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qnext.text.added_tokens import FAMILY_CONTROL, FAMILY_MARKUP
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message
from qnext.text.prompts import ChatPrompt
from qnext.text.tokenizer import Piece, Tokenizer
from qnext.text.train import DEFAULT_SPECIAL_TOKENS, byte_level_tokenizer, save_tokenizer, train_bpe

from .conftest import CORPUS

WORDS = [*(f"<s_a_{i}>" for i in range(12)), "qwertol", "[C@@H]", "<|speech_7|>", "鱼雷", "§4 a"]


def extended(*tokens: AddedToken | str, trained: bool = False) -> Backend:
    backend = train_bpe(CORPUS, vocab_size=500) if trained else byte_level_tokenizer()
    backend.add_tokens([AddedToken(t, special=False, normalized=True) if isinstance(t, str) else t for t in tokens])
    return backend


@pytest.mark.parametrize("trained", [False, True])
def test_words_are_found_in_every_text(trained: bool) -> None:
    backend = extended(*WORDS, trained=trained)
    tokenizer = Tokenizer(backend)
    text = "next after <s_a_3><s_a_11>, qwertol? C[C@@H]O <|speech_7|>鱼雷x§4 a §4 b"
    want = backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == tokenizer.encode(text, allow_special=True) == want
    assert tokenizer.encode_batch([text, text[::-1]])[0] == want
    assert len(set(want) & {backend.token_to_id(word) for word in WORDS}) == 7
    assert tokenizer.decode(want) == text
    assert not set(WORDS) & set(tokenizer.reserved_ids)


@pytest.mark.parametrize("name", [*FAMILY_CONTROL, *FAMILY_MARKUP])
@pytest.mark.parametrize("special", [False, True])
def test_the_familys_names_are_reserved_whatever_the_file_says(name: str, special: bool) -> None:
    backend = byte_level_tokenizer(special_tokens=[])
    backend.add_tokens([AddedToken(name, special=special)])
    tokenizer = Tokenizer(backend)
    index = tokenizer.added_ids[name]
    assert index not in tokenizer.encode(f"a{name}b")
    assert tokenizer.encode(f"a{name}b", allow_special=True).count(index) == 1
    assert (index in tokenizer.special_ids) == (special or name in FAMILY_CONTROL)


def test_the_lists_of_names_hold_those_of_our_own_vocabularies() -> None:
    for token in DEFAULT_SPECIAL_TOKENS:
        assert token.content in (FAMILY_CONTROL if token.is_control else FAMILY_MARKUP)


@pytest.mark.parametrize("mark", ["<|user|>", "[INST]", "<start_of_turn>", "### User:", "«bot»"])
def test_marks_that_the_template_writes_are_reserved(tmp_path: Path, mark: str) -> None:
    """A file may forget to call them special; a user's text must not make a turn of its own."""
    template = "{% for m in messages %}" + mark + "{{ m.content }} word {% endfor %}"
    save_tokenizer(extended(mark, "word"), tmp_path, model_max_length=99, chat_template=template)
    tokenizer = Tokenizer.from_folder(tmp_path)
    chat = ChatFormat.for_folder(tmp_path)
    ids = ChatPrompt([Message("user", f"a{mark}b word")]).encode(chat, tokenizer).token_ids
    assert ids.count(tokenizer.added_ids[mark]) == 1, "the template's own"
    assert ids.count(tokenizer.added_ids["word"]) == 2, "a word of letters is no mark"


FLAGGED = [
    AddedToken("<mask>", lstrip=True, special=True),
    AddedToken("<sep>", rstrip=True, special=True),
    AddedToken("<both>", lstrip=True, rstrip=True, special=True),
    AddedToken("<alone>", single_word=True, special=True),
    AddedToken("<n>", normalized=True, special=True),
    AddedToken("<word_l>", lstrip=True, special=False),
    AddedToken("<word_r>", rstrip=True, normalized=True, special=False),
    AddedToken("lonely", single_word=True, special=False),
    AddedToken("caf\u00e9", normalized=True, special=False),
    AddedToken("<think>x", special=False),
]
PARTS = [
    *(token.content for token in FLAGGED),
    "<think>",
    "<|im_end|>",
    " ",
    "  \n",
    "\t",
    "\u00a0",
    "\u2003",
    "\x1c",
    "a",
    "_",
    "é",
    "cafe\u0301",
    "\u0338",
    "\u0301",
    "漢",
    "9",
    "²",
    "\u200d",
    "-",
]


def test_flags_mean_what_they_mean_to_the_library() -> None:
    backend = extended(*FLAGGED, trained=True)
    tokenizer = Tokenizer(backend)
    draw = random.Random(7)
    for _ in range(3_000):
        text = "".join(draw.choices(PARTS, k=draw.randint(1, 9)))
        assert tokenizer.encode(text, allow_special=True) == backend.encode(text, add_special_tokens=False).ids, text


def test_text_from_outside_keeps_its_spaces_but_at_a_trusted_mark() -> None:
    backend = extended(*FLAGGED)
    tokenizer = Tokenizer(backend)
    mask, space = tokenizer.added_ids["<mask>"], tokenizer.encode(" ")[0]
    assert tokenizer.encode(" <mask>").count(space) == 1
    assert tokenizer.encode_pieces([Piece("a ", False), Piece("<mask>", True)])[1:] == [mask]
    sep = tokenizer.added_ids["<sep>"]
    found = tokenizer.encode_pieces([Piece("<sep>", True), Piece("  <sep>", False), Piece(" <sep>b", True)])
    assert [i for i in found if i == sep] == [sep, sep] and found[0] == sep and space in found


def test_pieces_of_words_and_marks_equal_the_library() -> None:
    backend = extended(*FLAGGED, *WORDS)
    tokenizer = Tokenizer(backend)
    draw = random.Random(3)
    harmless = [part for part in [*PARTS, *WORDS] if part not in tokenizer.reserved_ids]
    for _ in range(1_000):
        parts = draw.choices([*PARTS, *WORDS], k=draw.randint(1, 8))
        pieces = [Piece(part, part not in harmless or draw.random() < 0.5) for part in parts]
        text = "".join(parts)
        # Marks may be cut by the border of two pieces: then the library alone sees one.
        if sum(text.count(name) for name in tokenizer.reserved_ids) == sum(p in tokenizer.reserved_ids for p in parts):
            assert tokenizer.encode_pieces(pieces) == backend.encode(text, add_special_tokens=False).ids, pieces
