"""Do the generated problems of token ids measure what a model has learnt? A small hybrid model, trained for minutes.

Trains on fresh problems of some kinds at one length, leaves a folder for `qnext eval tasks --ids`, and scores it with
problems of a seed that training never used: at the length of training, at twice and four times it, and on a kind that
was not taught. A line for every length and kind as it comes; JSON at the end. Minutes are those of the processor.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from _pair import machine, print_json

import torch

from qnext.checkpoint import save_model
from qnext.config import ModelConfig, preset
from qnext.eval.ids import IdShape, id_batch, id_problems
from qnext.eval.ids.scores import evaluate_ids
from qnext.model import Batch, CausalLM, initialize
from qnext.training.losses import head_loss_sum

TAUGHT = ("mqar", "needle", "copy")
UNTAUGHT = ("addition",)
VOCAB = 128
LENGTH = 64
FACTS, QUERIES = 8, 4


def small_model() -> ModelConfig:
    """Three layers of Gated DeltaNet and one of attention, eight experts of which two are active."""
    return (
        preset("nano-5m")
        .with_layers(4)
        .with_(vocab_size=VOCAB, hidden_size=128, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    )


def shape_of(kind: str, length: int) -> IdShape:
    return IdShape(VOCAB, length, FACTS, QUERIES)


def train(model: CausalLM, *, seconds: float, seed: int, batch: int, lr: float) -> int:
    """Kinds in turn; AdamW, warmed up and then decayed to zero with the time. Returns the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    begun, step = time.process_time(), 0
    while (progress := (time.process_time() - begun) / seconds) < 1:
        kind = TAUGHT[step % len(TAUGHT)]
        problems = id_batch(kind, shape_of(kind, LENGTH), batch, seed=f"train/{seed}/{step}")
        ids_T, labels_T = (torch.from_numpy(each).flatten() for each in problems)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - progress)
        hidden_TD = model(Batch.from_lengths(ids_T, [LENGTH] * batch)).hidden_TD
        loss = head_loss_sum(model, hidden_TD, labels_T) / (labels_T >= 0).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}, {kind}: {loss.item():.3f} nats an answer", flush=True)
        step += 1
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    model = CausalLM(small_model())
    initialize(model, seed=asked.seed)
    steps = train(model, seconds=60 * asked.minutes, seed=asked.seed, batch=asked.batch, lr=asked.lr)
    if asked.out is not None:
        save_model(model, asked.out)
    scores = []
    for kind in (*TAUGHT, *UNTAUGHT):
        for length in (LENGTH, 2 * LENGTH, 4 * LENGTH):
            problems = list(islice(id_problems(kind, shape_of(kind, length), seed="test"), asked.problems))
            score = evaluate_ids(model, problems)
            scores.append(asdict(score))
            print(
                f"{kind:<10} {length:>5}  all {score.exact.percent():>22}  each {score.answers.percent():>22}",
                flush=True,
            )
    print_json({"machine": machine(), "steps": steps, "minutes": asked.minutes, "seed": asked.seed, "scores": scores})


if __name__ == "__main__":
    main()
