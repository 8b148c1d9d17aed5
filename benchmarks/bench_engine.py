"""What does the engine spare, and what does it cost: shared prefixes, many streams, its scheduler, drafts?

Each figure is a ratio within one run, of contestants that take turns: median, least and greatest of the rounds.
--parts names what is measured: PARTS says what each is. All but "speculation" take --model, without drafts but for
"cost"; llama.cpp's file is made by llama-quantize from our export: Q4_K_M for 4 bits. Quantised folders and GGUF
files go to runs/bench.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from _pair import machine, print_json

import torch
from _known import train_known
from _llama_server import Server
from _serving import many_streams, second_turn, shared_prompt, start_server
from _speculation import KNOWN, drafting, share_known, texts_of
from _streams import RandomTokens
from bench_inference import standard_model

from qnext.bench.files import FLOAT_SCHEMES, BenchFiles
from qnext.checkpoint import load_model
from qnext.model import CausalLM
from qnext.ops import keep_freed_memory, set_num_threads

PARTS = {
    "turn": "time to the first token of a second turn, over that of the first",
    "shared": "prompt tokens computed for requests that begin alike",
    "streams": "tokens a second of 1, 4 and 16 streams, against each other and, where llama-server is found in "
    "--llama-cpp or on the PATH, against as many of its streams on the same weights; the scheduler's share",
    "cost": "drafts that are never right: the same model, whose MTP layer is as random as the rest",
    "speculation": "drafts of a small model that is trained here on little code until it knows it, over no drafts",
}
CACHE = Path("runs/bench")
_MARGIN = 16  # tokens of room beyond prompt and answer


def show(figure: dict[str, Any]) -> None:
    """One line of the table, as soon as it is known."""
    ratio, target = figure["ratio"], figure["target"]
    text = f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})"
    verdict = ""
    if target is not None:
        is_met = figure["met"] = ratio["median"] <= target if figure.get("at_most") else ratio["median"] >= target
        verdict = f"{'<=' if figure.get('at_most') else '>='} {target:<5} {'met' if is_met else 'MISSED'}"
    if "accepted" in figure:
        accepted = figure["accepted"]
        verdict += "  no drafts" if accepted is None else f"  {accepted:.0%} accepted"
        verdict += f", {figure['tokens_per_step']:.2f} tokens a step"
    print(f"{figure['figure']:<66} {text:<22} {verdict}", flush=True)


def load(folder: Path, scheme: str) -> CausalLM:
    """The model of a folder in a scheme, made in runs/bench where the folder has another one."""
    files = BenchFiles(folder, CACHE)
    dtype = FLOAT_SCHEMES.get(scheme)
    return load_model(
        files.folder_of(scheme), dtype=None if dtype is None else getattr(torch, dtype), check_finite=False
    )


@contextmanager
def llama_server(options: argparse.Namespace, folder: Path) -> Iterator[Server | None]:
    where = None if options.llama_cpp is None else str(options.llama_cpp)
    binary = shutil.which("llama-server", path=where)
    if binary is None:
        print("without llama.cpp: no llama-server here; --llama-cpp names its folder", file=sys.stderr)
        yield None
        return
    quantize = shutil.which("llama-quantize", path=where)
    gguf = options.gguf or BenchFiles(folder, CACHE).gguf_of(options.scheme, llama_quantize=quantize)
    server = start_server(
        binary,
        gguf,
        num_streams=options.streams[-1],
        context=options.prompt + options.output + _MARGIN,
        threads=options.threads,
    )
    try:
        yield server
    finally:
        server.close()


def serving(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The parts on --model."""
    if set(options.parts) <= {"speculation"}:
        return
    folder = Path(options.model or standard_model())
    model = load(folder, options.scheme)
    num_streams = options.streams[-1]
    if "turn" in options.parts:
        yield second_turn(model, length=options.conversation, rounds=options.rounds)
    if "shared" in options.parts:
        yield shared_prompt(model, shared=options.shared, own=options.prompt, num_requests=num_streams)
    sizes = {"prompt": options.prompt, "output": options.output, "rounds": options.rounds}
    if "streams" in options.parts:
        with llama_server(options, folder) as server:
            yield from many_streams(model, counts=options.streams, server=server, **sizes)
    if "cost" in options.parts and model.config.num_nextn_predict_layers:
        tokens = RandomTokens(model.config.vocab_size)
        kinds = {"random weights": [tokens.take(options.prompt) for _ in range(num_streams)]}
        yield from drafting(model, kinds, batches=options.streams, temperatures=(0.0,), **sizes)


def speculation(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The part on a model that is trained here."""
    if "speculation" not in options.parts:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.run or Path(temporary) / "run"
        run = train_known(folder, steps=options.steps, num_bytes=options.text_bytes)
        prompt, output = options.prompt, options.output
        kinds = texts_of(run, count=options.streams[-1], length=prompt + output)
        model = load_model(folder / "model")
        share = share_known(model, kinds[KNOWN], prompt=prompt)
        print(f"  greedy decoding gets {share:.0%} of the tokens of known code right", flush=True)
        for figure in drafting(
            model,
            kinds,
            batches=options.streams,
            temperatures=(0.0, 1.0),
            prompt=prompt,
            output=output,
            rounds=options.rounds,
        ):
            yield {**figure, "greedy_right": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="; ".join(map(": ".join, PARTS.items()))
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="model folder; default: the standard CPU model of bench_inference.py",
    )
    parser.add_argument("--scheme", default="int4-g32", help="of --model: bf16, int8, int4-g32 ...")
    parser.add_argument("--conversation", type=int, default=8192, help="tokens before the second turn's answer")
    parser.add_argument("--shared", type=int, default=4096, help="tokens that requests have in common")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each stream's own prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of each stream's answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs; default: the PATH")
    parser.add_argument("--gguf", type=Path, help="file for llama-server instead of one that is made")
    parser.add_argument(
        "--run",
        type=Path,
        help="keeps the training: an interrupted one goes on, a finished one is used; default a temporary folder",
    )
    parser.add_argument("--steps", type=int, default=240, help="of training")
    parser.add_argument("--text-bytes", type=int, default=40_000, help="of code to train on")
    options = parser.parse_args()
    options.streams = sorted(set(options.streams))
    keep_freed_memory()
    set_num_threads(options.threads)
    print(f"{machine()['cpu']}, {options.threads} threads, {options.rounds} rounds")
    figures = []
    for figure in chain(serving(options), speculation(options)):
        show(figure)
        figures.append(figure)
    names = ("scheme", "conversation", "shared", "streams", "prompt", "output", "rounds", "steps", "text_bytes")
    sizes = {name: getattr(options, name) for name in names}
    print_json({"benchmark": "engine", "threads": options.threads, **sizes, "figures": figures})


if __name__ == "__main__":
    main()
