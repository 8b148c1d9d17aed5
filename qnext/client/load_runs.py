"""The runs of a load, one after another: fresh prompts for each run, a warm-up before it, results after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qnext.client.load import CHAT, Timing, Workload, run_load
from qnext.client.load_prompts import LoadPrompt, PromptServer, RandomPrompts, prompts_of_file
from qnext.client.load_report import measured

PromptsOf = Callable[[int, int], list[LoadPrompt]]  # number, seed -> prompts
RunProgress = Callable[[str, int], AbstractContextManager[Callable[[Timing], object] | None]]  # label, requests


@dataclass(frozen=True)
class LoadTarget:
    """The server under load, and the model name in its requests."""

    root: str
    headers: Mapping[str, str]
    model: str


@dataclass(frozen=True)
class LoadRuns:
    """Runs each workload. `goals` are milliseconds by metric, for the goodput."""

    num_prompts: int
    warmups: int
    goals: Mapping[str, float]
    percentiles: Sequence[float]

    def measure(
        self, target: LoadTarget, loads: Sequence[Workload], prompts_of: PromptsOf, *, progress: RunProgress
    ) -> list[dict[str, Any]]:
        """A document for each workload. Every run has its own prompts, which no cache holds yet."""
        if self.warmups:
            first = replace(loads[0], rate=math.inf, max_concurrency=loads[0].max_concurrency or 1)
            run_load(target.root, target.headers, first, prompts_of(self.warmups, loads[0].seed - 1))
        runs: list[dict[str, Any]] = []
        for index, load in enumerate(loads):
            prompts = prompts_of(self.num_prompts, load.seed + index)
            with progress(f"run {index + 1} of {len(loads)}", self.num_prompts) as on_answer:
                outcome = run_load(target.root, target.headers, load, prompts, on_answer=on_answer)
            runs.append(measured(load, outcome, goals=self.goals, percentiles=self.percentiles))
        return runs


def file_prompts(path: Path, *, output_len: int) -> PromptsOf:
    """Prompts of a file; see `prompts_of_file`."""
    return lambda number, seed: prompts_of_file(path, number, output_len=output_len, seed=seed)


@contextmanager
def random_prompts(target: LoadTarget, shape: RandomPrompts, *, endpoint: str) -> Iterator[PromptsOf]:
    """Token ids of the target's vocabulary. The chat route takes no ids, so for it: text of about as many tokens."""
    import httpx2

    with httpx2.Client(base_url=target.root, headers=target.headers, timeout=60.0) as client:
        server = PromptServer(client, target.model)
        vocabulary = server.vocabulary()

        def prompts_of(number: int, seed: int) -> list[LoadPrompt]:
            prompts = shape.make(number, vocabulary, seed=seed)
            return [server.as_text(prompt) for prompt in prompts] if endpoint == CHAT else prompts

        yield prompts_of
