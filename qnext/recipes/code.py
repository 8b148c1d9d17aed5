"""Small models on the Python standard library, which every machine that runs qnext has."""

from __future__ import annotations

import platform
import sysconfig
from functools import partial
from pathlib import Path

from qnext.config import ModelConfig, preset
from qnext.recipes.recipe import Recipe
from qnext.training.config import TrainConfig
from qnext.training.sources import Corpus, collect, split_by_package

# Tests, what is not the library's own, and two packages that hold tables of characters and prose instead of code.
_SKIPPED = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
)

# Greedy, models of this size repeat themselves after a line or two.
SAMPLING = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
ABOUT = (
    "A code completion model: it goes on with the beginning of some Python. It has seen nothing but the Python "
    "standard library, knows no chat format, and answers no questions."
)


def standard_library(*, held_out_share: float) -> Corpus:
    """The code of this Python's standard library, without its tests, split by top-level package."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, num_left_out = collect(root, suffixes=(".py",), skip_folders=_SKIPPED)
    train, held_out = split_by_package(files, held_out_share=held_out_share)
    megabytes = [sum(len(file.text.encode()) for file in side) / 1e6 for side in (train, held_out)]
    return Corpus(
        train,
        held_out,
        f"standard library of Python {platform.python_version()}: {len(train)} files, {megabytes[0]:.1f} MB to train "
        f"on; {len(held_out)} files, {megabytes[1]:.1f} MB in {len({file.package for file in held_out})} packages "
        f"held out; {num_left_out} empty, repeated or unreadable files left out",
    )


def _of_code(name: str, model: ModelConfig, train: TrainConfig, *, eval_bytes: int) -> Recipe:
    corpus = partial(standard_library, held_out_share=0.05)
    return Recipe(name, model, train, corpus, eval_bytes, sampling=SAMPLING, about=ABOUT)


def small_code() -> Recipe:
    """nano-5m (4.3 M parameters, 0.8 M active) for ten minutes."""
    return _of_code(
        "small-code",
        preset("nano-5m"),
        TrainConfig(
            lr=5e-3,
            tokens_per_batch=8192,
            sequence_length=512,
            time_budget=600.0,
            optimizer="muon",
            warmup_fraction=0.02,
            decay_fraction=0.3,
            mtp_coefficient=0.1,
            eval_every=100,
            snapshot_every=100,
        ),
        eval_bytes=200_000,
    )


def micro_code() -> Recipe:
    """micro-20m (18 M parameters, 3.6 M active) for two thousand steps of 16,384 tokens."""
    return _of_code(
        "micro-code",
        preset("micro-20m"),
        TrainConfig(
            lr=4e-3,
            tokens_per_batch=8192,
            accumulation=2,
            sequence_length=1024,
            total_steps=2000,
            optimizer="muon",
            warmup_steps=100,
            eval_every=100,
            snapshot_every=100,
        ),
        eval_bytes=400_000,
    )


def demo(*, seconds: float, seed: int) -> Recipe:
    """nano-5m for a chosen time. It is tuned for two to five minutes on two cores.

    The small initial values leave the first steps to Muon, whose step does not depend on the size of a matrix. MTP
    starts late: it costs a layer and a second pass over the head, and it can draft only what the trunk has learnt.
    """
    return _of_code(
        "demo",
        preset("nano-5m").with_(initializer_range=0.007),
        TrainConfig(
            lr=2e-2,
            muon_lr=4e-3,
            tokens_per_batch=2048,
            accumulation=2,
            parallel_batches=2,
            sequence_length=512,
            time_budget=seconds,
            optimizer="muon",
            seed=seed,
            warmup_fraction=0.02,
            decay_fraction=0.5,
            mtp_coefficient=0.1,
            mtp_start=0.7,
            sample_every=50,
        ),
        eval_bytes=200_000,
    )
