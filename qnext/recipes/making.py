"""What a training run says in the provenance of the folder that it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qnext.checkpoint.provenance import Making
from qnext.training import Trainer
from qnext.training.sources import Corpus


def making_of(verb: str, trainer: Trainer, settings: Mapping[str, Any], *, data: list[dict[str, Any]]) -> Making:
    """Settings of the task and of the training, hashes of its data, its last evaluation, and what it cost.

    Seconds are those of training, a run that was interrupted included, without the time between.
    """
    evaluated = trainer.last_evaluation
    return Making(
        verb,
        {**settings, "training": asdict(trainer.config)},
        data=data,
        quality=None if evaluated is None else {"step": evaluated[0], "evaluation": asdict(evaluated[1])},
        watts=trainer.config.watts,
        cost={"seconds": trainer.elapsed, "steps": trainer.step, "tokens": trainer.tokens},
    )


def data_of_corpus(corpus: Corpus) -> list[dict[str, Any]]:
    """One hash of all texts that are trained on, in their order, and the line for people on their origin."""
    digest, num_bytes = hashlib.sha256(), 0
    for file in corpus.train:
        raw = file.text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
        num_bytes += len(raw)
    about = {"name": corpus.description, "files": len(corpus.train)}
    return [{**about, "bytes": num_bytes, "sha256": digest.hexdigest()}]
