"""The released Qwen2 vocabulary, built by our builder, against the ids that llama.cpp expects of it.

Needs a llama.cpp source tree: pytest --llama-cpp-source FOLDER. Its vocabulary files are too large to be kept here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.text.tokenizer import Tokenizer
from qnext.text.train import SpecialToken, build_tokenizer

NORMAL, CONTROL = 1, 3


@pytest.fixture(scope="module")
def vocabulary_file(llama_cpp_source: Path | None) -> Path:
    if llama_cpp_source is None:
        pytest.skip("no llama.cpp source tree: pass --llama-cpp-source FOLDER")
    path = llama_cpp_source / "models" / "ggml-vocab-qwen2.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module")
def released(vocabulary_file: Path) -> Tokenizer:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(vocabulary_file).fields
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    vocab = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"].contents()]
    special = [SpecialToken(token, True) for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    return Tokenizer(build_tokenizer(vocab, merges, special_tokens=special), eos_tokens=["<|im_end|>"])


def test_special_ids_are_the_released_ones(released: Tokenizer) -> None:
    assert released.added_ids == {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


def test_expected_ids(released: Tokenizer, vocabulary_file: Path) -> None:
    inputs = Path(f"{vocabulary_file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = Path(f"{vocabulary_file}.out").read_text(encoding="utf-8").splitlines()
    assert len(inputs) >= len(outputs) > 40
    for text, line in zip(inputs, outputs, strict=False):
        ids = [int(index) for index in line.split()]
        assert released.encode(text) == ids, text
        assert released.decode(ids) == text
