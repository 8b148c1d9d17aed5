"""What lm-evaluation-harness asks of a model, answered by qnext's engine: log-likelihoods, whole texts, and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qnext.engine import SamplingParams
from qnext.harness.pairs import KeepsContinuations
from qnext.session.llm import LLM
from qnext.text.messages import message_from_dict
from qnext.text.prompts import ChatPrompt
from qnext.text.thinking import TemplateRequest

_DEFAULT_TOKENS = 256  # of an answer whose task sets no limit, as the harness has it
_CHUNK = 64  # requests that are in the engine at a time
_THOUGHT_END = "</think>"
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class HarnessModel(KeepsContinuations, TemplateLM):
    """An `LLM` as a model of the harness. What stands before the end of a thought is no part of an answer.

    `thinks` says whether answers in a chat begin with a thought, where the model allows the choice.
    """

    def __init__(self, llm: LLM, *, thinks: bool | None = None) -> None:
        super().__init__()
        self._llm, self._thinks = llm, thinks

    @property
    def max_length(self) -> int:
        """Tokens of a text that is scored; one more is the engine's."""
        return self._llm.engine.max_model_len - 1

    @property
    def eot_token_id(self) -> int:
        return min(self._llm.tokenizer.eos_ids)

    @property
    def tokenizer_name(self) -> str:
        return self._llm.path.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Names of control tokens count, as with the harness's own tokenizers. The family has no token of beginning."""
        return self._llm.tokenize(string)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness keeps beside results: the name of the format."""
        return self._llm.chat_format.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without a prompt of generation the last message is the beginning of the answer."""
        prompt = ChatPrompt(
            [message_from_dict(turn) for turn in chat_history],
            TemplateRequest({}, self._thinks),
            continues=not add_generation_prompt,
        )
        pieces, _ = prompt.pieces(self._llm.chat_format, self._llm.tokenizer)
        return "".join(piece.text for piece in pieces)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for some in _chunks(requests):
            texts = [[*context, *continuation][-self.max_length :] for _, context, continuation in some]
            completions = self._llm.engine.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=1))
            for (key, _, continuation), completion in zip(some, completions, strict=True):
                tokens = completion.prompt_sampled[-len(continuation) :]
                is_greedy = all(token.token_id == token.top_logprobs[0][0] for token in tokens)
                found.append((sum(token.logprob or 0.0 for token in tokens), is_greedy))
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pieces = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pieces)))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests with equal options run side by side."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for indices in groups.values():
            options = requests[indices[0]].args[1]
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
            for some in _chunks(indices):
                prompts, params = self._prompts([requests[index].args[0] for index in some], options)
                # A stop in a thought ends nothing: the text is cut behind the thought.
                generated = self._llm.generate(prompts, params, stop=() if self._may_think else stops)
                for index, each in zip(some, generated, strict=True):
                    answers[index] = _cut(each.text, stops)
                    self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    @property
    def _may_think(self) -> bool:
        return _THOUGHT_END in self._llm.tokenizer.reserved_ids and self._thinks is not False

    def _prompts(
        self, texts: Sequence[str], options: dict[str, Any]
    ) -> tuple[list[Sequence[int] | str], list[SamplingParams]]:
        """The ends of prompts that are too long, and their sampling, each with a seed of its own."""
        limit = next((options[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in options), None)
        max_tokens = min(int(limit or _DEFAULT_TOKENS), self.max_length - 1)
        is_sampled = options.get("do_sample", options.get("temperature", 0.0) > 0)
        chosen = {name: options[name] for name in _SAMPLING if is_sampled and name in options}
        temperature = float(options.get("temperature", 1.0)) if is_sampled else 0.0
        prompts: list[Sequence[int] | str] = [
            self.tok_encode(text)[-(self.max_length - max_tokens) :] for text in texts
        ]
        params = [
            SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=number, **chosen)
            for number in range(len(texts))
        ]
        return prompts, params


def _cut(text: str, stops: Sequence[str]) -> str:
    _, end, said = text.rpartition(_THOUGHT_END)
    said = said.lstrip() if end else said
    return said[: min((place for stop in stops if (place := said.find(stop)) >= 0), default=len(said))]


def _chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]
