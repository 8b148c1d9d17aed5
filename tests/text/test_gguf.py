"""Vocabularies as keys of GGUF files, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qnext.errors import CorruptCheckpoint, NotSupported, UsageError
from qnext.text.gguf import has_vocabulary, vocabulary_keys, write_vocabulary
from qnext.text.templates import INSTRUCT_TEMPLATE
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import (
    DEFAULT_SPECIAL_TOKENS,
    SpecialToken,
    build_tokenizer,
    byte_level_tokenizer,
    save_tokenizer,
    train_bpe,
)

TEXTS = ["the cat sat on the mat, the hat", "def f(x):\n    return x + 1\n", "Grüße, 2026 and 42"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe(TEXTS, vocab_size=300 + len(DEFAULT_SPECIAL_TOKENS))
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, path, model_max_length=77, chat_template=INSTRUCT_TEMPLATE)
    assert tokenizer.token_to_id("<|im_end|>") == tokenizer.get_vocab_size() - len(DEFAULT_SPECIAL_TOKENS) + 2
    return path


def keys_of(folder: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_folder(folder)
    keys = vocabulary_keys(folder, num_rows=tokenizer.vocab_size + 5)
    return keys | {"tokenizer.ggml.eos_token_id": tokenizer.token_id("<|im_end|>")}


def test_keys(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    keys = keys_of(folder)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == tokenizer.vocab_size + 5
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert types[-5:] == [5] * 5
    assert types[:256] == [1] * 256
    by_name = dict(zip(tokens, types, strict=True))
    # Markup that looks like a control token is one for llama.cpp; what does not, is not.
    assert (by_name["<|im_end|>"], by_name["<|fim_prefix|>"], by_name["<think>"]) == (3, 3, 4)
    assert keys["tokenizer.ggml.merges"]
    assert keys["tokenizer.chat_template"] == INSTRUCT_TEMPLATE


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    write_vocabulary(keys_of(folder), tmp_path, source="m.gguf", model_max_length=77)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text())
    assert (tmp_path / "chat_template.jinja").read_text() == INSTRUCT_TEMPLATE
    ours, theirs = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(folder)
    for text in [*TEXTS, "<|im_start|>user\n<think>é</think><|im_end|>"]:
        for allow in (False, True):
            assert ours.encode(text, allow_special=allow) == theirs.encode(text, allow_special=allow)
    assert ours.eos_ids == theirs.eos_ids | {theirs.token_id("<|endoftext|>")}


def test_a_tokenizer_without_merges_has_a_list_of_them(tmp_path: Path) -> None:
    save_tokenizer(byte_level_tokenizer(), tmp_path / "bytes", model_max_length=77)
    keys = keys_of(tmp_path / "bytes")
    assert keys["tokenizer.ggml.merges"] == ["\u0100 \u0100"]
    write_vocabulary(keys, tmp_path / "back", source="m.gguf", model_max_length=77)
    ours, theirs = (Tokenizer.from_folder(tmp_path / name) for name in ("back", "bytes"))
    for text in [*TEXTS, "\0\0\0"]:
        assert ours.encode(text) == theirs.encode(text)


def test_ids_that_are_left_out(folder: Path, tmp_path: Path) -> None:
    """Unused ids between the merges and the added tokens, as a padded model may have them."""
    keys = keys_of(folder)
    tokens, types = list(keys["tokenizer.ggml.tokens"]), list(keys["tokenizer.ggml.token_type"])
    first = types.index(3)
    tokens[first:first], types[first:first] = ["[PADx]", "[PADy]"], [5, 5]
    moved = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    moved["tokenizer.ggml.eos_token_id"] = keys["tokenizer.ggml.eos_token_id"] + 2
    write_vocabulary(keys | moved, tmp_path, source="m.gguf", model_max_length=77)
    ours, theirs = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(folder)
    assert ours.token_id("<|im_end|>") == theirs.token_id("<|im_end|>") + 2
    assert ours.encode(TEXTS[0]) == theirs.encode(TEXTS[0])
    assert ours.encode("<think>", allow_special=True) == [theirs.token_id("<think>") + 2]


def test_another_family_is_refused(folder: Path, tmp_path: Path) -> None:
    description = json.loads((folder / "tokenizer.json").read_text())
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "\\w+"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match=r"tokenizer.json splits text in another way"):
        vocabulary_keys(tmp_path, num_rows=1000)


def test_more_tokens_than_rows(folder: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="the model 100"):
        vocabulary_keys(folder, num_rows=100)


def change(key: str, value: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": (change("tokens", None), "tokenizer.ggml.tokens: must be a list of str"),
    "numbers as tokens": (change("tokens", [1, 2]), "tokenizer.ggml.tokens: must be a list of str"),
    "types": (change("token_type", [1]), "tokenizer.ggml.token_type: 1 types of"),
    "truth as types": (change("token_type", [True]), "tokenizer.ggml.token_type: must be a list of int"),
    "merge": (change("merges", ["a b c"]), "tokenizer.ggml.merges: 'a b c' is no pair"),
    "merge of nothing": (change("merges", ["ab "]), "tokenizer.ggml.merges: 'ab ' is no pair"),
    "merge of strangers": (change("merges", ["€ a"]), "tokenizer.ggml.merges: '€ a' makes no token out of two"),
    "merge to a stranger": (change("merges", ["ī Ā"]), "tokenizer.ggml.merges: 'ī Ā' makes no token out of two"),
    "no merges": (change("merges", None), "tokenizer.ggml.merges: must be a list of str"),
    "template": ({"tokenizer.chat_template": 3}, "tokenizer.chat_template: must be text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_key_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(CorruptCheckpoint, match=r"^m\.gguf: ") as caught:
        write_vocabulary(keys_of(folder) | changes, tmp_path, source="m.gguf", model_max_length=77)
    assert message in str(caught.value)


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "model": (change("model", "llama"), "tokenizer.ggml.model: 'llama' is not supported, only 'gpt2'"),
    "no model": (change("model", None), "tokenizer.ggml.model: 'None' is not supported"),
    "splitting": (change("pre", "llama-bpe"), "tokenizer.ggml.pre: 'llama-bpe' is not supported, only 'qwen2'"),
    "newer splitting": (change("pre", "qwen35"), "tokenizer.ggml.pre: 'qwen35' is not supported"),
    "splitting of none": (change("pre", "default"), "tokenizer.ggml.pre: 'default' is not supported"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_tokenizers_are_not_called_damage(folder: Path, tmp_path: Path, name: str) -> None:
    changes, message = FOREIGN[name]
    with pytest.raises(NotSupported, match=rf"^m\.gguf: key {message}"):
        write_vocabulary(keys_of(folder) | changes, tmp_path, source="m.gguf", model_max_length=77)


def texts_agree(one: Path, other: Path) -> None:
    ours, theirs = Tokenizer.from_folder(one), Tokenizer.from_folder(other)
    for text in [*TEXTS, "<|im_start|>user\n<think>é</think><tool_call><|im_end|>"]:
        for allow in (False, True):
            assert ours.encode(text, allow_special=allow) == theirs.encode(text, allow_special=allow)
    assert ours.special_ids == theirs.special_ids
    assert ours.eos_ids == theirs.eos_ids | {theirs.token_id("<|endoftext|>")}


# what is changed, and the key that a warning names
LIBERAL: dict[str, tuple[dict[str, Any], str | None]] = {
    "splitting is missing": (change("pre", None), "tokenizer.ggml.pre: missing; texts are split as 'qwen2'"),
    "splitting of the same kind": (change("pre", "deepseek-r1-qwen"), None),
    "types are missing": (change("token_type", None), "tokenizer.ggml.token_type: missing"),
    "scores": (change("scores", [0.0] * 9), None),
    "other keys": ({"tokenizer.huggingface.json": "{}", "tokenizer.ggml.seperator_token_id": 1}, None),
    "end that is none": (change("eos_token_id", 10**6), "tokenizer.ggml.eos_token_id: 1000000 is no token"),
    "end is missing": (change("eos_token_id", None), None),
    "padding of some tools": (change("padding_token_id", -1), None),
    "padding that is none": (change("padding_token_id", "x"), "tokenizer.ggml.padding_token_id: x is no token"),
    "beginning is added": (change("add_bos_token", True), "tokenizer.ggml.add_bos_token: is true"),
    "end is added": (change("add_eos_token", True), "tokenizer.ggml.add_eos_token: is true"),
    "templates": (
        {"tokenizer.chat_template.tool_use": "x", "tokenizer.chat_templates": ["tool_use"]},
        "only tokenizer.c",
    ),
}


@pytest.mark.parametrize("name", LIBERAL)
def test_the_same_tokenizer_from_fewer_or_other_keys(
    folder: Path, tmp_path: Path, name: str, warned: Callable[[], list[str]]
) -> None:
    changes, warning = LIBERAL[name]
    keys = {key: value for key, value in (keys_of(folder) | changes).items() if value is not None}
    write_vocabulary(keys, tmp_path, source="m.gguf", model_max_length=77)
    texts_agree(tmp_path, folder)
    messages = warned()
    assert (warning is None) == (not messages)
    assert warning is None or warning in messages[0]


def test_types_that_say_little(folder: Path, tmp_path: Path) -> None:
    """Undefined is normal, unknown is control, a longer list is cut, an empty name is unused."""
    keys = keys_of(folder)
    types = [{1: 0, 3: 2}.get(kind, kind) for kind in keys["tokenizer.ggml.token_type"]]
    tokens = [*keys["tokenizer.ggml.tokens"][:-1], ""]
    changes = change("token_type", [*types[:-1], 1, 6, 6]) | change("tokens", tokens)
    write_vocabulary(keys | changes, tmp_path, source="m.gguf", model_max_length=77)
    texts_agree(tmp_path, folder)


def test_all_end_tokens_count(folder: Path, tmp_path: Path) -> None:
    ids = {name: i for i, name in enumerate(keys_of(folder)["tokenizer.ggml.tokens"])}
    changes = change("eot_token_id", ids["<|file_sep|>"]) | change("eom_token_id", ids["<|fim_pad|>"])
    write_vocabulary(keys_of(folder) | changes, tmp_path, source="m.gguf", model_max_length=77)
    expected = [ids[name] for name in ("<|im_end|>", "<|file_sep|>", "<|fim_pad|>", "<|endoftext|>")]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == expected


SAMPLING: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "none": ({}, {}, None),
    "instruct": (
        {"temp": 0.699999988079071, "top_k": 20, "top_p": 0.800000011920929, "min_p": 0.0, "sequence": "kpmt"},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.0, "do_sample": True},
        None,
    ),
    "greedy": ({"temp": 0}, {"temperature": 0.0, "do_sample": False}, None),
    "all tokens": ({"top_k": -1, "top_p": 1}, {"top_p": 1.0, "do_sample": True}, None),
    "penalty": (
        {"penalty_repeat": 1.0499999523162842, "penalty_last_n": 64},
        {"repetition_penalty": 1.05, "do_sample": True},
        "penalty_last_n: without effect, repetition_penalty counts all tokens",
    ),
    "penalty of all tokens": (
        {"penalty_repeat": 1.5, "penalty_last_n": -1},
        {"repetition_penalty": 1.5, "do_sample": True},
        None,
    ),
    "penalty of no token": (
        {"penalty_repeat": 1.5, "penalty_last_n": 0, "min_p": 0.5},
        {"min_p": 0.5, "do_sample": True},
        None,
    ),
    "window without a penalty": ({"penalty_last_n": 64}, {}, None),
    "window and a penalty of one": (
        {"penalty_repeat": 1.0, "penalty_last_n": 64},
        {"repetition_penalty": 1.0, "do_sample": True},
        None,
    ),
    "beyond the range": ({"top_p": 1.5, "temp": 0.5}, {"temperature": 0.5, "do_sample": True}, "top_p: 1.5 is out of"),
    "text": ({"temp": "hot"}, {}, "general.sampling.temp: hot is out of range"),
    "no counterpart": ({"mirostat": 2}, {}, "general.sampling.mirostat: has no counterpart"),
    "one that does nothing": ({"xtc_probability": 0.0, "mirostat": 0, "mirostat_tau": 5.0}, {}, None),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_values_for_sampling(folder: Path, tmp_path: Path, name: str, warned: Callable[[], list[str]]) -> None:
    given, expected, warning = SAMPLING[name]
    keys = keys_of(folder) | {f"general.sampling.{key}": value for key, value in given.items()}
    write_vocabulary(keys, tmp_path, source="m.gguf", model_max_length=77)
    values = json.loads((tmp_path / "generation_config.json").read_text())
    assert values == {"eos_token_id": values["eos_token_id"]} | expected
    messages = warned()
    assert (warning is None) == (not messages)
    assert warning is None or warning in messages[0]


@pytest.mark.parametrize("keys", [{}, change("model", "none"), change("model", "no_vocab")])
def test_a_file_without_a_vocabulary(folder: Path, keys: dict[str, Any]) -> None:
    assert has_vocabulary(keys_of(folder))
    assert not has_vocabulary(keys)


def test_merges_are_needed(folder: Path, tmp_path: Path) -> None:
    keys = keys_of(folder)
    del keys["tokenizer.ggml.merges"]
    with pytest.raises(CorruptCheckpoint, match=r"^m\.gguf: key tokenizer\.ggml\.merges: must be a list of str"):
        write_vocabulary(keys, tmp_path, source="m.gguf", model_max_length=77)


@pytest.mark.parametrize("kind", ["twice", "byte", "not byte-level"])
def test_wrong_tokens(folder: Path, tmp_path: Path, kind: str) -> None:
    keys = keys_of(folder)
    tokens, types = list(keys["tokenizer.ggml.tokens"]), list(keys["tokenizer.ggml.token_type"])
    if kind == "twice":
        tokens[5] = tokens[6]
    elif kind == "byte":
        types[5] = 6
    else:
        tokens[5] = "€"
    with pytest.raises(NotSupported if kind == "not byte-level" else CorruptCheckpoint, match=r"^m\.gguf: "):
        write_vocabulary(
            keys | change("tokens", tokens) | change("token_type", types) | change("merges", []),
            tmp_path,
            source="m.gguf",
            model_max_length=77,
        )


def test_no_end_token_at_all(tmp_path: Path) -> None:
    from qnext.text.train import byte_alphabet

    backend = build_tokenizer(
        {name: i for i, name in enumerate(byte_alphabet())}, [], special_tokens=[SpecialToken("<a>", True)]
    )
    save_tokenizer(backend, tmp_path, model_max_length=7, eos_token="<a>", pad_token="<a>")
    keys = vocabulary_keys(tmp_path, num_rows=257)
    with pytest.raises(CorruptCheckpoint, match="no token is known to end a text"):
        write_vocabulary(keys, tmp_path / "out", source="m.gguf", model_max_length=7)
    write_vocabulary(keys | change("eos_token_id", 256), tmp_path / "out", source="m.gguf", model_max_length=7)
    assert Tokenizer.from_folder(tmp_path / "out").eos_ids == {256}
