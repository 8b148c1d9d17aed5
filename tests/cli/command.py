"""Verbs run in this process, and a small model folder of several shards that a test may damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qnext.checkpoint import create_folder
from qnext.checkpoint.provenance import PROVENANCE_FILE
from qnext.cli import main
from qnext.config import ModelConfig, preset
from qnext.text.templates import INSTRUCT_TEMPLATE
from qnext.text.train import byte_level_tokenizer, save_tokenizer

CONFIG: ModelConfig = replace(
    preset("nano-5m"),
    vocab_size=300,
    hidden_size=48,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    max_position_embeddings=128,
    bos_token_id=256,
    eos_token_id=(258, 256),
    pad_token_id=256,
)

# Every row is whole groups of the integer schemes.
QUANTIZABLE: ModelConfig = replace(
    preset("nano-5m").with_layers(2),
    vocab_size=300,
    hidden_size=64,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    max_position_embeddings=128,
    bos_token_id=256,
    eos_token_id=(258, 256),
    pad_token_id=256,
)

Capture = pytest.CaptureFixture[str]


class Result(NamedTuple):
    """What a user sees of one command."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The only line on stderr; an error leaves stdout empty."""
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def run(capsys: Capture, *arguments: object) -> Result:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return Result(code, captured.out, captured.err)


def make_model(parent: Path) -> Path:
    tokenizer = parent / "made-tokenizer"
    save_tokenizer(byte_level_tokenizer(), tokenizer, model_max_length=128, chat_template=INSTRUCT_TEMPLATE)
    create_folder(CONFIG, parent / "model", seed=1, tokenizer_folder=tokenizer, max_shard_bytes=100_000)
    (parent / "model" / PROVENANCE_FILE).unlink()  # as most folders come, so that a test may change it
    return parent / "model"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def poke(folder: Path, name: str, raw: bytes) -> Path:
    """Overwrite the first bytes of a tensor; returns its file."""
    from qnext.checkpoint.header import read_index

    info = read_index(folder).tensors[name]
    with info.file.open("r+b") as file:
        file.seek(info.start)
        file.write(raw)
    return info.file
