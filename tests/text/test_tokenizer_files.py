"""Tokenizers in the forms in which people save them, against transformers."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers import models as backend_models
from transformers import AutoTokenizer

from qnext.checkpoint.save import TOKENIZER_FILES, write_side_files
from qnext.config import PRESETS
from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, QnextWarning
from qnext.text.tokenizer import Tokenizer
from qnext.text.tokenizer_files import READ_FORMS, UNREAD_FORMS

PARTS = [
    "e\u0301",
    "é",
    "\u1112\u1161\u11ab",
    "1234567890",
    "\r\n",
    "\n\n\n",
    "   ",
    "\t",
    "👩‍👩‍👧",
    "\ue000",
    "\u00a0",
    "'s",
    "'LL",
    "٣٤",
    "漢字",
    "\x00",
    "\ufeff",
    "a",
    "Zed",
    "_",
    "-->",
    "ﬁ",
    "İ",
    "\u2028",
    "<|im_end|>",
    "<think>",
    "quick",
]


def texts(count: int = 300) -> list[str]:
    draw = random.Random(11)
    return ["".join(draw.choices(PARTS, k=draw.randint(0, 12))) for _ in range(count)]


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def configuration(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def folder(trained_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_folder, tmp_path / "model"))


@pytest.fixture
def slow_folder(trained_folder: Path, tmp_path: Path) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json, as the tokenizers written in Python were saved."""
    target = tmp_path / "slow"
    target.mkdir()
    model = description(trained_folder)["model"]
    write(target / "vocab.json", model["vocab"])
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    shutil.copyfile(trained_folder / "tokenizer_config.json", target / "tokenizer_config.json")
    return target


def check(folder: Path, same_as: Path | None = None) -> Tokenizer:
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(same_as or folder)
    for text in texts():
        want = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allow_special=True) == want, text
        assert ours.decode(want) == theirs.decode(want)
    return ours


def test_vocabulary_and_merges(slow_folder: Path, trained_folder: Path) -> None:
    ours, whole = check(slow_folder), Tokenizer.from_folder(trained_folder)
    assert (ours.added_ids, ours.special_ids, ours.reserved_ids) == (
        whole.added_ids,
        whole.special_ids,
        whole.reserved_ids,
    )
    assert (ours.eos_ids, ours.pad_id, ours.token_table()) == (whole.eos_ids, whole.pad_id, whole.token_table())
    assert not set(ours.encode("<|im_end|><think>")) & set(ours.added_ids.values())


def test_added_tokens_from_the_older_files(slow_folder: Path, trained_folder: Path) -> None:
    whole = Tokenizer.from_folder(trained_folder)
    write(slow_folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    write(slow_folder / "added_tokens.json", {**whole.added_ids, "<unit_1>": whole.vocab_size})
    named = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "additional_special_tokens": []}
    write(slow_folder / "special_tokens_map.json", named)
    ours = Tokenizer.from_folder(slow_folder)
    assert ours.encode("<|im_end|>a<unit_1>")[-1] == whole.vocab_size
    assert (ours.eos_ids, ours.pad_id, ours.special_ids) == (whole.eos_ids, whole.pad_id, whole.special_ids)
    assert ours.reserved_ids == whole.reserved_ids


def test_a_folder_that_we_write_keeps_the_form(slow_folder: Path, tmp_path: Path) -> None:
    for name in ("additional_chat_templates", "../out"):
        (slow_folder / name).mkdir()
    (slow_folder / "additional_chat_templates/tool_use.jinja").write_text("x", encoding="utf-8")
    write_side_files(tmp_path / "out", next(iter(PRESETS.values()))(), slow_folder, None)
    assert Tokenizer.from_folder(tmp_path / "out").token_table() == Tokenizer.from_folder(slow_folder).token_table()
    assert (tmp_path / "out/additional_chat_templates/tool_use.jinja").read_text(encoding="utf-8") == "x"


MERGES: dict[str, Callable[[str], str]] = {
    "no version": lambda text: text.removeprefix("#version: 0.2\n"),
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "byte-order mark": lambda text: "\ufeff" + text,
    "no last newline": lambda text: text.rstrip("\n"),
    "empty lines": lambda text: text + "\n\n",
}


@pytest.mark.parametrize("name", MERGES)
def test_merges_as_editors_leave_them(slow_folder: Path, trained_folder: Path, name: str) -> None:
    path = slow_folder / "merges.txt"
    path.write_bytes(MERGES[name](path.read_text(encoding="utf-8")).encode())
    ours, whole = Tokenizer.from_folder(slow_folder), Tokenizer.from_folder(trained_folder)
    assert all(ours.encode(text) == whole.encode(text) for text in texts(50))


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "RobertaTokenizerFast", "CLIPTokenizer"])
def test_vocabularies_that_split_words_otherwise_are_not_supported(slow_folder: Path, kind: str) -> None:
    write(slow_folder / "tokenizer_config.json", {**configuration(slow_folder), "tokenizer_class": kind})
    with pytest.raises(NotSupported, match=kind) as caught:
        Tokenizer.from_folder(slow_folder)
    assert caught.value.exit_code == 6


DAMAGED: dict[str, tuple[str, str, str]] = {
    "a line of three": ("merges.txt", "a b c\n", r"merges\.txt: line 1"),
    "unknown parts": ("merges.txt", "zz qqq\n", r"merges\.txt"),
    "an id that is none": ("vocab.json", '{"a": "b"}', r"vocab\.json"),
    "added tokens without ids": ("added_tokens.json", '{"<x>": null}', r"added_tokens\.json"),
    "another id": ("added_tokens.json", '{"<new>": 5}', r"'<new>' has id 5"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_vocabularies_name_the_file(slow_folder: Path, name: str) -> None:
    file, content, message = DAMAGED[name]
    (slow_folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(CorruptCheckpoint, match=message):
        Tokenizer.from_folder(slow_folder)


@pytest.mark.parametrize("name", UNREAD_FORMS)
def test_other_forms_are_not_supported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(NotSupported, match=r"is not read; save it as tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    assert all(set(form.split(" + ")) <= set(TOKENIZER_FILES) for form in READ_FORMS)


@pytest.mark.parametrize(
    "backend",
    [
        Backend(backend_models.WordLevel({"a": 0}, "a")),
        Backend(backend_models.Unigram([("a", 0.0)], 0)),
        Backend(backend_models.BPE({"▁a": 0}, [])),
    ],
)
def test_other_kinds_are_not_supported(tmp_path: Path, backend: Backend) -> None:
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(NotSupported, match=r"is not read|byte-level"):
        Tokenizer.from_folder(tmp_path)


def test_nothing_at_all_is_model_not_found(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelNotFound, match=r"vocab\.json with merges\.txt"):
        Tokenizer.from_folder(tmp_path)


def _pairs(value: dict[str, Any]) -> None:
    value["model"]["merges"] = [p.split(" ") if isinstance(p, str) else p for p in value["model"]["merges"]]


def _strings(value: dict[str, Any]) -> None:
    value["model"]["merges"] = [p if isinstance(p, str) else " ".join(p) for p in value["model"]["merges"]]


def _cuts_and_pads(value: dict[str, Any]) -> None:
    value["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pairs": _pairs,
    "strings": _strings,
    "ignore_merges": lambda value: value["model"].update(ignore_merges=True),
    "no post-processor": lambda value: value.update(post_processor=None),
    "cuts and pads": _cuts_and_pads,
    "no normaliser": lambda value: value.update(normalizer=None),
    "two normalisers": lambda v: v.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 2}),
    "dropout": lambda value: value["model"].update(dropout=0.5),
    "no added tokens": lambda value: value.update(added_tokens=value["added_tokens"][:3]),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_text_in_other_forms_of_the_file(folder: Path, trained_folder: Path, name: str) -> None:
    value = description(folder)
    FORMS[name](value)
    write(folder / "tokenizer.json", value)
    (folder / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + (folder / "tokenizer.json").read_bytes())
    ours, reference = Tokenizer.from_folder(folder), Tokenizer.from_folder(trained_folder)
    if name in ("ignore_merges", "no normaliser"):
        value.update(truncation=None, padding=None)
        backend = Backend.from_str(json.dumps(value))
        reference = Tokenizer(backend)
        assert all(ours.encode(t, allow_special=True) == backend.encode(t).ids for t in texts(100))
    for text in [*texts(100), "quick " * 50]:
        assert ours.encode(text, allow_special=True) == reference.encode(text, allow_special=True)
        assert ours.encode(text) == ours.encode_batch([text])[0] == reference.encode(text)
        assert ours.backend.encode(text).ids == ours.encode(text, allow_special=True) or name == "dropout"


def test_tokens_that_only_the_configuration_adds(folder: Path) -> None:
    config, size = configuration(folder), Tokenizer.from_folder(folder).vocab_size
    config["added_tokens_decoder"] |= {
        str(size + 3): {"content": "<late>", "special": False, "lstrip": True},
        str(size + 1): {"content": "<|later|>", "special": True},
    }
    write(folder / "tokenizer_config.json", config)
    ours = Tokenizer.from_folder(folder)
    assert (ours.added_ids["<late>"], ours.added_ids["<|later|>"]) == (size + 3, size + 1)
    assert ours.encode("a  <late><|later|>")[1] == size + 3
    assert ours.encode("<|later|>", allow_special=True) == [size + 1] and size + 1 in ours.special_ids
    assert ours.vocab_size == size + 4


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "unknown class": {"tokenizer_class": "SomethingTokenizer"},
    "no class": {"tokenizer_class": None},
    "end token as an object": {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}},
    "list of special tokens": {"additional_special_tokens": ["<|im_start|>", {"content": "<|im_end|>"}]},
    "extra special tokens, list": {"extra_special_tokens": ["<|im_start|>"]},
    "extra special tokens, object": {"extra_special_tokens": {"image_token": "<|im_start|>"}},
    "unknown keys": {"is_local": True, "backend": "tokenizers", "processor_class": "X", "auto_map": {"a": ["b", None]}},
    "nothing added": {"added_tokens_decoder": None},
    "padding is the end": {"pad_token": "<|im_end|>"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_that_people_have(folder: Path, trained_folder: Path, name: str) -> None:
    write(folder / "tokenizer_config.json", {**configuration(folder), **CONFIGURATIONS[name]})
    path = folder / "tokenizer_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ours, reference = Tokenizer.from_folder(folder), Tokenizer.from_folder(trained_folder)
    assert all(
        ours.encode(text, allow_special=True) == reference.encode(text, allow_special=True) for text in texts(50)
    )
    assert ours.eos_ids == reference.eos_ids
    assert ours.pad_id == (ours.token_id("<|im_end|>") if name == "padding is the end" else reference.pad_id)


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None, list[str]]] = {
    "own, one id": ({"eos_token": "<|im_end|>"}, {"eos_token_id": 0}, {"eos_token_id": 9}, ["<|im_end|>", "0"]),
    "own, list": ({"eos_token": "<|im_end|>"}, {"eos_token_id": [0, 1]}, None, ["<|im_end|>", "0", "1"]),
    "config where generation_config says nothing": ({}, {"temperature": 1, "unknown": []}, {"eos_token_id": 7}, ["7"]),
    "config without generation_config": ({}, None, {"eos_token_id": [7, 8]}, ["7", "8"]),
    "nested config": ({}, None, {"text_config": {"eos_token_id": 7}}, ["7"]),
    "null everywhere but one": ({"eos_token": None}, {"eos_token_id": None}, {"eos_token_id": 7}, ["7"]),
    "nowhere": ({"eos_token": None}, None, None, ["<|im_end|>", "<|endoftext|>"]),
}


@pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")
@pytest.mark.parametrize("name", ENDS)
def test_what_ends_an_answer(folder: Path, name: str) -> None:
    own, generation, config, want = ENDS[name]
    write(folder / "tokenizer_config.json", own)
    for file, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            write(folder / file, value)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == {int(e) if e.isdigit() else tokenizer.token_id(e) for e in want}


def test_what_is_taken_without_a_word_of_the_files_is_told(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"pad_token": "<|PAD|>"})
    with pytest.warns(QnextWarning) as caught:
        assert Tokenizer.from_folder(folder).pad_id is None
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2 and "end token" in told[0] and "padding token" in told[1]
    write(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer.from_folder(folder)


def test_a_stripping_token_of_transformers(folder: Path, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": [AddedToken("<mask>", lstrip=True)]})
    theirs.add_tokens([AddedToken("<unit>", rstrip=True), "molecule"])
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer.from_folder(tmp_path / "saved")
    for text in ["a  <mask> b", "<mask><mask>", "x<unit>  y", "molecules  <unit> <mask>", " <mask>"]:
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False)["input_ids"]
