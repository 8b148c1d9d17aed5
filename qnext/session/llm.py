"""A model as a Python object: text in, text out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from qnext.engine import Engine, EngineConfig, Request, SamplingParams, TokenEvent
from qnext.errors import UsageError
from qnext.session.answering import Answering
from qnext.session.folder import EngineOpening, end_token_ids, open_folder
from qnext.session.opening import open_engine
from qnext.session.placement import AUTO
from qnext.session.rank_options import ONE_PROCESS, RankOptions
from qnext.session.results import ChatAnswer, GeneratedText, TextPiece, TextScore
from qnext.session.sampling import resolve_sampling
from qnext.session.talk import DEFAULT_MAX_TOKENS
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message, message_from_dict
from qnext.text.output import OutputParser, Reasoning
from qnext.text.prompts import ChatPrompt, EncodedPrompt
from qnext.text.stream import TextStream
from qnext.text.thinking import TemplateRequest, may_think

Prompt = str | Sequence[int]  # text, in which names of control tokens count, or token ids
Messages = Sequence[Message | Mapping[str, Any]]  # mappings in OpenAI's form


class LLM:
    """A loaded model with its own engine.

    `model` is a folder, or the name of a model that `qnext pull` has downloaded. `dtype` is float32 or bfloat16; the
    default is the stored dtype. `yarn` stretches the context by a factor. `expert_memory` is the number of bytes for
    experts; the other experts stay on disk. By default all experts are in memory where they fit. `device` is auto (a
    GPU where there is one and the weights fit), cpu, cuda or cuda:N. `ranks` spreads the model over processes, which
    `close` ends. All other options are fields of EngineConfig. An LLM is not thread-safe.
    Raises ModelNotFound, CorruptCheckpoint, NotSupported, DoesNotFit, UsageError; then and later LostRank.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | None = None,
        yarn: float | None = None,
        expert_memory: int | None = None,
        device: str = AUTO,
        ranks: RankOptions | None = None,
        **options: Any,
    ) -> None:
        folder = open_folder(str(model), yarn=yarn, expert_memory=expert_memory, device=device)
        config = EngineConfig(**{"eos_token_ids": end_token_ids(folder.tokenizer, folder.config), **options})
        self.path = folder.path
        self.config = folder.config
        self.tokenizer = folder.tokenizer
        opening = EngineOpening(dtype, ranks or ONE_PROCESS, ends_process=False)
        self.engine: Engine = open_engine(folder, config, opening)[1]

    @cached_property
    def chat_format(self) -> ChatFormat:
        """The chat format of the folder. Raises UsageError where the folder has none."""
        return ChatFormat.for_folder(self.path, tokenizer=self.tokenizer)

    @cached_property
    def default_params(self) -> SamplingParams:
        """The sampling of the folder's generation_config.json, or greedy without it; at most 256 tokens."""
        return resolve_sampling(self.path, {"max_tokens": DEFAULT_MAX_TOKENS})

    @overload  # A text is also a sequence of texts: the first form that fits counts.
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: SamplingParams | None = None, *, stop: Sequence[str] = ()
    ) -> GeneratedText: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> list[GeneratedText]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> GeneratedText | list[GeneratedText]:
        """Complete one prompt, or many side by side. `params` is one for all prompts, or one for each.

        A text ends before the first of the `stop` strings. Raises UsageError and DoesNotFit before any prompt runs.
        """
        many: list[Prompt] = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        each = list(params) if isinstance(params, Sequence) else [params] * len(many)
        if len(each) != len(many):
            raise UsageError(f"{len(many)} prompts but {len(each)} sampling parameters")
        found = self._complete([(self._ids(prompt), chosen) for prompt, chosen in zip(many, each, strict=True)], stop)
        return found[0] if _is_one(prompts) else found

    def chat(
        self,
        messages: Messages | str,
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        thinks: bool | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> ChatAnswer:
        """Answer a conversation, or one message of a user.

        `thinks` says whether the answer begins with a thought, where the model allows the choice. Raises UsageError for
        a folder without a chat format, and the errors of `generate`.
        """
        prompt = self._chat_prompt(messages, thinks, template_arguments)
        (generated,) = self._complete([(prompt.token_ids, params)], stop)
        parser = self._parser(prompt)
        content = reasoning = ""
        for event in [*parser.push(generated.text), *parser.finish()]:
            if isinstance(event, Reasoning):
                reasoning += event.text
            else:
                content += event.text  # type: ignore[union-attr]
        return ChatAnswer(content, reasoning or None, generated)

    def stream(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        thinks: bool | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Iterator[TextPiece]:
        """Complete a prompt, or answer a conversation, piece by piece. Leaving the loop ends the request.

        Raises UsageError and DoesNotFit, in some cases only with the first piece.
        """
        answer = Answering(TextStream(self.tokenizer, stop=stop))
        if _is_one(prompt):
            return self._stream(self._ids(prompt), params, answer, None)  # type: ignore[arg-type]
        encoded = self._chat_prompt(prompt, thinks, template_arguments)  # type: ignore[arg-type]
        return self._stream(encoded.token_ids, params, answer, self._parser(encoded))

    def score(self, text: Prompt) -> TextScore:
        """Log-probabilities of a text, each token given the tokens before it. Raises UsageError, DoesNotFit."""
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (completion,) = self.engine.generate([self._ids(text)], params)
        return TextScore(completion.prompt_ids, tuple(token.logprob for token in completion.prompt_sampled))

    def tokenize(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Token ids of a text. Names such as <|im_start|> become control tokens with `allow_special`, and stay text
        without."""
        return self.tokenizer.encode(text, allow_special=allow_special)

    def close(self) -> None:
        """End running requests, and write the disk cache where there is one."""
        self.engine.close()
        self.tokenizer.close()
        chat_format: ChatFormat | None = vars(self).get("chat_format")  # made on first use
        if chat_format is not None:
            chat_format.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)

    def _chat_prompt(
        self, messages: Messages | str, thinks: bool | None, arguments: Mapping[str, Any] | None
    ) -> EncodedPrompt:
        turns = [Message("user", messages)] if isinstance(messages, str) else [_message(each) for each in messages]
        asked = TemplateRequest(arguments or {}, thinks)
        return ChatPrompt(turns, asked).encode(self.chat_format, self.tokenizer)

    def _parser(self, prompt: EncodedPrompt) -> OutputParser:
        reads = prompt.thought == "possible" and may_think(self.tokenizer)
        return OutputParser(tool_style=None, starts_in_reasoning=prompt.thought == "open", reads_reasoning=reads)

    def _add(self, prompt_ids: list[int], params: SamplingParams | None) -> Request:
        if params is None:
            room = max(1, self.engine.max_model_len - len(prompt_ids))
            params = replace(self.default_params, max_tokens=min(DEFAULT_MAX_TOKENS, room))
        return self.engine.add_request(prompt_ids, params)

    def _complete(
        self, prompts: Sequence[tuple[list[int], SamplingParams | None]], stop: Sequence[str]
    ) -> list[GeneratedText]:
        answers = [Answering(TextStream(self.tokenizer, stop=stop)) for _ in prompts]
        requests: list[Request] = []
        try:
            requests += (self._add(*each) for each in prompts)
            by_id = {request.id: answer for request, answer in zip(requests, answers, strict=True)}
            while any(answer.finish_reason is None for answer in answers):
                for event in self._step(requests):
                    answer = by_id.get(event.request_id)
                    if answer is not None and answer.finish_reason is None:
                        answer.take(event)
                        if answer.finish_reason is not None:
                            self.engine.abort(event.request_id)
        finally:
            for request in requests:
                self.engine.abort(request.id)
        return [_generated(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _stream(
        self, prompt_ids: list[int], params: SamplingParams | None, answer: Answering, parser: OutputParser | None
    ) -> Generator[TextPiece, None, None]:
        request = self._add(prompt_ids, params)
        try:
            while answer.finish_reason is None:
                for event in self._step([request]):
                    if event.request_id == request.id and answer.finish_reason is None:
                        yield from _pieces(answer.take(event), answer, parser)
        finally:
            self.engine.abort(request.id)

    def _step(self, requests: Sequence[Request]) -> list[TokenEvent]:
        """Tokens of one step. Raises what ended one of the requests."""
        events = self.engine.step()
        for request in requests:
            if request.failure is not None:
                raise request.fault or request.failure
        return [event for event in events if isinstance(event, TokenEvent)]


def _is_one(prompts: Prompt | Sequence[Any]) -> bool:
    """Whether it is a text or token ids, and not a list of prompts or messages."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _message(value: Message | Mapping[str, Any]) -> Message:
    return value if isinstance(value, Message) else message_from_dict(value)


def _generated(request: Request, answer: Answering) -> GeneratedText:
    assert answer.finish_reason is not None
    return GeneratedText(answer.text, tuple(answer.tokens), answer.finish_reason, request.seed, len(request.prompt_ids))


def _pieces(text: str, answer: Answering, parser: OutputParser | None) -> Iterator[TextPiece]:
    is_last = answer.finish_reason is not None
    if parser is None:
        found = [TextPiece(text)] if text else []
    else:
        events = [*parser.push(text), *(parser.finish() if is_last else ())]
        found = [TextPiece(event.text, isinstance(event, Reasoning)) for event in events]
    if is_last:
        last = found.pop() if found else TextPiece("")
        found.append(replace(last, finish_reason=answer.finish_reason))
    yield from found
