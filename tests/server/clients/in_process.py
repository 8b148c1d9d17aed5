"""lm-evaluation-harness's three verbs on a model in this process, without engine and server: what HTTP must equal.

Imported inside tests only: the harness takes seconds to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from qnext.checkpoint import load_model
from qnext.model import Batch
from qnext.text.tokenizer import Tokenizer


class InProcess(TemplateLM):
    """One forward pass of the whole text for every score and every token."""

    def __init__(self, folder: Path, *, max_length: int) -> None:
        super().__init__()
        self.model = load_model(folder)
        self.own = Tokenizer.from_folder(folder)
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return min(self.own.eos_ids)

    def tok_encode(self, string: str, **more: Any) -> list[int]:
        return self.own.encode(string, allow_special=True)  # as the harness's own tokenizers do

    def log_probs(self, ids: list[int]) -> Tensor:
        """[len(ids), vocabulary]: of the token that follows each."""
        with torch.no_grad():
            batch = Batch.from_lengths(torch.tensor(ids), [len(ids)])
            return self.model.logits(self.model(batch).hidden_TD).double().log_softmax(-1)

    def _loglikelihood_tokens(self, requests: Any, **more: Any) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-self.max_length :]
            scores = self.log_probs(ids)[-len(continuation) - 1 : -1]
            chosen = scores.gather(1, torch.tensor(continuation)[:, None])
            found.append((float(chosen.sum()), bool((scores.argmax(-1) == torch.tensor(continuation)).all())))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pieces = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pieces)))
        return found

    def greedy(self, ids: list[int], num_tokens: int) -> list[int]:
        """The likeliest continuation, without the token that ends it."""
        found: list[int] = []
        while len(found) < num_tokens:
            token = int(self.log_probs([*ids, *found])[-1].argmax())
            if token in self.model.config.eos_token_ids:
                break
            found.append(token)
        return found

    def answer(self, ids: list[int], *, until: list[str], num_tokens: int) -> str:
        text = self.own.decode(self.greedy(ids, num_tokens), skip_special=True)
        return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [
            self.answer(self.tok_encode(text), until=options["until"], num_tokens=options["max_gen_toks"])
            for text, options in (request.args for request in requests)
        ]
