"""POST /v1/completions, with echo and log-probabilities as evaluation tools read them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import orjson
from pydantic import Field

from qnext.engine.params import SamplingParams
from qnext.engine.request import Guide, SampledToken
from qnext.engine.sampling.grammar import CompiledGrammar
from qnext.server.answers import Answer, finite_logprob, timings, usage_counts
from qnext.server.bodies import SamplingBody
from qnext.server.errors import ApiError, error_body
from qnext.server.exchange import Exchange
from qnext.server.generation import Generation, Update
from qnext.server.limits import MAX_LOGPROBS, MAX_PROMPTS
from qnext.server.openai.chat import DONE, PING, FormatBody, usage
from qnext.server.routes import EventStream, Reply
from qnext.server.sampling import sampling_params, stop_strings, structured_constraint
from qnext.text.output import Content, OutputEvent, Reasoning

DEFAULT_MAX_TOKENS = 16  # OpenAI's

PromptText = str
PromptTokens = Annotated[list[int], Field(fail_fast=True)]


class CompletionBody(SamplingBody):
    """The body of a completion: a text, token ids, or a list of either."""

    prompt: (
        PromptText
        | PromptTokens
        | Annotated[list[PromptText], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[PromptTokens], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: FormatBody | None = None
    add_special_tokens: bool | None = None  # without effect: the family has none to add
    parse_special: bool | None = None  # false: names of control tokens in a text prompt are text, as beside a suffix


async def completions(exchange: Exchange) -> Reply | EventStream:
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
    compiled = await exchange.server.compiled(constraint[0], param=constraint[1]) if constraint else None
    params = [
        sampling_params(
            body, exchange.server.served, exchange.server.limits, num_prompt=len(ids),
            max_tokens=1 if body.max_tokens == 0 else body.max_tokens, default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo and body.logprobs is not None else body.prompt_logprobs,
        )
        for ids in prompts
    ]  # fmt: skip
    run = _Run(exchange, body, prompts, params, compiled)
    if body.stream:
        exchange.outcome.stream = True
        return EventStream(run.stream())
    return await run.whole()


async def _prompts(exchange: Exchange, body: CompletionBody) -> list[list[int]]:
    served = exchange.server.served
    prompt = body.prompt
    if not prompt:
        raise ApiError.bad("the prompt is empty", param="prompt")
    many: Sequence[str | int | list[int]] = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(many[0], int):
        many = [many]  # type: ignore[list-item]
    found: list[list[int]] = []
    for entry in many:
        if isinstance(entry, str):
            ids = await served.encode(entry, allow_special=_parses_marks(body))
        else:
            ids = list(entry)  # type: ignore[arg-type]
            if len(ids) > served.max_model_len:
                _refuse_length(len(ids), served.max_model_len)
            served.check_ids(ids, param="prompt")
        if body.suffix:
            ids = await _around_hole(exchange, ids, body)
        if not ids:
            raise ApiError.bad("the prompt is empty", param="prompt")
        found.append(ids)
    return found


def _refuse_length(num_tokens: int, limit: int) -> None:
    raise ApiError.bad(
        f"the prompt has {num_tokens} tokens, but the context holds {limit}", param="prompt",
        code="context_length_exceeded",
    )  # fmt: skip


def _parses_marks(body: CompletionBody) -> bool:
    """Whether names of control tokens in a text are these tokens. Beside a suffix the marks are the server's to set."""
    return body.parse_special if body.parse_special is not None else not body.suffix


async def _around_hole(exchange: Exchange, ids: list[int], body: CompletionBody) -> list[int]:
    served = exchange.server.served
    marks = served.fill_in_middle()
    if marks is None:
        raise ApiError.bad("this model cannot fill in text before a suffix", param="suffix")
    suffix = await served.encode(body.suffix or "", param="suffix", allow_special=_parses_marks(body))
    return [marks[0], *ids, marks[1], *suffix, marks[2]]


class _Run:
    """The completions of one request: `n` of each prompt, choice `prompt * n + answer`."""

    def __init__(
        self,
        exchange: Exchange,
        body: CompletionBody,
        prompts: list[list[int]],
        params: list[SamplingParams],
        compiled: CompiledGrammar | None,
    ) -> None:
        self.exchange = exchange
        self.body = body
        self.prompts = prompts
        self.params = params
        self.compiled = compiled
        self.n = body.n or 1
        stop = stop_strings(body)
        self.answers = [Answer(exchange.server.served, stop=stop) for _ in range(self.n * len(prompts))]
        self.generations: list[Generation | None] = [None] * len(prompts)
        self._offsets = [0] * len(self.answers)  # characters of each choice whose log-probabilities are written
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())

    async def whole(self) -> Reply:
        texts = [""] * len(self.answers)
        async with self._running() as incoming:
            async for number, updates in incoming:
                for choice, events in self._take(number, updates):
                    texts[choice] += _text(events)
        choices = [self._choice(index, text) for index, text in enumerate(texts)]
        document = {**self._head(), "choices": choices, "usage": self._usage()}
        if self.body.timings:
            document["timings"] = timings(self._generation(0).requests[0])
        self.exchange.outcome.finish_reason = self.answers[0].end_reason
        return Reply.of(document)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        logged = [0] * len(self.answers)
        begun: set[int] = set()
        try:
            async with self._running() as incoming:
                async for number, updates in incoming:
                    frames: list[bytes] = []
                    for choice, events in self._take(number, updates):
                        text = _text(events)
                        answer = self.answers[choice]
                        if choice not in begun:
                            begun.add(choice)
                            if self.body.echo:
                                frames.append(self._echo_frame(choice))
                        tokens = answer.tokens[logged[choice] :]
                        logged[choice] += len(tokens)
                        if text or tokens or answer.end_reason is not None:
                            frames.append(self._frame(choice, text, tokens, answer.end_reason))
                    yield b"".join(frames) if updates else PING
            self.exchange.outcome.finish_reason = self.answers[0].end_reason
            yield self._last_frame() + DONE
        except ApiError as error:
            if not self.exchange.is_replying:
                raise
            self.exchange.outcome.error_code = error.code
            yield b"data: " + error_body(error, "openai") + b"\n\n" + DONE

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[AsyncIterator[tuple[int, list[Update]]]]:
        """Updates of all prompts' generations as they come, with the number of the prompt; ([], 0) for a ping."""
        queue: asyncio.Queue[tuple[int, list[Update]] | BaseException | None] = asyncio.Queue()

        async def one(number: int) -> None:
            try:
                async with self.exchange.generate(
                    self.prompts[number], self.params[number], guide=self._guide(), salt=self.body.cache_salt,
                    index=number,
                ) as generation:  # fmt: skip
                    self.generations[number] = generation
                    async for updates in generation.updates():
                        queue.put_nowait((number, updates))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        async def incoming() -> AsyncIterator[tuple[int, list[Update]]]:
            num_open = len(tasks)
            while num_open:
                entry = await queue.get()
                if isinstance(entry, BaseException):
                    raise entry
                if entry is None:
                    num_open -= 1
                else:
                    yield entry

        tasks = [asyncio.ensure_future(one(number)) for number in range(len(self.prompts))]
        try:
            yield incoming()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _guide(self) -> Guide | None:
        return None if self.compiled is None else self.compiled.new_state()

    def _take(self, number: int, updates: list[Update]) -> Iterator[tuple[int, list[OutputEvent]]]:
        """(choice, what its reader gets) of updates of one prompt; a choice is as far as its last pair says."""
        for update in updates:
            choice = number * self.n + update.index
            answer = self.answers[choice]
            if answer.end_reason is None:
                yield choice, answer.take(update, self._generation(number))

    def _generation(self, number: int) -> Generation:
        generation = self.generations[number]
        assert generation is not None
        return generation

    def _head(self) -> dict[str, Any]:
        name = self.exchange.server.served.name
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": name}

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
            "finish_reason": "length" if self.body.max_tokens == 0 else answer.end_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [self._alternatives(token) for token in self._prompt_tokens(number)]
        if self.body.return_token_ids:
            choice["token_ids"] = list(self._generation(number).requests[index % self.n].output_ids)
            choice["prompt_token_ids"] = ids
        return choice

    def _prompt_tokens(self, number: int) -> list[SampledToken]:
        found = self._generation(number).requests[0].prompt_sampled
        return list(found) if found else [SampledToken(token) for token in self.prompts[number]]

    def _logprobs(self, tokens: Sequence[SampledToken], choice: int) -> dict[str, Any]:
        """Of the next tokens of a choice, whose offsets go on where its last ones ended."""
        names = [self._token_name(token.token_id) for token in tokens]
        offsets: list[int] = []
        served = self.exchange.server.served
        for token in tokens:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(served.token_bytes(token.token_id).decode("utf-8", "ignore"))
        return {
            "tokens": names,
            "token_logprobs": [finite_logprob(token.logprob) for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, token: SampledToken) -> dict[str, float] | None:
        """Alternatives by name with the token itself; of two with one name the likelier. None for a first token."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for token_id, value in (*token.top_logprobs, (token.token_id, token.logprob)):
            name = self._token_name(token_id)
            found[name] = max(found.get(name, -float("inf")), finite_logprob(value) or 0.0)
        return found

    def _token_name(self, token_id: int) -> str:
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        return self.exchange.server.served.token_text(token_id)

    def _echo_frame(self, choice: int) -> bytes:
        number = choice // self.n
        text = self.exchange.server.served.tokenizer.decode(self.prompts[number])
        return self._frame(choice, text, self._prompt_tokens(number), None)

    def _frame(self, choice: int, text: str, tokens: Sequence[SampledToken], end_reason: str | None) -> bytes:
        document: dict[str, Any] = {
            **self._head(),
            "choices": [
                {
                    "index": choice,
                    "text": text,
                    "logprobs": None if self.body.logprobs is None else self._logprobs(tokens, choice),
                    "finish_reason": end_reason,
                }
            ],
        }
        if self._has_usage:
            document["usage"] = None
        return b"data: " + orjson.dumps(document) + b"\n\n"

    def _last_frame(self) -> bytes:
        document: dict[str, Any] = {**self._head(), "choices": []}
        if self._has_usage:
            document["usage"] = self._usage()
        if self.body.timings:
            document["timings"] = timings(self._generation(0).requests[0])
        return b"data: " + orjson.dumps(document) + b"\n\n" if len(document) > 5 else b""

    @property
    def _has_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _usage(self) -> dict[str, Any]:
        totals = [0, 0, 0, 0]
        for number in range(len(self.prompts)):
            answers = self.answers[number * self.n : (number + 1) * self.n]
            counts = usage_counts(self._generation(number), answers)
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
        if self.body.max_tokens == 0:
            totals[2] = 0
        return usage(*totals)


def _text(events: Sequence[OutputEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, (Content, Reasoning)))
