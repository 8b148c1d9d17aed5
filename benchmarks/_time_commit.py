"""Times one commit for check_same_speed.py, in its interpreter: jobs come in on lines, their seconds go out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import qnext.engine
from qnext.checkpoint import load_model
from qnext.config import preset
from qnext.engine import Engine, SamplingParams
from qnext.model import Batch, CausalLM, initialize

PROMPT_TOKENS, NUM_TOKENS = 32, 32
TRAINED, SEQUENCE_TOKENS = "nano-5m", 512


def make_engine(model: CausalLM) -> Any:
    """Without drafts, whose number depends on measured times. Older commits take options as keywords."""
    options = {"max_num_seqs": 16, "max_model_len": 1_024, "speculation": False}
    if hasattr(Engine, "of"):
        return Engine.of(model, qnext.engine.EngineConfig(**options))
    return Engine(model, **options)


class Jobs:
    def __init__(self, folder: str) -> None:
        self._engine = make_engine(load_model(folder))
        self._vocab_size = preset(TRAINED).vocab_size
        self._generator = torch.Generator().manual_seed(0)
        self._train: Callable[[], None] | None = None

    def decode(self) -> None:
        """One stream."""
        self._generate(1, PROMPT_TOKENS, 2 * NUM_TOKENS)

    def prefill(self) -> None:
        self._generate(1, 512, 1)

    def streams(self) -> None:
        """Sixteen."""
        self._generate(16, PROMPT_TOKENS, NUM_TOKENS)

    def train(self) -> None:
        """Forward, cross entropy, backward and AdamW of the smallest preset."""
        if self._train is None:
            self._train = self._training_step()
        self._train()

    def _generate(self, num_streams: int, num_prompt: int, num_tokens: int) -> None:
        prompts = [self._tokens(num_prompt).tolist() for _ in range(num_streams)]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self._engine.generate(prompts, params)

    def _tokens(self, count: int) -> torch.Tensor:
        return torch.randint(0, self._vocab_size, (count,), generator=self._generator)

    def _training_step(self) -> Callable[[], None]:
        model = CausalLM(preset(TRAINED).with_(num_nextn_predict_layers=0))
        initialize(model, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        batch = Batch.from_lengths(self._tokens(4 * SEQUENCE_TOKENS), [SEQUENCE_TOKENS] * 4)
        labels = self._tokens(4 * SEQUENCE_TOKENS)

        def step() -> None:
            logits_TY = model.lm_head(model(batch).hidden_TD)
            torch.nn.functional.cross_entropy(logits_TY, labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


def main() -> None:
    jobs = Jobs(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        job = getattr(jobs, line.strip())
        began = time.perf_counter()
        job()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
