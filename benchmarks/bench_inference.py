"""How fast are prefill and decode, against transformers on the same folder, dtype and threads?

Prefill reads a prompt of random tokens; decode continues a prompt of 32 tokens greedily. Both sides keep their caches
and compute the logits of the last position only. The models run in turn, each in its own process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _pair import Contestants, Step, machine, print_json, ratios

from qnext.checkpoint import create_folder
from qnext.config import preset

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_WARM_PROMPT = 32


def _standard_model() -> str:
    """Released layer shapes, 3.9 B parameters, random weights: 8 GB in runs/standard."""
    folder = Path("runs/standard")
    if not (folder / "config.json").exists():
        config = preset("80b-a3b").with_layers(16).with_(num_experts=64, vocab_size=32768)
        print(f"making {folder}")
        create_folder(config.with_(bos_token_id=None, eos_token_id=None), folder, seed=0)
    return str(folder)


def _prompt(vocab_size: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ours(*, folder: str, dtype: str, threads: int, kind: str, length: int) -> Step:
    from qnext.checkpoint import load_model
    from qnext.engine import Engine, SamplingParams

    torch.set_num_threads(threads)
    model = load_model(folder, dtype=_DTYPES[dtype], check_finite=False)
    engine = Engine(model, max_num_seqs=1, max_model_len=length + 2 * _WARM_PROMPT)
    prompt = _prompt(model.config.vocab_size, length if kind == "prefill" else _WARM_PROMPT)

    def prefill() -> float:
        return _timed(lambda: engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True)) and None)

    def decode() -> float:
        events = engine.stream(prompt, SamplingParams(max_tokens=length + 1, ignore_eos=True))
        next(events)
        return _timed(lambda: [None for _ in events] and None)

    return prefill if kind == "prefill" else decode


def transformers(*, folder: str, dtype: str, threads: int, kind: str, length: int) -> Step:
    import transformers as hf

    torch.set_num_threads(threads)
    hf.logging.set_verbosity_error()
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=_DTYPES[dtype]).eval()
    prompt = torch.tensor([_prompt(model.config.vocab_size, length if kind == "prefill" else _WARM_PROMPT)])

    def read(tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    @torch.inference_mode()
    def prefill() -> float:
        return _timed(lambda: read(prompt, None) and None)

    @torch.inference_mode()
    def decode() -> float:
        token, cache = read(prompt, None)

        def run() -> None:
            nonlocal token, cache
            for _ in range(length):
                token, cache = read(token, cache)

        return _timed(run)

    return prefill if kind == "prefill" else decode


def measure(folder: str, *, dtype: str, threads: int, kind: str, length: int, rounds: int) -> dict[str, Any]:
    arguments = {"folder": folder, "dtype": dtype, "threads": threads, "kind": kind, "length": length}
    contestants = Contestants({"qnext": (ours, arguments), "transformers": (transformers, arguments)})
    _, seconds = contestants.run(warmup=1, rounds=rounds)  # a step returns the part that counts
    contestants.close()
    ours_s, theirs_s = seconds["qnext"][1:], seconds["transformers"][1:]
    return {
        "kind": kind,
        "tokens": length,
        "tokens_per_second": {
            "qnext": length / statistics.median(ours_s),
            "transformers": length / statistics.median(theirs_s),
        },
        "speedup": ratios(theirs_s, ours_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="model folder; default: the standard CPU model, made if need be")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bfloat16")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.folder is None:
        options.folder = _standard_model()
    print(f"{machine()['cpu']}, {options.threads} threads, {options.dtype}, {options.folder}")
    results = []
    for kind, length in (("prefill", options.prefill), ("decode", options.decode)):
        result = measure(
            options.folder, dtype=options.dtype, threads=options.threads, kind=kind, length=length,
            rounds=options.rounds,
        )  # fmt: skip
        speed, speedup = result["tokens_per_second"], result["speedup"]
        print(
            f"{kind:<8}{length:5}  qnext {speed['qnext']:7.1f} tok/s   transformers {speed['transformers']:7.1f} "
            f"tok/s   ratio {speedup['median']:.2f} ({speedup['min']:.2f}-{speedup['max']:.2f})"
        )
        results.append(result)
    print_json({"benchmark": "inference", "dtype": options.dtype, "threads": options.threads, "results": results})


if __name__ == "__main__":
    main()
