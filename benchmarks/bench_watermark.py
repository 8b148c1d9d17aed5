"""How strong is the watermark, and what does it cost?

Answers of MODEL to beginnings of texts that it was not trained on, with and without a mark, at several temperatures.
Strength: the share of answers that the detector finds, by length, temperature and edits, at three rates of false alarm.
False alarms: on texts of people, pieces of Python's library. Cost: nats per token of the model's own text under the
model; with --speed the time of a draw for a large vocabulary; with --rate tokens a second of MODEL; with --task the
share of right answers of a small model that has learnt to recall. Each part is printed as it ends.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from _pair import machine, print_json

import numpy as np
import torch

from qnext import LLM
from qnext.claims.training.arms import HYBRID, RunBudget, recall_model
from qnext.claims.training.runs import recall_documents, trained
from qnext.engine import Completion, SamplingParams
from qnext.engine.policy.watermark_key import WatermarkKey
from qnext.engine.sampling.filters import draw
from qnext.engine.sampling.watermark import Mark, score
from qnext.eval.ids import IdShape, id_problems
from qnext.eval.intervals import wilson
from qnext.model import Batch
from qnext.recipes.code import standard_library

LEVELS = (1e-2, 1e-3, 1e-6)
SCHEMES = {
    "tournament": {},
    "green 1": {"scheme": "green", "delta": 1.0},
    "green 2": {"scheme": "green", "delta": 2.0},
}
EDITED_LENGTH = 200
EDITS = ("deleted", "replaced")
EDIT_SHARES = (0.05, 0.1, 0.2, 0.3)
VOCABULARY = 151_936  # of the released models
_RATE_TOKENS = 64
_CONTEXT = 4  # tokens whose hash seeds a mark, the default of keys


class Answers(NamedTuple):
    """Of one scheme and temperature: token ids, and the mean nats per token of each."""

    ids: list[list[int]]
    nats: list[float]

    @classmethod
    def of(cls, found: Sequence[Completion]) -> Answers:
        nats = [-statistics.mean(token.logprob or 0.0 for token in each.sampled) for each in found]
        return cls([list(each.output_ids) for each in found], nats)


def _key(name: str, number: int = 0) -> WatermarkKey:
    """Each answer has its own: what one key prefers is the same wherever a context comes again."""
    secret = f"{name} {number}".encode().ljust(32, b".")
    return WatermarkKey(secret, **SCHEMES[name])  # type: ignore[arg-type]


def _answers(llm: LLM, prompts: list[list[int]], name: str | None, temperature: float, length: int) -> Answers:
    params = [
        SamplingParams(
            temperature=temperature,
            seed=n,
            max_tokens=length,
            ignore_eos=True,
            logprobs=0,
            watermark=None if name is None else _key(name, n),
        )
        for n in range(len(prompts))
    ]
    return Answers.of(llm.engine.generate(prompts, params))


def _shares(texts: Sequence[Sequence[int]], scheme: str) -> dict[str, float]:
    """Of texts that are found, by level; and the median z."""
    found = [score(text, _key(scheme, n)) for n, text in enumerate(texts)]
    shares = {f"{level:g}": statistics.mean(each.p_value < level for each in found) for level in LEVELS}
    return {**shares, "z": statistics.median(each.z for each in found)}


def _edited(ids: Sequence[int], edit: str, share: float, rng: random.Random, vocab: int) -> list[int]:
    """Each token is edited with so much chance."""
    changed: list[int] = []
    for token in ids:
        if rng.random() >= share:
            changed.append(token)
        elif edit == "replaced":
            changed.append(rng.randrange(vocab))
    return changed


def _strength(
    name: str, temperature: float, answers: Answers, lengths: Sequence[int], vocab: int
) -> list[dict[str, Any]]:
    rng = random.Random(1)
    rows = [
        {"part": "length", "scheme": name, "temperature": temperature, "tokens": length}
        | _shares([ids[:length] for ids in answers.ids], name)
        for length in lengths
    ]
    for edit in EDITS:
        for share in EDIT_SHARES:
            texts = [_edited(ids[:EDITED_LENGTH], edit, share, rng, vocab) for ids in answers.ids]
            row = {"part": "edits", "scheme": name, "temperature": temperature, "edit": edit, "share": share}
            rows.append(row | _shares(texts, name))
    return rows


def _false_alarms(llm: LLM, number: int, length: int) -> list[dict[str, Any]]:
    """Pieces of files that people wrote, each with a key of its own."""
    corpus = standard_library(held_out_share=0.3)
    ids = [token for file in corpus.held_out[:200] for token in llm.tokenize(file.text, allow_special=False)]
    rows = []
    for name in ("tournament", "green 2"):
        p_values = []
        for n in range(number):
            start = n * length % max(1, len(ids) - length)
            key = WatermarkKey(n.to_bytes(32, "little"), **SCHEMES[name])  # type: ignore[arg-type]
            p_values.append(score(ids[start : start + length], key).p_value)
        values = np.array(p_values)
        shares = {f"{level:g}": float((values < level).mean()) for level in (1e-1, *LEVELS)}
        rows.append({"part": "false alarms", "scheme": name, "texts": number, "tokens": length, **shares})
    return rows


def _cost(temperature: float, plain: Answers, marked: dict[str, Answers]) -> list[dict[str, Any]]:
    rows = []
    for name, answers in marked.items():
        differences = [one - other for one, other in zip(answers.nats, plain.nats, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        rows.append(
            {
                "part": "likelihood",
                "scheme": name,
                "temperature": temperature,
                "plain_nats": statistics.mean(plain.nats),
                "difference": statistics.mean(differences),
                "half_interval_95": 1.96 * error,
            }
        )
    return rows


def _speed(rounds: int) -> list[dict[str, Any]]:
    """Seconds of one draw, the ways in turn; medians with the least and the most."""
    row_Y = np.random.default_rng(0).normal(size=VOCABULARY).astype(np.float32) * 3
    rows = []
    for top_k in (20, 0):
        params = SamplingParams(temperature=0.7, top_k=top_k)
        times: dict[str, list[float]] = {name: [] for name in ("plain", "tournament", "green 2")}
        for number in range(rounds):
            for name, found in times.items():
                started = time.perf_counter()
                if name == "plain":
                    draw(row_Y, params, 0.5)
                else:
                    mark = Mark(_key(name), number)
                    draw(mark.with_green_list(row_Y), params, 0.5, mark.tilt)
                found.append(time.perf_counter() - started)
        for name, found in times.items():
            spread = {
                "median_ms": 1e3 * statistics.median(found),
                "least_ms": 1e3 * min(found),
                "most_ms": 1e3 * max(found),
            }
            rows.append({"part": "draw", "scheme": name, "top_k": top_k, "vocabulary": VOCABULARY, **spread})
    return rows


def _rate(llm: LLM, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of one sequence at temperature 0.7 and top_k 20, the ways in turn, as ratios to the plain one of
    the same round."""
    prompt = list(range(1, 33))
    rates: dict[str | None, list[float]] = {name: [] for name in (None, "tournament", "green 2")}
    for number in range(rounds + 1):
        for name, found in rates.items():
            params = SamplingParams(
                temperature=0.7,
                top_k=20,
                seed=number,
                max_tokens=_RATE_TOKENS + 1,
                ignore_eos=True,
                watermark=None if name is None else _key(name),
            )
            events = llm.engine.stream(prompt, params)
            next(events)
            started = time.perf_counter()
            for _ in events:
                pass
            if number:  # the first round warms up
                found.append(_RATE_TOKENS / (time.perf_counter() - started))
    rows = []
    for name, found in rates.items():
        ratios = [one / plain for one, plain in zip(found, rates[None], strict=True)]
        rows.append(
            {
                "part": "rate",
                "scheme": name or "plain",
                "tokens_per_second": statistics.median(found),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        )
    return rows


def _task(number: int, flops: float) -> list[dict[str, Any]]:
    """Right answers of a model of 0.3 M parameters that was taught to recall the values of eight keys.

    They are drawn at marked places: the first tokens of an answer have no mark, so an engine would show nothing here.
    """
    shape = IdShape(512, 64, num_facts=8, num_queries=8)
    budget = RunBudget(recall_model(64), flops, sequence_length=64)
    documents = recall_documents("mqar", [shape], 2 + int(budget.steps(HYBRID) * budget.tokens_per_step / 63), seed=0)
    with TemporaryDirectory() as place:
        model = trained(HYBRID, budget, documents, seed=0, folder=Path(place) / "m")
    places: list[tuple[np.ndarray, tuple[int, ...], int]] = []  # logits, the tokens before it, the right one
    for problem in islice(id_problems("mqar", shape, seed="test"), number):
        ids = list(problem.token_ids)
        with torch.no_grad():
            hidden_TD = model(Batch.from_lengths(torch.tensor(ids[:-1]), [len(ids) - 1])).hidden_TD
            rows_RY = model.logits(hidden_TD[torch.tensor(problem.answer_places) - 1]).float().numpy()
        places += [
            (row_Y, tuple(ids[at - _CONTEXT : at]), answer)
            for row_Y, at, answer in zip(rows_RY, problem.answer_places, problem.answers, strict=True)
        ]
    return [_right(places, name, temperature) for temperature in (0.7, 1.0, 1.5) for name in (None, *SCHEMES)]


def _right(
    places: list[tuple[np.ndarray, tuple[int, ...], int]], name: str | None, temperature: float
) -> dict[str, Any]:
    """Every place has a key of its own, and the same number to draw with in every scheme."""
    rng, params = random.Random(2), SamplingParams(temperature=temperature)
    hits = 0
    for n, (row_Y, context, answer) in enumerate(places):
        drawn = rng.random()
        if name is None:
            token = draw(row_Y, params, drawn)
        else:
            key = _key(name, n)
            mark = Mark(key, key.seed(context))
            token = draw(mark.with_green_list(row_Y), params, drawn, mark.tilt)
        hits += token == answer
    share = wilson(hits, len(places))
    row = {"part": "task", "scheme": name or "plain", "temperature": temperature}
    return {**row, "right": share.value, "low": share.low, "high": share.high}


def _prompts(llm: LLM, number: int) -> list[list[int]]:
    corpus = standard_library(held_out_share=0.05)
    texts = [file.text for file in corpus.held_out if len(file.text) > 2000]
    return [
        llm.tokenize(texts[n % len(texts)][100 * (n // len(texts)) :][:400], allow_special=False) for n in range(number)
    ]


def _print(rows: Sequence[dict[str, Any]], out: list[dict[str, Any]], path: Path | None) -> None:
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            ),
            flush=True,
        )
    out += rows
    if path is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in out), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a small model that was trained on code, such as runs/demo/model")
    parser.add_argument("--answers", type=int, default=100, help="of each scheme and temperature; 0: none")
    parser.add_argument("--lengths", default="25,50,100,200,400")
    parser.add_argument("--temperatures", default="0,0.5,0.7,1.0")
    parser.add_argument("--texts", type=int, default=20_000, help="of people")
    parser.add_argument("--speed", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--rate", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--task", type=int, default=0, metavar="PROBLEMS")
    parser.add_argument("--task-flops", type=float, default=1e12, help="operations of training of its model")
    parser.add_argument("--out", type=Path, default=None, help="a line of JSON for each row, as they come")
    arguments = parser.parse_args()
    lengths = [int(each) for each in arguments.lengths.split(",")]
    rows: list[dict[str, Any]] = []
    print(json.dumps(machine()))
    if arguments.speed:
        _print(_speed(arguments.speed), rows, arguments.out)
    if arguments.task:
        _print(_task(arguments.task, arguments.task_flops), rows, arguments.out)
    if arguments.rate:
        with LLM(arguments.model, max_num_seqs=1, max_model_len=1024) as llm:
            _print(_rate(llm, arguments.rate), rows, arguments.out)
    if not arguments.answers:
        print_json({"rows": rows})
        return
    with LLM(arguments.model, max_num_seqs=16, max_model_len=1024) as llm:
        _print(_false_alarms(llm, arguments.texts, EDITED_LENGTH), rows, arguments.out)
        prompts = _prompts(llm, arguments.answers)
        for temperature in map(float, arguments.temperatures.split(",")):
            plain = _answers(llm, prompts, None, temperature, max(lengths))
            names = [name for name in SCHEMES if temperature > 0 or name.startswith("green")]
            marked = {name: _answers(llm, prompts, name, temperature, max(lengths)) for name in names}
            for name, answers in marked.items():
                vocab = llm.tokenizer.vocab_size
                _print(_strength(name, temperature, answers, lengths, vocab), rows, arguments.out)
            _print(_cost(temperature, plain, marked), rows, arguments.out)
    print_json({"rows": rows})


if __name__ == "__main__":
    main()
