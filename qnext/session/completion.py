"""One prompt, computed to the end of its answer, as text with times."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qnext.errors import UsageError
from qnext.session.answer_reads import AnswerReads, ReadMarks
from qnext.session.answering import Answering
from qnext.session.talk import DEFAULT_MAX_TOKENS, drop

if TYPE_CHECKING:
    from qnext.config import ModelConfig
    from qnext.engine import Engine, FinishReason, SampledToken, SamplingParams
    from qnext.session.folder import TextFolder
    from qnext.session.prediction import DecodePrediction
    from qnext.text.stream import TextStream
    from qnext.text.thinking import TemplateRequest
    from qnext.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TimedCompletion:
    """One completion as text. Times are in seconds. The prefill ends with the first token."""

    text: str
    tokens: list[SampledToken]
    finish_reason: FinishReason | None
    prefill_seconds: float
    decode_seconds: float
    reads: AnswerReads | None  # of experts on disk
    predicted: DecodePrediction | None = None  # likewise

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first token; None when there was only one token."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None

    def describe(self, num_prompt: int) -> str:
        rate = "" if self.decode_rate is None else f", then {self.decode_rate:.1f} tokens/s"
        lines = [
            f"prompt {num_prompt} tokens at {num_prompt / self.prefill_seconds:.1f} tokens/s; "
            f"answer {len(self.tokens)} tokens{rate}; ended by {self.finish_reason}"
        ]
        if self.reads is not None and self.predicted is not None:
            lines.append(self.predicted.beside(self.decode_rate, self.reads.decode.reads.hit_ratio))
        if self.reads is not None:
            lines.append(self.reads.describe())
        return "\n".join(lines)


def complete(
    engine: Engine,
    prompt_ids: list[int],
    params: SamplingParams,
    stream: TextStream,
    *,
    predicted: DecodePrediction | None = None,
    write: Callable[[str], None] = drop,
) -> TimedCompletion:
    """Run one prompt to its end. `write` gets the text piece by piece. A stop string ends it with the finish reason
    "stop". What was `predicted` is told beside what is measured."""
    answer = Answering(stream)
    marks = ReadMarks(engine)
    started = first = last = time.perf_counter()
    with closing(engine.stream(prompt_ids, params)) as events:
        for event in events:
            last = time.perf_counter()
            if not answer.tokens:
                first = last
                marks.mark_first_token()
            if text := answer.take(event):
                write(text)
            if answer.finish_reason is not None:
                break
    marks.mark_end()
    prefill_seconds, decode_seconds = first - started, last - first
    reads = marks.reads(
        num_prompt=len(prompt_ids),
        num_decoded=len(answer.tokens) - 1,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
    )
    return TimedCompletion(
        answer.text, answer.tokens, answer.finish_reason, prefill_seconds, decode_seconds, reads, predicted
    )


def encode_prompt(folder: TextFolder, text: str, *, asked: TemplateRequest | None, special: bool) -> list[int]:
    """Token ids of a prompt. Where `asked` is None the text is completed, otherwise it is a user's message.

    Raises UsageError for an empty text.
    """
    if not text:
        raise UsageError("the prompt is empty")
    if asked is None:
        return folder.tokenizer.encode(text, allow_special=special)
    from qnext.text.chat import ChatFormat
    from qnext.text.messages import Message
    from qnext.text.prompts import ChatPrompt

    chat_format = ChatFormat.for_folder(folder.path, tokenizer=folder.tokenizer)
    return ChatPrompt([Message("user", text)], asked).encode(chat_format, folder.tokenizer).token_ids


def fit_to_context(config: ModelConfig, num_prompt: int, params: SamplingParams) -> SamplingParams:
    """The parameters with max_tokens set. Raises an error for a prompt beyond the context, before any weights are
    read."""
    from qnext.engine.policy.request import output_allowance

    room = output_allowance(num_prompt, params, max_model_len=config.context_length)
    return params if params.max_tokens is not None else replace(params, max_tokens=min(room, DEFAULT_MAX_TOKENS))


def completion_document(
    answer: TimedCompletion, prompt_ids: list[int], params: SamplingParams, tokenizer: Tokenizer
) -> dict[str, Any]:
    """A JSON document for programs: text, tokens, times, and log-probabilities where they were asked for."""
    document: dict[str, Any] = {
        "text": answer.text,
        "token_ids": [token.token_id for token in answer.tokens],
        "finish_reason": answer.finish_reason,
        "seed": params.seed,
        "usage": {"prompt_tokens": len(prompt_ids), "completion_tokens": len(answer.tokens)},
        "timings": {
            "prefill_seconds": answer.prefill_seconds,
            "prefill_tokens_per_second": len(prompt_ids) / answer.prefill_seconds,
            "decode_seconds": answer.decode_seconds,
            "decode_tokens_per_second": answer.decode_rate,
        },
    }
    if params.watermark is not None:
        document["watermark"] = params.watermark.name
    if answer.reads is not None:
        document["timings"]["experts"] = answer.reads.document()
    if answer.predicted is not None:
        document["timings"]["predicted"] = answer.predicted.document()
    if params.logprobs is not None:
        document["logprobs"] = [
            {
                "token_id": token.token_id,
                "text": tokenizer.decode([token.token_id]),
                "logprob": token.logprob,
                "top": [
                    {"token_id": token_id, "text": tokenizer.decode([token_id]), "logprob": value}
                    for token_id, value in token.top_logprobs
                ],
            }
            for token in answer.tokens
        ]
    return document
