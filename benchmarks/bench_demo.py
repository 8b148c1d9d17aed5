"""How well does the demo's model do, against a plain AdamW run on transformers' implementation in the same time?

Both train a nano-5m on the same files with the same tokenizer for the same number of seconds, one after the other,
and are measured by the same code on the same held-out files. The plain run has transformers' own initial values,
documents joined end to end in rows of 512 tokens, AdamW for every parameter, warm-up and linear decay.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _pair import machine, print_json

import numpy as np
import torch

from qnext.config import to_hf
from qnext.eval import EvalDocument, Perplexity, evaluate_perplexity
from qnext.model import CausalLM
from qnext.ops import keep_freed_memory
from qnext.recipes import demo
from qnext.recipes.recipe import Run, prepare
from qnext.training.sources import take_bytes, tokenize

ROWS, LENGTH = 8, 512


def _plain_run(run: Run, *, seconds: float, lr: float) -> tuple[CausalLM, int]:
    """Train transformers' model; returns its weights in ours, for measuring, and the tokens seen."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    config = run.trainer.model.config.with_(num_nextn_predict_layers=0, initializer_range=0.02)
    values: dict[str, Any] = to_hf(config, dtype="float32")
    for key in ("architectures", "model_type"):
        values.pop(key)
    torch.manual_seed(0)
    model = hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**values)).float().train()
    (end_id,) = run.tokenizer.eos_ids
    documents = tokenize([file.text for file in run.corpus.train], run.tokenizer, end_id=end_id)
    order = np.random.default_rng(0).permutation(len(documents))
    tokens = torch.from_numpy(np.concatenate([documents[i] for i in order]).astype(np.int64))
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start, step = time.perf_counter(), 0
    while (progress := (time.perf_counter() - start) / seconds) < 1.0:
        warm = min(1.0, progress / 0.02)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * min(1.0, (1.0 - progress) / 0.5)
        batch = rows[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    ours = CausalLM(config)
    ours.load_state_dict(model.state_dict())
    return ours, step * ROWS * LENGTH


def _measure(model: CausalLM, run: Run) -> Perplexity:
    (end_id,) = run.tokenizer.eos_ids
    texts = [file.text for file in take_bytes(run.corpus.held_out, limit=run.recipe.eval_bytes)]
    encoded = tokenize(texts, run.tokenizer, end_id=end_id)
    documents = [EvalDocument(ids.tolist(), len(text.encode())) for ids, text in zip(encoded, texts, strict=True)]
    return evaluate_perplexity(model, documents, sequence_length=LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3], help="learning rates of the plain run")
    parser.add_argument("--skip-ours", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    recipe = demo(seconds=options.seconds, seed=0)
    recipe = replace(recipe, train=recipe.train.with_(sample_every=0))
    print(f"{machine()['cpu']}, {options.seconds:.0f} s each")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(recipe, Path(folder) / "run")
        print(run.corpus.description)
        if not options.skip_ours:
            run.trainer.run()
            results.append(
                {"run": "qnext demo", "tokens": run.trainer.tokens, **asdict(_measure(run.trainer.model, run))}
            )
            print(results[-1])
        for lr in options.lr:
            model, tokens = _plain_run(run, seconds=options.seconds, lr=lr)
            results.append({"run": f"transformers AdamW {lr:g}", "tokens": tokens, **asdict(_measure(model, run))})
            print(results[-1])
    print_json({"benchmark": "demo", "seconds": options.seconds, "results": results})


if __name__ == "__main__":
    main()
