"""What drafting brings and costs: one model in two engines, one that drafts and one that does not, in turn."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from typing import Any

from _pair import ratios

from _streams import Phase, RandomTokens, make_engine, write_together

from qnext.engine import SamplingParams
from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.recipes.recipe import Run

Pieces = list[list[int]]
KNOWN = "known code"


def texts_of(run: Run, *, count: int, length: int) -> dict[str, Pieces]:
    """`count` pieces of `length` tokens of each kind; KNOWN is what the model was trained on."""
    characters = 20 * length  # of a file, so that no long one is tokenised for nothing
    texts = {
        KNOWN: [file.text for file in run.corpus.train],
        "unseen code": [file.text[:characters] for file in run.corpus.held_out],
        "prose": [text[:characters] for text in pydoc_data.topics.topics.values()],
    }
    found = {
        kind: _spread_out(run.tokenizer.encode_batch(some), count=count, length=length) for kind, some in texts.items()
    }
    tokens = RandomTokens(run.tokenizer.vocab_size)
    return {**found, "random tokens": [tokens.take(length) for _ in range(count)]}


def _spread_out(documents: Sequence[list[int]], *, count: int, length: int) -> Pieces:
    """Pieces evenly spread over the documents, fewer than `count` where there are fewer."""
    starts = [(document, start) for document in documents for start in range(0, len(document) - length + 1, length)]
    if not starts:
        raise UsageError(f"no document of {length} tokens: ask for shorter prompts and answers")
    return [document[start : start + length] for document, start in starts[:: math.ceil(len(starts) / count)]]


def share_known(model: CausalLM, pieces: Pieces, *, prompt: int) -> float:
    """Share of the tokens after the first `prompt` of each piece that greedy decoding gets right."""
    engine = make_engine(model, speculate=False, max_num_seqs=len(pieces), max_model_len=len(pieces[0]))
    params = SamplingParams(max_tokens=len(pieces[0]) - prompt, ignore_eos=True)
    completions = engine.generate([piece[:prompt] for piece in pieces], params)
    right = sum(
        chosen == token
        for completion, piece in zip(completions, pieces, strict=True)
        for chosen, token in zip(completion.output_ids, piece[prompt:], strict=True)
    )
    return right / sum(len(completion.output_ids) for completion in completions)


def drafting(
    model: CausalLM,
    kinds: dict[str, Pieces],
    *,
    batches: Sequence[int],
    temperatures: Sequence[float],
    prompt: int,
    output: int,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Tokens a second with drafts over those without, of every batch, text and temperature."""
    off, on = (
        make_engine(model, speculate=speculate, max_num_seqs=max(batches), max_model_len=prompt + output)
        for speculate in (False, True)
    )
    for batch in batches:
        for kind, pieces in kinds.items():
            for temperature in temperatures:
                phases: dict[bool, list[Phase]] = {False: [], True: []}
                for round_ in range(1 + rounds):
                    chosen = [pieces[(round_ * batch + i) % len(pieces)][:prompt] for i in range(batch)]
                    params = [
                        SamplingParams(temperature=temperature, seed=i, max_tokens=output, ignore_eos=True)
                        for i in range(batch)
                    ]
                    turns = ((False, off), (True, on))
                    for speculate, engine in turns if round_ % 2 else reversed(turns):
                        phase = write_together(engine, chosen, params)
                        if round_:  # the first one warms up
                            phases[speculate].append(phase)
                yield {
                    "figure": f"drafts over none: {batch} x {kind}, temperature {temperature:g}",
                    "target": 1.3 if batch == 1 and kind == KNOWN else 0.98,
                    **_compare(phases[False], phases[True]),
                }


def _compare(off: Sequence[Phase], on: Sequence[Phase]) -> dict[str, Any]:
    for one, other in zip(off, on, strict=True):
        for a, b in zip(one.answers, other.answers, strict=True):
            length = min(len(a), len(b))
            if a[:length] != b[:length]:
                raise RuntimeError("a stream with drafts answers otherwise than without")
    drafted = sum(phase.num_drafts for phase in on)
    rows = sum(phase.num_steps * phase.num_streams for phase in on)
    return {
        "ratio": ratios([phase.tokens_per_second for phase in on], [phase.tokens_per_second for phase in off]),
        "accepted": sum(phase.num_accepted for phase in on) / drafted if drafted else None,
        "drafted_per_step": drafted / rows,
        "tokens_per_step": sum(phase.num_tokens for phase in on) / rows,
    }
