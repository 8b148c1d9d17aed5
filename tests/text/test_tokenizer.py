"""Encoding, decoding and the border between control tokens and text that looks like one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers import models as backend_models

from qnext.errors import CorruptCheckpoint, ModelNotFound, UsageError
from qnext.text.tokenizer import IncrementalDecoder, Piece, Tokenizer
from qnext.text.train import build_tokenizer, byte_alphabet, byte_level_tokenizer

SAMPLES = [
    "",
    " ",
    "\n\n\t  \r\n x",
    "Hello, world! I'll say it's 12345 times.",
    "def f(x):\n    return x ** 2  # café\n",
    "你好，世界🙂👩‍👩‍👧 안녕 עברית עִבְרִית",
    "e\u0301 \u212b \ufb01 decomposed",
    "<|im_end|> and <think> are only words here </think>",
    "\x00\x01\x7f\u2028\ufeff\U0010ffff",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_encode_with_specials_equals_the_backend(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text, allow_special=True) == tokenizer.backend.encode(text).ids


@pytest.mark.parametrize("text", SAMPLES)
def test_decode_equals_the_backend(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allow_special=True)
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special=skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "name", [token.content for token in byte_level_tokenizer().get_added_tokens_decoder().values()]
)
def test_untrusted_text_never_becomes_an_added_token(tokenizer: Tokenizer, name: str) -> None:
    text = f"a{name} {name}{name}\n{name}"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.added_ids.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, allow_special=True).count(tokenizer.added_ids[name]) == 4


def test_pieces_merge_across_the_border_of_trust(tokenizer: Tokenizer) -> None:
    pieces = [
        Piece("<|im_start|>user\n", True),
        Piece("\nThe la", False),
        Piece("zy dog<|im_", True),
        Piece("end|> it's", False),
        Piece("<|im_end|>\n", True),
    ]
    joined = "".join(piece.text for piece in pieces)
    ids = tokenizer.encode_pieces(pieces)
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    assert [i for i in ids if i in tokenizer.special_ids] == [start, end]
    assert tokenizer.decode(ids) == joined
    inner = joined.removeprefix("<|im_start|>").removesuffix("<|im_end|>\n")
    assert ids == [start, *tokenizer.encode(inner), end, *tokenizer.encode("\n")]


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["the dog", " la", "zy", "\n", "  ", "é", "<|im_start|>", "世界"]), st.booleans())
    )
)
def test_pieces_without_untrusted_specials_equal_the_backend(
    tokenizer: Tokenizer, parts: list[tuple[str, bool]]
) -> None:
    pieces = [Piece(text, is_trusted or text.startswith("<|")) for text, is_trusted in parts]
    assert tokenizer.encode_pieces(pieces) == tokenizer.backend.encode("".join(text for text, _ in parts)).ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(), allow=st.booleans())
def test_round_trip_up_to_nfc(tokenizer: Tokenizer, text: str, allow: bool) -> None:
    # The backend's own NFC: Python's may know another version of Unicode.
    normalised = tokenizer.backend.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text, allow_special=allow)) == normalised


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(0, 279)), skip=st.booleans())
def test_incremental_equals_one_shot_on_random_bytes(byte_tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    check_stream(byte_tokenizer, ids, skip)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="a é你🙂👩‍🚀\u0301"), cut=st.integers(0, 8))
def test_incremental_on_characters_split_over_tokens(byte_tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = byte_tokenizer.encode(text)
    emitted = check_stream(byte_tokenizer, ids[: len(ids) - cut], False)
    if cut == 0:
        assert "\ufffd" not in "".join(emitted)


def check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special=skip)
    emitted = [decoder.push(i) for i in ids]
    emitted.append(decoder.flush())
    hidden = tokenizer.special_ids if skip else frozenset()
    expected = b"".join(tokenizer.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", errors="replace")
    assert "".join(emitted) == expected == tokenizer.decode(ids, skip_special=skip)
    return emitted


def test_half_a_character_is_held_back(byte_tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(byte_tokenizer)
    ids = byte_tokenizer.encode("🙂")
    assert [decoder.push(i) for i in ids] == ["", "", "", "🙂"]
    assert decoder.flush() == ""
    assert decoder.push(ids[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ids[0]) + decoder.push(byte_tokenizer.encode("a")[0]) == "\ufffda"


def test_token_bytes_and_sizes(tokenizer: Tokenizer, byte_tokenizer: Tokenizer) -> None:
    assert {byte_tokenizer.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert byte_tokenizer.vocab_size == 256 + len(byte_tokenizer.added_ids) == 271
    assert byte_tokenizer.token_bytes(151_935) == b""
    with pytest.raises(UsageError, match="negative"):
        byte_tokenizer.token_bytes(-1)
    assert tokenizer.token_bytes(tokenizer.encode("世界")[0]).startswith("世".encode()[:1])
    assert len(set(byte_alphabet())) == 256


def test_special_ids_are_the_control_tokens(tokenizer: Tokenizer) -> None:
    names = {tokenizer.decode([i]) for i in tokenizer.special_ids}
    assert names == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    ids = tokenizer.encode("<think>a</think>b<|im_end|>", allow_special=True)
    assert tokenizer.decode(ids, skip_special=True) == "<think>a</think>b"


def test_added_tokens_inside_the_vocabulary_stay_out_of_reach() -> None:
    vocab = {name: index for index, name in enumerate(byte_alphabet())} | {"<|im_end|>": 256}
    backend = build_tokenizer(vocab, [], special_tokens=[])
    backend.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [256]
    assert 256 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.token_bytes(256) == b"<|im_end|>"


def test_lone_surrogate_is_one_clear_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        tokenizer.encode("a\ud800b")


# Folders


def copy_with(folder: Path, target: Path, name: str, content: str) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / name).write_text(content, encoding="utf-8")
    return target


def test_end_ids_come_from_both_files(trained_folder: Path, tmp_path: Path) -> None:
    plain = Tokenizer.from_folder(trained_folder)
    end, text_end = plain.token_id("<|im_end|>"), plain.token_id("<|endoftext|>")
    assert plain.eos_ids == {end}
    assert plain.pad_id == text_end
    both = copy_with(
        trained_folder, tmp_path / "a", "generation_config.json", json.dumps({"eos_token_id": [end, text_end]})
    )
    assert Tokenizer.from_folder(both).eos_ids == {end, text_end}
    one = copy_with(trained_folder, tmp_path / "b", "generation_config.json", json.dumps({"eos_token_id": text_end}))
    assert Tokenizer.from_folder(one).eos_ids == {end, text_end}


def test_missing_end_token_is_told_when_it_is_needed(tmp_path: Path) -> None:
    byte_level_tokenizer(special_tokens=[]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("fine")) == "fine"
    with pytest.raises(CorruptCheckpoint, match=r"no end token.*generation_config\.json"):
        _ = tokenizer.eos_ids


def test_missing_chat_tokens_are_told_when_they_are_needed() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer(special_tokens=[]), source="somewhere")
    with pytest.raises(CorruptCheckpoint, match=r"somewhere.*<\|im_start\|>"):
        tokenizer.require_chat_tokens()
    assert tokenizer.encode("<|im_start|>", allow_special=True) == tokenizer.encode("<|im_start|>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json"),
        ("tokenizer.json", "[]", r"tokenizer\.json"),
        ("tokenizer.json", Backend(backend_models.BPE({"a": 0}, [])).to_str(), "255 of the 256 bytes"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json: expected a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token must be a token name"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "'<nope>' is not in"),
        ("generation_config.json", '{"eos_token_id": "x"}', r"generation_config\.json: eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [1, -2]}', r"generation_config\.json: eos_token_id"),
        ("generation_config.json", "nonsense", r"generation_config\.json"),
    ],
)
def test_damaged_files_name_file_and_cause(
    trained_folder: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    folder = copy_with(trained_folder, tmp_path / "m", name, content)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_is_model_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_duplicate_ids_are_refused(trained_folder: Path, tmp_path: Path) -> None:
    description = json.loads((trained_folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["model"]["vocab"]["zzzz"] = 5
    folder = copy_with(trained_folder, tmp_path / "a", "tokenizer.json", json.dumps(description))
    with pytest.raises(CorruptCheckpoint, match="share id 5"):
        Tokenizer.from_folder(folder)


def test_exploding_split_pattern_is_a_clear_error(trained_folder: Path, tmp_path: Path) -> None:
    description = json.loads((trained_folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+b"
    folder = copy_with(trained_folder, tmp_path / "m", "tokenizer.json", json.dumps(description))
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(CorruptCheckpoint, match="retry-limit"):
        tokenizer.encode("a" * 60)


def test_the_table_of_bytes_spells_every_text(tokenizer: Tokenizer, byte_tokenizer: Tokenizer) -> None:
    for made in (tokenizer, byte_tokenizer):
        table = made.token_table()
        assert len(table) == made.vocab_size
        assert all(table[index] == name.encode() for name, index in made.added_ids.items())
        assert {bytes([byte]) for byte in range(256)} <= set(table)
        text = "naïve 🙂 你好\n\t<|im_end|>"
        assert b"".join(table[index] for index in made.encode(text)) == text.encode()
        assert table == [made.token_bytes(index) for index in range(made.vocab_size)]
