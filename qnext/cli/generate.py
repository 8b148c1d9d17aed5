"""`qnext generate`: complete one prompt."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli import _sampling as options
from qnext.cli._text_model import TextFolder, end_token_ids, load_weights, open_folder, write_text
from qnext.cli._types import Strict
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.config import ModelConfig
    from qnext.engine import Engine, FinishReason, SampledToken, SamplingParams
    from qnext.text.stream import TextStream
    from qnext.text.thinking import TemplateRequest
    from qnext.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256
_Special = Annotated[
    bool | None,
    typer.Option(
        "--special/--no-special",
        help="Names such as <|im_start|> in PROMPT are control tokens; in --chat they never are.",
    ),
]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to complete; - reads standard input.")],
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", metavar="N", help="With --json: log-probabilities, N alternatives.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is a user's message in the model's chat format.")
    ] = False,
    think: options.Think = None,
    chat_template_kwargs: options.TemplateArguments = None,
    special: _Special = None,
    yarn: options.Yarn = None,
    speculation: options.Speculation = None,
    dtype: options.DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
    strict: Strict = False,
) -> None:
    """Complete PROMPT: text on stdout as it comes, memory plan and speed on stderr.

    An explicit flag counts first, then generation_config.json of the model, then greedy. Without --max-tokens the
    answer has at most 256 tokens, or what the context leaves.
    """
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json")
    asked = _asked(chat=chat, special=special, think=think, arguments=chat_template_kwargs)
    folder = open_folder(model, yarn=yarn)
    params = options.resolve_sampling(
        folder.path,
        {
            "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty, "seed": seed, "ignore_eos": ignore_eos, "logprobs": logprobs,
        },
    )  # fmt: skip
    text = _read_input() if prompt == "-" else prompt
    prompt_ids = _encode(folder, text, asked=asked, special=special is not False)
    params = _fit(folder.config, len(prompt_ids), params)
    if params.seed is None:
        # Drawn here so that --json can name it and the answer can be had again.
        params = replace(params, seed=secrets.randbits(32))
    from qnext.engine import Engine, check_options
    from qnext.text.stream import TextStream

    stream = TextStream(folder.tokenizer, stop=stop or ())
    check_options(folder.config, speculation=speculation)
    network = load_weights(folder, dtype)
    assert params.max_tokens is not None
    engine = Engine(
        network, max_num_seqs=1, max_model_len=len(prompt_ids) + params.max_tokens, prefix_cache=False,
        speculation=speculation, eos_token_ids=end_token_ids(folder.tokenizer, folder.config),
    )  # fmt: skip
    print(engine.memory_plan.describe(), file=sys.stderr)
    answer = complete(engine, prompt_ids, params, stream, write=None if as_json else write_text)
    if as_json:
        print(json.dumps(_document(answer, prompt_ids, params, folder.tokenizer), ensure_ascii=False))
    elif not answer.text.endswith("\n"):
        write_text("\n")
    print(answer.describe(len(prompt_ids)), file=sys.stderr)


@dataclass
class Answer:
    """One completion as text. Times in seconds; the prefill ends with the first token."""

    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first token; None when there was only one."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None

    def describe(self, num_prompt: int) -> str:
        rate = "" if self.decode_rate is None else f", then {self.decode_rate:.1f} tokens/s"
        return (
            f"prompt {num_prompt} tokens at {num_prompt / self.prefill_seconds:.1f} tokens/s; "
            f"answer {len(self.tokens)} tokens{rate}; ended by {self.finish_reason}"
        )


def complete(
    engine: Engine, prompt_ids: list[int], params: SamplingParams, stream: TextStream, *, write: Any = None
) -> Answer:
    """Run one prompt to its end; `write` gets the text piece by piece. A stop string ends it with reason "stop"."""
    answer = Answer()

    def emit(text: str) -> None:
        answer.text += text
        if write is not None and text:
            write(text)

    started = first = last = time.perf_counter()
    with closing(engine.stream(prompt_ids, params)) as events:
        for event in events:
            last = time.perf_counter()
            if not answer.tokens:
                first = last
            answer.tokens.append(event.token)
            answer.finish_reason = event.finish_reason
            if event.finish_reason != "stop":
                emit(stream.push(event.token.token_id))
            if stream.stop_string is not None:
                answer.finish_reason = "stop"
                break
    emit(stream.finish())
    answer.prefill_seconds, answer.decode_seconds = first - started, last - first
    return answer


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text: {error}") from None


def _asked(
    *, chat: bool, special: bool | None, think: bool | None, arguments: Mapping[str, Any] | None
) -> TemplateRequest | None:
    """What the flags say to the chat template; None without --chat. Raises UsageError for those that contradict."""
    if chat and special:
        raise UsageError("--chat writes the control tokens itself; --special contradicts it")
    if chat:
        return options.template_request(arguments, think)
    if think is not None or arguments is not None:
        raise UsageError("--think, --no-think and --chat-template-kwargs belong to --chat")
    return None


def _encode(folder: TextFolder, text: str, *, asked: TemplateRequest | None, special: bool) -> list[int]:
    """`asked` None completes the text; else it is a user's message."""
    if not text:
        raise UsageError("the prompt is empty")
    if asked is None:
        return folder.tokenizer.encode(text, allow_special=special)
    from qnext.text.chat import ChatFormat
    from qnext.text.messages import Message
    from qnext.text.thinking import prompt_pieces

    chat_format = ChatFormat.for_folder(folder.path, tokenizer=folder.tokenizer)
    pieces, _ = prompt_pieces(chat_format, [Message("user", text)], asked)
    return folder.tokenizer.encode_pieces(pieces)


def _fit(config: ModelConfig, num_prompt: int, params: SamplingParams) -> SamplingParams:
    """The parameters with max_tokens set; refuses what exceeds the context before any weights are read."""
    from qnext.engine.request import output_allowance

    room = output_allowance(num_prompt, params, max_model_len=config.context_length)
    return params if params.max_tokens is not None else replace(params, max_tokens=min(room, DEFAULT_MAX_TOKENS))


def _document(answer: Answer, prompt_ids: list[int], params: SamplingParams, tokenizer: Tokenizer) -> dict[str, Any]:
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
