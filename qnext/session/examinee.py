"""A loaded model as `qnext.eval` asks it: greedy answers to token ids, and how likely a continuation is."""

from __future__ import annotations

from collections.abc import Sequence

from qnext.engine import SamplingParams
from qnext.session.llm import LLM
from qnext.text.messages import Message
from qnext.text.prompts import ChatPrompt
from qnext.text.thinking import TemplateRequest


class LocalExaminee:
    """`thinks` says whether answers in a chat begin with a thought, where the model allows the choice."""

    def __init__(self, llm: LLM, *, thinks: bool | None = None) -> None:
        self._llm, self._thinks = llm, thinks

    @property
    def max_length(self) -> int:
        return self._llm.engine.max_model_len

    def encode(self, text: str) -> list[int]:
        return self._llm.tokenize(text, allow_special=False)

    def encode_chat(self, text: str) -> list[int]:
        prompt = ChatPrompt([Message("user", text)], TemplateRequest({}, self._thinks))
        return prompt.encode(self._llm.chat_format, self._llm.tokenizer).token_ids

    def complete(self, prompts: Sequence[list[int]], *, max_tokens: int) -> list[str]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        return [generated.text for generated in self._llm.generate(list(prompts), params)]

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        completions = self._llm.engine.generate([[*before, *after] for before, after in pairs], params)
        return [
            sum(token.logprob or 0.0 for token in completion.prompt_sampled[len(before) :])
            for completion, (before, _) in zip(completions, pairs, strict=True)
        ]
