"""A small model with an MTP layer that knows its text nearly by heart, and texts that it knows or has never seen."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from qnext.config import ModelConfig, hybrid_pattern
from qnext.recipes import demo
from qnext.recipes.code import standard_library
from qnext.recipes.recipe import Recipe, Run, prepare
from qnext.training.sources import Corpus, take_bytes

CONTEXT = 2048


def known_model() -> ModelConfig:
    """9.8 M parameters. Eight layers, so that drafting, one layer and the head, costs a small part of a step."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        layer_types=hybrid_pattern(8, interval=4),
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        partial_rotary_factor=0.25,
        rope_theta=10_000.0,
        max_position_embeddings=CONTEXT,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_nextn_predict_layers=1,
        initializer_range=0.007,
    )


def _little_text(num_bytes: int) -> Corpus:
    """So little of the standard library that a small model can learn all of it."""
    corpus = standard_library(held_out_share=0.05)
    files = take_bytes(corpus.train, limit=num_bytes)
    size = sum(len(file.text.encode()) for file in files)
    description = f"{len(files)} files of the standard library, {size / 1e3:.0f} kB"
    return Corpus(files, corpus.held_out, description)


def known_recipe(*, steps: int, num_bytes: int) -> Recipe:
    """The demo's training, but of text that is seen again and again, and with MTP from early on."""
    recipe = demo(seconds=1.0, seed=0)
    train = recipe.train.with_(
        total_steps=steps,
        time_budget=None,
        tokens_per_batch=1024,
        sample_every=0,
        snapshot_every=100,
        weight_decay=0.0,
        mtp_start=0.2,
        mtp_coefficient=0.3,
        mtp_steps=3,
    )
    return replace(
        recipe, name="known", model=known_model(), train=train, corpus=partial(_little_text, num_bytes), eval_bytes=1
    )


def train_known(folder: Path, *, steps: int, num_bytes: int) -> Run:
    """Train in `folder`, or go on there, or take what is finished; the model folder is `<folder>/model`."""
    is_begun = (folder / "tokenizer" / "tokenizer.json").exists()
    run = prepare(known_recipe(steps=steps, num_bytes=num_bytes), folder, resume=is_begun)
    print(f"{run.corpus.description}, {run.trainer.config.total_steps} steps from step {run.trainer.step}", flush=True)
    if not run.trainer.is_done:
        run.trainer.run()
        run.trainer.save()
    if not (folder / "model").is_dir():
        run.save()
    return run
