"""How fast are two ranks with one thread each, beside one process with two threads, on the same cores?

Each side is timed in turn on one model folder: a prompt, then tokens one by one, without drafts. Ranks bring no memory
bandwidth of their own here, so what is lost is what they say to each other and the wait for the busier one. All sides
have to give the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from _pair import Contestants, Step, print_json, ratios

import torch

from qnext.engine import EngineConfig, SamplingParams
from qnext.session.folder import EngineOpening, open_model
from qnext.session.opening import open_engine
from qnext.session.rank_options import RankOptions

SIDES = {"one process": (1, 1), "tensor parallel": (2, 1), "expert parallel": (1, 2)}


def worker(model: str, mesh: tuple[int, int], num_threads: int, prompt: int, tokens: int) -> Step:
    """A step gives seconds of the prompt, seconds of the tokens after the first, and the tokens."""
    torch.set_num_threads(num_threads)
    folder = open_model(model)
    config = EngineConfig(max_num_seqs=1, max_model_len=prompt + tokens, prefix_cache=False, speculation=False)
    engine = open_engine(folder, config, EngineOpening(ranks=RankOptions(*mesh)))[1]
    prompt_ids = [(7 * position) % folder.config.vocab_size for position in range(prompt)]

    def step() -> tuple[float, float, list[int]]:
        request = engine.add_request(prompt_ids, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0))
        begun = time.perf_counter()
        while not request.output_ids:
            engine.step()
            request.raise_failure()
        first = time.perf_counter()
        while engine.has_unfinished:
            engine.step()
        return first - begun, time.perf_counter() - first, list(request.output_ids)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    given = parser.parse_args()
    shared = {"model": given.model, "num_threads": given.threads, "prompt": given.prompt, "tokens": given.tokens}
    with Contestants({name: (worker, {**shared, "mesh": mesh}) for name, mesh in SIDES.items()}) as sides:
        _, values = sides.run(warmup=1, rounds=given.rounds)
    answers = {name: found[0][2] for name, found in values.items()}
    assert all(answer == answers["one process"] for answer in answers.values()), "the answers differ"
    result: dict[str, Any] = {"benchmark": "ranks", **vars(given)}
    for place, part, count in ((0, "prompt", given.prompt), (1, "decode", given.tokens - 1)):
        seconds = {name: [value[place] for value in found[1:]] for name, found in values.items()}
        for name, each in seconds.items():
            speed, rate = ratios(seconds["one process"], each), count / statistics.median(each)
            result[f"{part}, {name}"] = {"tokens_per_second": rate, "speed": speed}
            print(
                f"{part:<7} {name:<16} {rate:8.1f} tokens/s, "
                f"{speed['median']:.2f}x ({speed['min']:.2f} to {speed['max']:.2f}) of one process"
            )
    print_json(result)


if __name__ == "__main__":
    main()
