"""Does a student learn more from a teacher than from the same tokens alone?

The teacher is the model of `qnext demo`, the student a smaller one. For each seed it is trained twice, from the same
weights, on the same tokens in the same order, at the same rates: by their cross entropy, and by the teacher's answers,
which all seeds share. Both are measured on files of packages that neither teacher nor student has seen. What counts is
the difference in bits per byte, seed by seed, and its interval of 95 % (Student's t). Results are written to
OUT/results.jsonl as they come, and a second start goes on behind them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _pair import machine, print_json

import numpy as np
import torch

from qnext.config import ModelConfig
from qnext.engine.storage.fingerprint import weights_digest
from qnext.eval import EvalDocument, Perplexity, evaluate_perplexity
from qnext.model import CausalLM, initialize
from qnext.ops import keep_freed_memory
from qnext.planning import count_active, count_parameters
from qnext.recipes import demo
from qnext.recipes.recipe import Run, is_run, override, prepare
from qnext.training import TrainConfig, Trainer
from qnext.training.distill import TAUGHT, Distillation
from qnext.training.samples import SampleSet, SampleStream, pieces
from qnext.training.shards import DataShard, write_shard
from qnext.training.sources import TextFile, take_bytes, tokenize
from qnext.training.teacher import Asking, TaughtShard, ask

LENGTH = 512
ARMS = {"scratch": 0.0, "distilled": 1.0}  # the teacher's share of the loss
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def _teacher(out: Path, *, steps: int) -> Run:
    settings = [f"total_steps={steps}", "sample_every=0", "snapshot_every=50"]
    run = prepare(override(demo(seconds=1.0, seed=0), settings), out / "teacher", resume=is_run(out / "teacher"))
    run.trainer.run()
    run.trainer.save()
    return run


def _student(teacher: ModelConfig) -> ModelConfig:
    return teacher.with_(
        hidden_size=64,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_attention_heads=2,
        num_nextn_predict_layers=0,
    )


def _answers(run: Run, out: Path, *, text_bytes: int, budget: int) -> tuple[DataShard, list[TaughtShard], Asking]:
    texts = [file.text for file in take_bytes(run.corpus.train, limit=text_bytes)]
    (end_id,) = run.tokenizer.eos_ids
    documents = [
        piece
        for ids in tokenize(texts, run.tokenizer, end_id=end_id)
        for piece in pieces(ids.tolist(), num_rows=LENGTH)
        if len(piece) > 1
    ]
    (out / "data").mkdir(parents=True, exist_ok=True)
    write_shard(out / "data" / "texts.shard", documents, {})
    shard = DataShard(out / "data" / "texts.shard")
    asking = Asking.within(budget, "sampled", run.tokenizer.vocab_size)
    model = run.trainer.model
    digest = weights_digest(model).hex()
    return shard, ask(lambda: model, shard, out / "data", asking, of=digest, tokens_per_batch=2048), asking


def _train(
    parts: Sequence[TaughtShard], config: ModelConfig, *, share: float, steps: int, seed: int, rate: float
) -> CausalLM:
    """With the demo's rates times `rate`."""
    train = TrainConfig(
        lr=2e-2 * rate,
        muon_lr=4e-3 * rate,
        tokens_per_batch=1024,
        accumulation=2,
        parallel_batches=2,
        sequence_length=LENGTH,
        total_steps=steps,
        optimizer="muon",
        seed=seed,
        decay_fraction=0.5,
        mtp_coefficient=0.0,
    )
    model = CausalLM(config)
    initialize(model, seed=seed)
    stream = SampleStream(
        [SampleSet(parts, kind=TAUGHT)], tokens_per_batch=train.tokens_per_batch, seed=seed, fingerprint=""
    )
    Trainer(model, stream, train, objective=Distillation(share).with_coefficients(train)).run()
    return model


def _documents(files: Sequence[TextFile], run: Run, *, limit: int) -> list[EvalDocument]:
    texts = [file.text for file in take_bytes(files, limit=limit)]
    (end_id,) = run.tokenizer.eos_ids
    encoded = tokenize(texts, run.tokenizer, end_id=end_id)
    return [EvalDocument(ids.tolist(), len(text.encode())) for ids, text in zip(encoded, texts, strict=True)]


def _measure(model: CausalLM, documents: Sequence[EvalDocument]) -> Perplexity:
    return evaluate_perplexity(model.eval(), documents, sequence_length=LENGTH)


def _interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the interval of 95 %."""
    half = T_95[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), half


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-distill"))
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150, help="of a student, 2048 tokens each")
    parser.add_argument("--rate", type=float, default=1.0, help="times the demo's learning rates")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--text-bytes", type=int, default=1_200_000)
    parser.add_argument("--held-out-bytes", type=int, default=200_000)
    parser.add_argument("--budget", type=int, default=128, help="bytes of answers for each token")
    return parser.parse_args()


def main() -> None:
    options = _options()
    keep_freed_memory()
    print(f"{machine()['cpu']}, {torch.get_num_threads()} threads", flush=True)
    run = _teacher(options.out, steps=options.teacher_steps)
    teacher, config = run.trainer.model, _student(run.trainer.model.config)
    held_out = _documents(run.corpus.held_out, run, limit=options.held_out_bytes)
    own = _measure(teacher, held_out).bits_per_byte
    for name, each in (("teacher", teacher.config), ("student", config)):
        active = count_active(each).with_head
        print(f"{name}: {count_parameters(each).total:,} parameters, {active:,} active", flush=True)
    print(f"teacher: {run.trainer.tokens:,} tokens, {own:.4f} bits per byte; {run.corpus.description}", flush=True)
    shard, parts, asking = _answers(run, options.out, text_bytes=options.text_bytes, budget=options.budget)
    print(f"texts: {shard.facts.num_learned:,} tokens, {asking.count} draws for each", flush=True)
    results = _results(options, parts, config, held_out, of=f"{weights_digest(teacher).hex()}/{shard.checksum}")
    if len(options.arms) < len(ARMS) or options.seeds < 2:
        print_json({"benchmark": "distill", "teacher": own, "rate": options.rate, "results": results})
        return
    print("| seed | scratch | distilled | difference |\n|---|---|---|---|")
    for seed in range(options.seeds):
        one, other = (results[f"{arm} {seed}"] for arm in ARMS)
        print(f"| {seed} | {one:.4f} | {other:.4f} | {other - one:+.4f} |")
    differences = [results[f"distilled {seed}"] - results[f"scratch {seed}"] for seed in range(options.seeds)]
    mean, half = _interval(differences)
    print(f"distilled less scratch: {mean:+.4f} bits per byte, 95 % from {mean - half:+.4f} to {mean + half:+.4f}")
    facts = {"teacher": own, "teacher_steps": options.teacher_steps, "steps": options.steps, "draws": asking.count}
    interval = [mean - half, mean + half]
    print_json({"benchmark": "distill", **facts, "results": results, "difference": mean, "interval_95": interval})


def _results(
    options: argparse.Namespace,
    parts: Sequence[TaughtShard],
    config: ModelConfig,
    held_out: Sequence[EvalDocument],
    *,
    of: str,
) -> dict[str, float]:
    """Bits per byte by arm and seed. Those of an earlier start with the same choices are read."""
    path = options.out / "results.jsonl"
    choices = {key: value for key, value in vars(options).items() if key not in ("out", "seeds", "arms")}
    facts: dict[str, Any] = {"of": of, **choices}
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {line["run"]: line["bits_per_byte"] for line in lines if line["facts"] == facts}
    for seed in range(options.seeds):
        for arm in options.arms:
            name = f"{arm} {seed}"
            if name not in known:
                own = {"share": ARMS[arm], "rate": options.rate, "steps": options.steps, "seed": seed}
                model = _train(parts, config, **own)
                known[name] = _measure(model, held_out).bits_per_byte
                with path.open("a") as file:
                    file.write(json.dumps({"run": name, "bits_per_byte": known[name], "facts": facts}) + "\n")
            print(f"{name}: {known[name]:.4f} bits per byte", flush=True)
    assert np.isfinite(list(known.values())).all()
    return known


if __name__ == "__main__":
    main()
