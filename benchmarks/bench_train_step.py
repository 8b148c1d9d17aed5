"""How fast is a training step, against transformers on the same weights and tokens?

One step is forward, cross entropy, backward and AdamW in fp32 on a batch of 8 sequences of 512 tokens, without the
MTP module, which transformers does not have. Our side runs the batch as the training loop does: cut in two halves
that run side by side. Losses of the first steps must agree, the first one to rounding.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from _pair import Contestants, Step, machine, print_json, ratios

import torch
from _steps import step_options

from qnext.config import preset, to_hf
from qnext.model import Batch, CausalLM, initialize

LEARNING_RATE = 1e-3


def _model(name: str) -> CausalLM:
    model = CausalLM(preset(name).with_(num_nextn_predict_layers=0))
    initialize(model, seed=0)
    return model


def _tokens(name: str, sequences: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, preset(name).vocab_size, (sequences, length + 1), generator=generator)


def ours(*, name: str, sequences: int, length: int, threads: int) -> Step:
    from qnext.ops import cross_entropy_sum, keep_freed_memory
    from qnext.training import Losses, LossPart
    from qnext.training.threads import BackwardThreads

    torch.set_num_threads(threads)
    keep_freed_memory()
    model, tokens = _model(name), _tokens(name, sequences, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    workers, parameters = BackwardThreads(threads), list(model.parameters())

    def part(rows: torch.Tensor) -> Losses:
        batch = Batch.from_lengths(rows[:, :-1].flatten(), [length] * len(rows))
        labels = rows[:, 1:].flatten()
        loss = cross_entropy_sum(model(batch).hidden_TD, model.lm_head.weight, labels) / (sequences * length)
        return Losses({"main": LossPart(loss)})

    def step() -> float:
        losses = workers.backward([partial(part, rows) for rows in tokens.chunk(threads)], parameters)
        optimizer.step()
        optimizer.zero_grad()
        return sum(part.total.item() for part in losses)

    return step


def transformers(*, name: str, sequences: int, length: int, threads: int) -> Step:
    import transformers as hf

    torch.set_num_threads(threads)
    hf.logging.set_verbosity_error()
    source, tokens = _model(name), _tokens(name, sequences, length)
    values: dict[str, Any] = to_hf(source.config, dtype="float32")
    for key in ("architectures", "model_type"):
        values.pop(key)
    model = hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**values)).float().train()
    model.load_state_dict(source.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()

    def step() -> float:
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(name: str, *, sequences: int, length: int, threads: int, rounds: int) -> dict[str, Any]:
    arguments = {"name": name, "sequences": sequences, "length": length, "threads": threads}
    contestants = Contestants({"qnext": (ours, arguments), "transformers": (transformers, arguments)})
    seconds, losses = contestants.run(warmup=2, rounds=rounds)
    contestants.close()
    gaps = [abs(a - b) for a, b in zip(losses["qnext"][:3], losses["transformers"][:3], strict=True)]
    assert gaps[0] < 1e-5 and max(gaps) < 1e-2, f"losses of the first steps differ by {gaps}"
    tokens = sequences * length
    return {
        "model": name,
        "tokens_per_second": {key: tokens / statistics.median(value) for key, value in seconds.items()},
        "speedup": ratios(seconds["transformers"], seconds["qnext"]),
        "loss_gaps": gaps,
    }


def main() -> None:
    options = step_options(__doc__)
    results = []
    print(f"{machine()['cpu']}, {options.threads} threads, {options.sequences} x {options.length} tokens, fp32")
    for name in options.models:
        result = measure(
            name, sequences=options.sequences, length=options.length, threads=options.threads, rounds=options.rounds
        )
        speed, speedup = result["tokens_per_second"], result["speedup"]
        print(
            f"{name:<12} qnext {speed['qnext']:7.0f} tok/s   transformers {speed['transformers']:7.0f} tok/s   "
            f"speed-up {speedup['median']:.2f} ({speedup['min']:.2f}-{speedup['max']:.2f})   "
            f"first losses differ by {result['loss_gaps'][0]:.1e}"
        )
        results.append(result)
    print_json({"benchmark": "train_step", "threads": options.threads, "results": results})


if __name__ == "__main__":
    main()
