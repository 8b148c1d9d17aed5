"""POST /v1/completions, with echo and log-probabilities as evaluation tools read them."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from qnext.engine.policy.request import SampledToken
from qnext.server.body.strict import KEEPS_UNKNOWN, Logprobs, SamplingBody, TokenCount
from qnext.server.errors import ApiError, error_object
from qnext.server.exchange import Exchange
from qnext.server.inference.generation import Generation, TokenPrompt, Update
from qnext.server.limits import MAX_PROMPTS
from qnext.server.long_json import LongList
from qnext.server.routes import EventStream, HttpResponse
from qnext.server.surfaces.answers import (
    AnswerReader,
    finite_logprob,
    prompt_logprobs,
    timings,
    token_name,
    usage_counts,
)
from qnext.server.surfaces.held import ReadAnswer, held, judged_texts
from qnext.server.surfaces.openai.chat import usage
from qnext.server.surfaces.openai.chat_bodies import ChatFormatBody
from qnext.server.surfaces.sampling import AnswerOptions, sampling_params, stop_strings, structured_constraint
from qnext.server.surfaces.source import Source, open_source
from qnext.server.surfaces.writing import Event, Later, answered, data_frames
from qnext.text.output import Content, OutputEvent, Reasoning
from qnext.text.tokenizer import IncrementalDecoder

DEFAULT_MAX_TOKENS = 16  # OpenAI's
# Tokens of a prompt in one chunk of a stream.
_ECHOED = 4_096
_ECHOED_WITH_LOGPROBS = 32

PromptText = str
PromptTokens = Annotated[list[int], Field(fail_fast=True)]


class CompletionBody(SamplingBody):
    """The body of a completion: a text, token ids, or a list of either."""

    model_config = KEEPS_UNKNOWN

    prompt: (
        PromptText
        | PromptTokens
        | Annotated[list[PromptText], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[PromptTokens], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    suffix: str | None = None
    max_tokens: TokenCount | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None
    response_format: ChatFormatBody | None = None
    add_special_tokens: bool | None = None  # without effect: the family has none to add
    parse_special: bool | None = None  # false: names of control tokens in a text prompt are text, as beside a suffix


async def completions(exchange: Exchange) -> HttpResponse | EventStream:
    body: CompletionBody = exchange.body
    exchange.server.check_model(exchange, body.model)
    if body.response_format is not None and body.response_format.type != "text":
        raise ApiError.bad("response_format needs /v1/chat/completions", param="response_format")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError.bad("max_tokens 0 needs echo", param="max_tokens")
    if body.suffix and body.echo:
        raise ApiError.bad("suffix excludes echo", param="suffix")
    prompts = await _prompts(exchange, body)
    most = exchange.server.limits.max_queued_per_key
    if len(prompts) * (body.n or 1) > most:
        raise ApiError.bad(f"prompts times n must be at most {most}", param="n")
    constraint = structured_constraint(body)
    compiled = None
    if constraint is not None:
        compiled = await exchange.server.compiled(constraint[0], param=constraint[1], owner=exchange.owner)
    options = AnswerOptions(
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo and body.logprobs is not None else body.prompt_logprobs,
        param="prompt",
    )
    params = [sampling_params(exchange, body, len(ids), options) for ids in prompts]
    guides = [None if compiled is None else compiled.new_state() for _ in prompts]
    stop = stop_strings(body)
    readers = [AnswerReader(exchange.server.served, stop=stop) for _ in range((body.n or 1) * len(prompts))]
    inputs = list(map(TokenPrompt, prompts, params, guides))
    answers, source = held(exchange, readers, open_source(exchange, inputs, salt=body.cache_salt))
    writer = CompletionWriter(exchange, body, prompts, answers)
    return await answered(exchange, source, writer, streams=bool(body.stream))


async def _prompts(exchange: Exchange, body: CompletionBody) -> list[list[int]]:
    served = exchange.server.served
    prompt = body.prompt
    if not prompt:
        raise ApiError.bad("the prompt is empty", param="prompt")
    many: Sequence[str | int | list[int]] = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(many[0], int):
        many = [many]  # type: ignore[list-item]
    found: list[list[int]] = []
    for entry in await _judged(exchange, many, body):
        if isinstance(entry, str):
            ids = await served.encode(entry, asker=exchange.asker, allow_special=_parses_marks(body))
        else:
            ids = list(entry)  # type: ignore[arg-type]
            if len(ids) > served.max_model_len:
                raise ApiError.too_long(len(ids), served.max_model_len - 1, param="prompt")
            await exchange.aside(functools.partial(served.check_ids, ids, param="prompt"))
        if body.suffix:
            ids = await _around_hole(exchange, ids, body)
        if not ids:
            raise ApiError.bad("the prompt is empty", param="prompt")
        found.append(ids)
    return found


async def _judged(
    exchange: Exchange, many: Sequence[str | int | list[int]], body: CompletionBody
) -> Sequence[str | int | list[int]]:
    """The prompts as the moderation lets them through: ids that it changes come back as text. Beside a suffix it is
    told that too, and may refuse it, but not change it."""
    if exchange.server.moderator is None:
        return many
    tokenizer = exchange.server.served.tokenizer
    texts = [each if isinstance(each, str) else tokenizer.decode(each) for each in many]  # type: ignore[arg-type]
    suffixes = [body.suffix] if body.suffix else []
    kinds = ["prompt"] * len(texts) + ["suffix"] * len(suffixes)
    judged = await judged_texts(exchange, [*texts, *suffixes], kinds, param="prompt")
    if list(judged[len(texts) :]) != suffixes:
        raise ApiError.bad(
            "the suffix is refused by the moderation of this server", param="suffix", code="content_filter"
        )
    return [old if old_text == new else new for old, old_text, new in zip(many, texts, judged, strict=False)]


def _parses_marks(body: CompletionBody) -> bool:
    """Whether names of control tokens in a text become these tokens. Beside a suffix only the server sets marks."""
    return body.parse_special if body.parse_special is not None else not body.suffix


async def _around_hole(exchange: Exchange, ids: list[int], body: CompletionBody) -> list[int]:
    served = exchange.server.served
    marks = served.fill_in_middle()
    if marks is None:
        raise ApiError.bad("this model cannot fill in text before a suffix", param="suffix")
    suffix = await served.encode(
        body.suffix or "", asker=exchange.asker, param="suffix", allow_special=_parses_marks(body)
    )
    return [marks[0], *ids, marks[1], *suffix, marks[2]]


class CompletionWriter:
    """The completions of one request: `n` of each prompt. Answer a of prompt p is choice `p * n + a`."""

    def __init__(
        self, exchange: Exchange, body: CompletionBody, prompts: list[list[int]], answers: list[ReadAnswer]
    ) -> None:
        self.exchange = exchange
        self.body = body
        self.prompts = prompts
        self.n = body.n or 1
        self.answers = answers
        self.generations: Mapping[int, Generation] = {}  # by prompt
        self._texts = [""] * len(self.answers)  # of whole completions
        self._offsets = [0] * len(self.answers)  # characters of each choice whose log-probabilities are written
        self._num_logged = [0] * len(self.answers)
        self._begun: set[int] = set()
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())

    frames = staticmethod(data_frames)

    def document(self) -> dict[str, Any]:
        choices = [self._choice(index, text) for index, text in enumerate(self._texts)]
        document = {**self._head(), "choices": choices, "usage": self._usage()}
        if self.body.timings:
            document["timings"] = timings(self._generation(0).requests[0])
        return document

    def begin(self, source: Source) -> list[Event]:
        self.generations = source.of_prompts
        return []

    def take(self, update: Update, source: Source) -> list[Event | Later]:
        choice = update.index
        answer = self.answers[choice]
        if answer.end_reason is not None:
            return []
        text = _text(answer.take(update, source))
        if not self.body.stream:
            self._texts[choice] += text
            return []
        chunks: list[Event | Later] = []
        if choice not in self._begun:
            self._begun.add(choice)
            if self.body.echo:
                chunks += self._echo_chunks(choice)
        tokens = answer.tokens[self._num_logged[choice] :]
        self._num_logged[choice] += len(tokens)
        if self.body.max_tokens == 0:  # the token that the engine makes nevertheless
            text, tokens = "", []
        if text or tokens or answer.end_reason is not None:
            chunks.append(self._chunk(choice, text, tokens, self._end_reason(choice)))
        return chunks

    def ping(self) -> Event:
        open_choices = (index for index, answer in enumerate(self.answers) if answer.end_reason is None)
        return self._chunk(next(open_choices, 0), "", [], None, has_logprobs=False)

    def end(self, source: Source) -> list[Event]:
        self.exchange.outcome.finish_reason = self.answers[0].end_reason
        document: dict[str, Any] = {**self._head(), "choices": []}
        if self._has_usage:
            document["usage"] = self._usage()
        if self.body.timings:
            document["timings"] = timings(self._generation(0).requests[0])
        return [document] if self._has_usage or self.body.timings else []

    def fail(self, error: ApiError) -> list[Event]:
        return [error_object(error, "openai")]

    def _end_reason(self, choice: int) -> str | None:
        reason = self.answers[choice].end_reason
        return "length" if reason is not None and self.body.max_tokens == 0 else reason

    def _generation(self, number: int) -> Generation:
        return self.generations[number]

    def _head(self) -> dict[str, Any]:
        name, fingerprint = self.exchange.model_name, self.exchange.system_fingerprint
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": name}
        return head if fingerprint is None else {**head, "system_fingerprint": fingerprint}

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        number = index // self.n
        answer = self.answers[index]
        ids = self.prompts[number]
        tokens = [] if self.body.max_tokens == 0 else answer.tokens
        written = "" if self.body.max_tokens == 0 else text
        if self.body.echo:
            written = self.exchange.server.served.tokenizer.decode(ids) + written
            tokens = [*self._prompt_tokens(number), *tokens]
        choice: dict[str, Any] = {
            "index": index,
            "text": written,
            "logprobs": None if self.body.logprobs is None else self._logprobs(tokens, index),
            "finish_reason": self._end_reason(index),
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self.exchange.server.served, self._prompt_tokens(number))
        if self.body.return_token_ids:
            choice["token_ids"] = LongList.of_values(self._generation(number).requests[index % self.n].output_ids)
            choice["prompt_token_ids"] = LongList.of_values(ids)
        return choice

    def _prompt_tokens(self, number: int) -> list[SampledToken]:
        found = self._generation(number).requests[0].prompt_sampled
        return list(found) if found else [SampledToken(token) for token in self.prompts[number]]

    def _logprobs(self, tokens: Sequence[SampledToken], choice: int) -> dict[str, Any]:
        """Of the next tokens of a choice; their offsets continue those of the tokens before."""
        served = self.exchange.server.served

        def names(begin: int, end: int) -> list[str]:
            return [self._token_name(token.token_id) for token in tokens[begin:end]]

        def values(begin: int, end: int) -> list[float | None]:
            return [finite_logprob(token.logprob) for token in tokens[begin:end]]

        def tops(begin: int, end: int) -> list[dict[str, float] | None]:
            return [self._alternatives(token) for token in tokens[begin:end]]

        def offsets(begin: int, end: int) -> list[int]:
            found: list[int] = []
            for token in tokens[begin:end]:
                found.append(self._offsets[choice])
                self._offsets[choice] += len(served.token_bytes(token.token_id).decode("utf-8", "ignore"))
            return found

        count = len(tokens)
        return {
            "tokens": LongList(count, names),
            "token_logprobs": LongList(count, values),
            "top_logprobs": LongList(count, tops, width=2 * (self.body.logprobs or 0) + 2),
            "text_offset": LongList(count, offsets),
        }

    def _alternatives(self, token: SampledToken) -> dict[str, float] | None:
        """Log-probabilities by name, with the token itself; of two with one name the higher. None for a first token."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for token_id, value in (*token.top_logprobs, (token.token_id, token.logprob)):
            name = self._token_name(token_id)
            found[name] = max(found.get(name, -float("inf")), finite_logprob(value) or 0.0)
        return found

    def _token_name(self, token_id: int) -> str:
        as_id = bool(self.body.return_tokens_as_token_ids)
        return token_name(self.exchange.server.served, token_id, as_id=as_id)

    def _echo_chunks(self, choice: int) -> list[Event | Later]:
        """The prompt, a long one in several chunks, each made when it is sent."""
        ids = self.prompts[choice // self.n]
        tokens = self._prompt_tokens(choice // self.n)
        decoder = IncrementalDecoder(self.exchange.server.served.tokenizer)
        step = _ECHOED if self.body.logprobs is None else _ECHOED_WITH_LOGPROBS

        def some(begin: int) -> Event:
            text = "".join(map(decoder.push, ids[begin : begin + step]))
            text += decoder.flush() if begin + step >= len(ids) else ""
            return self._chunk(choice, text, tokens[begin : begin + step], None)

        return [functools.partial(some, begin) for begin in range(0, len(ids), step)]

    def _chunk(
        self,
        choice: int,
        text: str,
        tokens: Sequence[SampledToken],
        end_reason: str | None,
        *,
        has_logprobs: bool = True,
    ) -> Event:
        logprobs = self._logprobs(tokens, choice) if has_logprobs and self.body.logprobs is not None else None
        entry = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": end_reason}
        document: dict[str, Any] = {**self._head(), "choices": [entry]}
        if self._has_usage:
            options = self.body.stream_options
            document["usage"] = self._usage() if options is not None and options.is_continuous else None
        return document

    @property
    def _has_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _usage(self) -> dict[str, Any]:
        totals = [0, 0, 0, 0]
        for number in sorted(self.generations):
            answers = self.answers[number * self.n : (number + 1) * self.n]
            counts = usage_counts(self._generation(number), answers)
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
        if self.body.max_tokens == 0:
            totals[2] = 0
        return usage(*totals)


def _text(events: Sequence[OutputEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, (Content, Reasoning)))
