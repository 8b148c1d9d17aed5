"""Model folders as a user has them: tiny, random, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.checkpoint import save_model
from qnext.config import ModelConfig, hybrid_pattern
from qnext.model import CausalLM, initialize
from qnext.text.templates import INSTRUCT_TEMPLATE
from qnext.text.train import byte_level_tokenizer, save_tokenizer


def tiny_config(vocab_size: int, *, eos_token_id: int | None = None) -> ModelConfig:
    """Of a hybrid with experts and a context of 256, whose sizes suit no native kernel."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=24,
        layer_types=hybrid_pattern(2, interval=2),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        partial_rotary_factor=0.4,
        rope_theta=10_000.0,
        max_position_embeddings=256,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=5,
        linear_conv_kernel_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        initializer_range=0.25,
        eos_token_id=eos_token_id,
    )


def save_tiny(folder: Path, *, chat_template: str | None = None, drafts: bool = False, **generation: object) -> Path:
    """A hybrid model with a context of 256 and one token per byte."""
    tokenizer = byte_level_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size() + 5, eos_token_id=258).with_(num_nextn_predict_layers=int(drafts))
    model = CausalLM(config)
    initialize(model, seed=3)
    side = folder.with_name(folder.name + "-tokenizer")
    save_tokenizer(tokenizer, side, model_max_length=256, chat_template=chat_template)
    save_model(model, folder, tokenizer_folder=side, generation_config=generation or None)
    return folder


def save_plain(folder: Path) -> Path:
    """No chat template, greedy by default."""
    return save_tiny(folder)


def save_chat(folder: Path) -> Path:
    """With a chat template and sampling defaults."""
    return save_tiny(folder, chat_template=INSTRUCT_TEMPLATE, temperature=1.4, top_k=50, do_sample=True)


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No chat template, greedy by default."""
    return save_plain(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template and sampling defaults."""
    return save_chat(tmp_path_factory.mktemp("models") / "chat")
