"""Tokenizers and the optional llama.cpp sources that the text tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.text.tokenizer import Tokenizer
from qnext.text.train import byte_level_tokenizer, save_tokenizer, train_bpe

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog didn't mind; it's a lazy dog.\n" * 8,
    "def add(left, right):\n    return left + right\n\n\nfor index in range(100):\n    print(index, add(index, 1))\n"
    * 8,
    "你好，世界。世界很大，你好！こんにちは世界。 안녕하세요 세계\n" * 8,
    "Ünïcödé naïve café — “quotes” … 3.14159 🙂🙂🚀👩‍👩‍👧 \t\t x² ≠ y³\n" * 8,
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}\n' * 8,
]


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_tokenizer(train_bpe(CORPUS, vocab_size=700), folder, model_max_length=4096)
    return folder


@pytest.fixture(scope="session")
def tokenizer(trained_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(trained_folder)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(), eos_tokens=["<|im_end|>"])


@pytest.fixture(scope="session")
def llama_cpp_source(request: pytest.FixtureRequest) -> Path | None:
    value = request.config.getoption("--llama-cpp-source")
    return None if value is None else Path(value)
