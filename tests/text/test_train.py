"""Training, the folder's files, and what other programs make of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.errors import UsageError
from qnext.text.templates import INSTRUCT_TEMPLATE
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import (
    DEFAULT_SPECIAL_TOKENS,
    QWEN2_PATTERN,
    byte_level_tokenizer,
    save_tokenizer,
    train_bpe,
)

from .conftest import CORPUS
from .test_tokenizer import SAMPLES

TEXTS = [
    *SAMPLES,
    *CORPUS,
    "<|im_start|>user\nx<|im_end|>\n<think>\n</think><|fim_prefix|>",
    "I'LL'd x'S ２३ \r\n\r\n a\t\tb",
]


def test_vocabulary_size_counts_everything() -> None:
    for size in (271, 300, 480):
        backend = train_bpe(CORPUS, vocab_size=size)
        tokenizer = Tokenizer(backend)
        assert tokenizer.vocab_size == backend.get_vocab_size() == size
        assert [tokenizer.token_id(t.content) for t in DEFAULT_SPECIAL_TOKENS] == [*range(size - 15, size)]


def test_a_small_corpus_gives_fewer_tokens_and_no_gap() -> None:
    tokenizer = Tokenizer(train_bpe(["aaaa bbbb " * 3], vocab_size=5000))
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size() < 300
    assert tokenizer.token_id("</think>") == tokenizer.vocab_size - 1


def test_training_is_deterministic_and_compresses() -> None:
    first, second = (train_bpe(iter(CORPUS), vocab_size=600) for _ in range(2))
    assert first.to_str() == second.to_str()
    text = "".join(CORPUS)
    assert len(first.encode(text).ids) < len(byte_level_tokenizer().encode(text).ids) / 2


def test_no_merge_crosses_the_family_s_word_borders() -> None:
    tokenizer = Tokenizer(train_bpe(["12 34 ab cd ab cd\n\nab 12"] * 50, vocab_size=400))
    assert len(tokenizer.encode("1234")) == 4, "digits stand alone"
    assert tokenizer.encode(" ab cd") == tokenizer.encode(" ab") + tokenizer.encode(" cd")


@pytest.mark.parametrize("size", [0, 256, 270])
def test_too_small_a_vocabulary(size: int) -> None:
    with pytest.raises(UsageError, match=rf"vocab_size {size} is below 256 bytes \+ 15 special tokens = 271"):
        train_bpe(CORPUS, vocab_size=size)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="no text"):
        train_bpe(texts, vocab_size=300)


def test_token_that_the_config_would_name_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'<eos>' is not in the vocabulary"):
        save_tokenizer(byte_level_tokenizer(), tmp_path / "m", model_max_length=9, eos_token="<eos>")
    assert not (tmp_path / "m").exists()


def test_files_of_a_folder(tmp_path: Path) -> None:
    paths = save_tokenizer(byte_level_tokenizer(), tmp_path / "a", model_max_length=4096)
    assert sorted(path.name for path in paths) == ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    save_tokenizer(byte_level_tokenizer(), tmp_path / "a", model_max_length=4096, chat_template="{{ x }}")
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == "{{ x }}"
    description = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    assert description["normalizer"] == {"type": "NFC"}
    assert description["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN2_PATTERN}
    assert description["decoder"]["type"] == "ByteLevel"


@pytest.mark.parametrize("kind", ["trained", "bytes"])
def test_transformers_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    backend = train_bpe(CORPUS, vocab_size=700) if kind == "trained" else byte_level_tokenizer()
    save_tokenizer(backend, tmp_path, model_max_length=4096, chat_template=INSTRUCT_TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ids == ours.encode(text, allow_special=True)
        for skip in (False, True):
            assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special=skip)
    assert len(theirs) == ours.vocab_size
    assert {theirs.eos_token_id} == ours.eos_ids
    assert theirs.pad_token_id == ours.pad_id
    assert theirs.model_max_length == 4096
    assert set(theirs.all_special_ids) == ours.special_ids
    messages = [{"role": "user", "content": "x"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def test_transformers_loads_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_tokenizer(byte_level_tokenizer(), tmp_path, model_max_length=4096, chat_template=INSTRUCT_TEMPLATE)
    code = f"import transformers; print(len(transformers.AutoTokenizer.from_pretrained({str(tmp_path)!r})))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("271", "")


def test_gguf_reads_merges_and_special_tokens(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    backend = train_bpe(CORPUS, vocab_size=700)
    save_tokenizer(backend, tmp_path, model_max_length=4096, chat_template=INSTRUCT_TEMPLATE)
    special = gguf.SpecialVocab(tmp_path, load_merges=True)
    assert len(special.merges) == backend.get_vocab_size() - 256 - 15 > 100
    assert special.special_token_ids == {
        "eos": backend.token_to_id("<|im_end|>"),
        "pad": backend.token_to_id("<|endoftext|>"),
    }
    assert special.chat_template == INSTRUCT_TEMPLATE


def test_text_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, qnext.text.chat, qnext.text.train, qnext.text.tokenizer, qnext.text.templates;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
