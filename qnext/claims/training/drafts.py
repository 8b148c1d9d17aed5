"""C8: how often the MTP layer is right, and how much faster it makes decoding, by domain and by length of context."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qnext.claims.claim import Findings, Grid, Workplace, ratio_cell
from qnext.claims.layers.drafted import DraftedSteps
from qnext.claims.notebook import Measured, Point
from qnext.claims.training.ablations import model_folder, run_name
from qnext.claims.training.arms import Arm, RunBudget
from qnext.claims.training.domains import DOMAINS, DomainTexts, domain_texts
from qnext.claims.training.runs import trained
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.eval import EvalDocument, evaluate_perplexity
from qnext.eval.intervals import Interval, mean_interval
from qnext.model import CausalLM

_ARM = Arm("with MTP")


@dataclass(frozen=True)
class DraftSpeed:
    """One model per seed. `contexts` are the tokens before an answer of `answer` tokens; each is drawn `prompts` times
    from held-out text, and answered greedily with and without drafts, in turn."""

    budget: RunBudget
    seeds: int
    contexts: tuple[int, ...]
    layers: DraftedSteps
    answer: int = 96
    prompts: int = 6
    rounds: int = 3
    train_bytes: int = 400_000
    held_out_bytes: int = 60_000

    def points(self, at: Workplace) -> Iterable[Point]:
        return [
            *(
                Point(run_name("drafts", _ARM, seed), self._facts(seed), partial(self._accept, at.folder, seed))
                for seed in range(self.seeds)
            ),
            *(
                Point(
                    f"draft speed/{domain}/{context}",
                    {**self._facts(0), "answer": self.answer, "prompts": self.prompts, "rounds": self.rounds},
                    partial(self._speed, at.folder, domain, context),
                )
                for context in self.contexts
                for domain in DOMAINS
            ),
            *self.layers.points(at),
        ]

    def _facts(self, seed: int) -> dict[str, Any]:
        return {**self.budget.facts(_ARM, seed=seed), "train": self.train_bytes, "held_out": self.held_out_bytes}

    @property
    def _texts(self) -> DomainTexts:
        return domain_texts(
            self.budget.base.vocab_size, train_bytes=self.train_bytes, held_out_bytes=self.held_out_bytes
        )

    def _model(self, folder: Path, seed: int) -> CausalLM:
        place = model_folder(folder, run_name("drafts", _ARM, seed), self._facts(seed))
        return trained(_ARM, self.budget, self._texts.train, seed=seed, folder=place)

    def _accept(self, folder: Path, seed: int) -> dict[str, dict[str, float]]:
        """By domain, on held-out text: what the first draft gets right, given the text up to there."""
        model = self._model(folder, seed)
        found = {}
        for domain, documents in self._texts.held_out.items():
            measured = evaluate_perplexity(model, documents, sequence_length=self.budget.sequence_length)
            found[domain] = {"bits_per_byte": measured.bits_per_byte, "acceptance": measured.mtp_acceptance or 0.0}
        return found

    def _speed(self, folder: Path, domain: str, context: int) -> list[dict[str, float]]:
        """Round by round: tokens/s without and with drafts, drafts that were right, and tokens of a step."""
        model, prompts = self._model(folder, 0).to(torch.bfloat16), self._prompts(self._texts.held_out[domain], context)
        engines = {
            name: Engine.of(
                model,
                EngineConfig(
                    max_num_seqs=1, max_model_len=context + self.answer + 8, prefix_cache=True, speculation=drafts
                ),
            )
            for name, drafts in (("plain", False), ("drafted", True))
        }
        rounds = []
        for number in range(self.rounds + 1):
            seconds = dict.fromkeys(engines, 0.0)
            before = engines["drafted"].metrics
            for prompt in prompts:
                for name, engine in engines.items():
                    seconds[name] += _answer_seconds(engine, prompt, self.answer)
            after = engines["drafted"].metrics
            drafted = after.drafted_tokens - before.drafted_tokens
            accepted = after.accepted_tokens - before.accepted_tokens
            tokens = len(prompts) * (self.answer - 1)
            if number:  # the first round warms up, and lets the engine learn how many drafts pay
                rounds.append(
                    {
                        "plain": tokens / seconds["plain"],
                        "drafted": tokens / seconds["drafted"],
                        "accepted": accepted / drafted if drafted else 0.0,
                        "per_step": tokens / max(1, tokens - accepted),
                    }
                )
        return rounds

    def _prompts(self, documents: Sequence[EvalDocument], context: int) -> list[list[int]]:
        """Pieces of held-out text one after another; short documents are joined."""
        ids = [token for document in documents for token in document.token_ids]
        while len(ids) < context + self.prompts:
            ids += ids
        step = max(1, (len(ids) - context) // self.prompts)
        return [list(ids[number * step : number * step + context]) for number in range(self.prompts)]

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        values: dict[str, Interval] = {}
        accepted = [
            known[name].value for seed in range(self.seeds) if (name := run_name("drafts", _ARM, seed)) in known
        ]
        rows = []
        for domain in DOMAINS:
            if accepted:
                share = mean_interval([each[domain]["acceptance"] for each in accepted])
                values[f"acceptance_{domain}"] = share
                loss = mean_interval([each[domain]["bits_per_byte"] for each in accepted])
                rows.append(
                    [domain, share.percent() if len(accepted) > 1 else f"{share.value:.1%}", f"{loss.value:.3f}"]
                )
        speeds = []
        for context in self.contexts:
            for domain in DOMAINS:
                entry = known.get(f"draft speed/{domain}/{context}")
                if entry is None:
                    continue
                ratio = mean_interval([each["drafted"] / each["plain"] for each in entry.value])
                place = "first" if context == self.contexts[0] else str(context)
                values[f"speed_{domain}_{place}"] = ratio
                means = {key: mean_interval([each[key] for each in entry.value]).value for key in entry.value[0]}
                speeds.append(
                    [
                        domain,
                        f"{context:,}",
                        f"{means['plain']:,.0f}",
                        f"{means['drafted']:,.0f}",
                        ratio_cell(ratio),
                        f"{means['accepted']:.1%}",
                        f"{means['per_step']:.2f}",
                    ]
                )
        header = ["text", "context", "tokens/s", "with drafts", "ratio", "drafts that were right", "tokens of a step"]
        grids = [
            Grid(
                "Share of held-out places where the first draft is what the trunk says",
                ["text", "acceptance", "bits per byte"],
                rows,
            ),
            Grid("Greedy answers behind held-out text, with and without drafts, in turn", header, speeds),
        ]
        acceptance = {domain: values[f"acceptance_{domain}"].value for domain in DOMAINS} if accepted else {}
        released, more = self.layers.grids(known, acceptance)
        return Findings(self.setting, values | released, [grid for grid in [*grids, *more] if grid.rows])

    @property
    def setting(self) -> str:
        return (
            f"A model of {self.budget.base.num_hidden_layers} layers of width {self.budget.base.hidden_size} and an "
            f"MTP layer, trained with {self.budget.flops:.1e} operations on code (standard library of Python), prose "
            "(the language reference) and arithmetic (sums with their working), as many bytes of each, and served in "
            "bf16. The engine chooses how many tokens it drafts; answers are the same with and without. Then layers of "
            "the released shape, random weights: steps with drafts to verify, and what follows for the whole model "
            "with the acceptance of the small one."
        )


def _answer_seconds(engine: Engine, prompt: list[int], num_tokens: int) -> float:
    """Of all tokens but the first, which reads the prompt."""
    events = engine.stream(prompt, SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True))
    next(events)
    start = time.perf_counter()
    for _ in events:
        pass
    return time.perf_counter() - start
