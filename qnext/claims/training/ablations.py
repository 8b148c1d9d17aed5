"""C5 to C7: small models that differ in one thing, trained with equal operations, several seeds each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from qnext.claims.notebook import Point
from qnext.claims.training.arms import Arm, RunBudget
from qnext.claims.training.runs import recall_documents, text_measures, trained
from qnext.claims.training.texts import code_text
from qnext.eval.ids import IdShape, id_problems
from qnext.eval.ids.scores import evaluate_ids


@dataclass(frozen=True)
class TextRuns:
    """Arms that learn to continue the standard library of Python, and are measured on packages that none has seen."""

    budget: RunBudget
    seeds: int
    train_bytes: int = 4_000_000
    held_out_bytes: int = 200_000

    def points(self, arms: Iterable[Arm], folder: Path) -> list[Point]:
        """Seed by seed, so that a run that is cut short has all arms of the first ones."""
        arms = list(arms)
        return [self._point(arm, seed, folder) for seed in range(self.seeds) for arm in arms]

    def _point(self, arm: Arm, seed: int, folder: Path) -> Point:
        return Point(run_name("text", arm, seed), self.facts(arm, seed), partial(self._measure, arm, seed, folder))

    def facts(self, arm: Arm, seed: int) -> dict[str, Any]:
        return {**self.budget.facts(arm, seed=seed), "train": self.train_bytes, "held_out": self.held_out_bytes}

    def _measure(self, arm: Arm, seed: int, folder: Path) -> dict[str, float]:
        text = code_text(self.budget.base.vocab_size, train_bytes=self.train_bytes, held_out_bytes=self.held_out_bytes)
        place = model_folder(folder, run_name("text", arm, seed), self.facts(arm, seed))
        model = trained(arm, self.budget, text.train, seed=seed, folder=place)
        return text_measures(model, text, sequence_length=self.budget.sequence_length)


@dataclass(frozen=True)
class RecallRuns:
    """Arms that learn to recall, and are asked at several lengths. `shapes` are trained on, `tested` are asked."""

    budget: RunBudget
    seeds: int
    task: str
    shapes: Sequence[IdShape]
    tested: Sequence[IdShape]
    num_problems: int = 64
    label: str = "recall"  # in the names of points and folders

    def at_rate(self, factor: float) -> RecallRuns:
        """The first seed, with other learning rates."""
        budget = replace(self.budget, lr=factor * self.budget.lr, muon_lr=factor * self.budget.muon_lr)
        return replace(self, budget=budget, seeds=1, label=f"{self.label} at {factor:g}x")

    def points(self, arms: Iterable[Arm], folder: Path) -> list[Point]:
        arms = list(arms)
        return [self._point(arm, seed, folder) for seed in range(self.seeds) for arm in arms]

    def _point(self, arm: Arm, seed: int, folder: Path) -> Point:
        facts = {
            **self.budget.facts(arm, seed=seed),
            "task": self.task,
            "shapes": [asdict(shape) for shape in self.shapes],
            "tested": [asdict(shape) for shape in self.tested],
            "problems": self.num_problems,
        }
        name = run_name(self.label, arm, seed)
        return Point(name, facts, partial(self._measure, arm, seed, model_folder(folder, name, facts)))

    def _measure(self, arm: Arm, seed: int, place: Path) -> list[float]:
        """The share of right answers for each tested shape."""
        length = max(shape.length for shape in self.shapes)
        count = 2 + self.budget.steps(arm) * self.budget.tokens_per_step // min(
            shape.length - 1 for shape in self.shapes
        )
        assert length <= self.budget.sequence_length
        documents = recall_documents(self.task, self.shapes, count, seed=seed)
        model = trained(arm, self.budget, documents, seed=seed, folder=place)
        return [self._score(model, shape) for shape in self.tested]

    def _score(self, model: Any, shape: IdShape) -> float:
        problems = list(islice(id_problems(self.task, shape, seed="test"), self.num_problems))
        return evaluate_ids(model, problems).answers.value


def run_name(kind: str, arm: Arm, seed: int) -> str:
    return f"{kind}/{arm.name}/{seed}"


def model_folder(folder: Path, run: str, facts: Mapping[str, Any]) -> Path:
    """Of the model of a run. Another recipe has another one, so that no old model is taken for it."""
    recipe = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return folder / "models" / f"{re.sub('[ ,/]+', '-', run)}-{recipe}"


def values_of(known: Mapping[str, Any], kind: str, arm: Arm, seeds: int) -> list[Any]:
    """The values of the seeds of an arm, up to the first that is not known."""
    found = []
    for seed in range(seeds):
        entry = known.get(run_name(kind, arm, seed))
        if entry is None:
            break
        found.append(entry.value)
    return found
