"""A conversation with a model in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any

from qnext.errors import UsageError
from qnext.session.answer_reads import AnswerReads, ReadMarks
from qnext.session.folder import EngineOpening, TextFolder, end_token_ids
from qnext.session.opening import open_engine
from qnext.session.talk import DEFAULT_MAX_TOKENS, ChatReply, Stopwatch, Talk, Write, parameter_value

if TYPE_CHECKING:
    from qnext.engine import Engine, SamplingParams
    from qnext.engine.policy.request import Guide
    from qnext.engine.sampling.grammar import GrammarCompiler
    from qnext.model import CausalLM
    from qnext.text.chat import ChatFormat
    from qnext.text.messages import Message
    from qnext.text.output import OutputParser
    from qnext.text.prompts import EncodedPrompt
    from qnext.text.thinking import ThoughtState
    from qnext.text.tokenizer import Tokenizer

_LISTS = {"stop_token_ids", "logit_bias", "allowed_token_ids", "banned_token_ids"}
_NOT_IN_CHAT = {*_LISTS, "logprobs", "prompt_logprobs", "n", "watermark"}


@dataclass
class Conversation(Talk):
    """A conversation with an engine. Without `chat_format` no turns are remembered, and each input is completed as
    text."""

    engine: Engine
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    params: SamplingParams

    @property
    def remembers(self) -> bool:
        return self.chat_format is not None

    @cached_property
    def can_think(self) -> bool:
        """Whether the chat format opens a thought for the answer, or has a switch for thoughts."""
        from qnext.text.prompts import thought_of_format
        from qnext.text.thinking import is_hybrid

        if self.chat_format is None:
            return False
        return is_hybrid(self.chat_format, self.tokenizer) or thought_of_format(self.chat_format) == "open"

    def _ask(self, text: str, turns: list[Message], write: Write, write_thought: Write) -> ChatReply:
        from qnext.engine import TokenEvent
        from qnext.text.stream import TextStream

        prompt_ids, thought = self._prompt(text, turns)
        stream = TextStream(self.tokenizer, stop=self.stop)
        sink = _Sink(self._parser(thought), write, write_thought)
        guide = self._guide(thought)
        self.stopwatch = watch = Stopwatch()
        marks = ReadMarks(self.engine)
        request = self.engine.add_request(prompt_ids, self._capped(len(prompt_ids)), guide=guide)
        try:
            with _interrupt_flag() as is_interrupted:
                while request.finish_reason is None and stream.stop_string is None and not is_interrupted():
                    for event in self.engine.step():
                        if isinstance(event, TokenEvent):
                            watch.tick()
                            if watch.num_tokens == 1:
                                marks.mark_first_token()
                            if event.finish_reason != "stop":
                                sink.push(stream.push(event.token.token_id))
        finally:
            self.engine.abort(request.id)
        marks.mark_end()
        watch.reads = _reads(marks, watch, len(prompt_ids) - (request.num_cached_tokens or 0))
        sink.push(stream.finish())
        if request.failure is not None:
            raise request.fault or UsageError(str(request.failure))
        reply = sink.finish()
        return reply if reply.reasoning or self.can_think else ChatReply(reply.content)

    def _parser(self, thought: ThoughtState) -> OutputParser | None:
        from qnext.text.output import OutputParser
        from qnext.text.thinking import may_think

        reads = thought == "possible" and may_think(self.tokenizer)
        if self.chat_format is None or not (reads or self.can_think):
            return None
        return OutputParser(tool_style=None, starts_in_reasoning=thought == "open", reads_reasoning=reads)

    def _guide(self, thought: ThoughtState) -> Guide | None:
        if not self.wants_json:
            return None
        from qnext.engine.sampling.constraint import Constraint
        from qnext.text.thinking import THINK, THINK_END, is_hybrid

        constraint = Constraint("json_object")
        may_open = thought == "possible" and is_hybrid(self.chat_format, self.tokenizer)
        if thought == "open" or may_open:
            end = tuple(self.tokenizer.encode(THINK_END, allow_special=True))
            constraint = Constraint(
                "json_object", starts_after=end, opened_by=self.tokenizer.added_ids[THINK] if may_open else None
            )
        return self._grammars.compile(constraint).new_state()

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        from qnext.engine.sampling.grammar import GrammarCompiler, Vocabulary

        vocabulary = Vocabulary(
            self.tokenizer.token_table(),
            eos_ids=self.engine.eos_token_ids,
            special_ids=self.tokenizer.reserved_ids.values(),
            size=self.engine.model_config.vocab_size,
        )
        return GrammarCompiler(vocabulary)

    def _capped(self, num_prompt: int) -> SamplingParams:
        """In a conversation max_tokens is a wish: near the end of the context the answer is as long as it can be."""
        wanted, room = self.params.max_tokens, self.engine.max_model_len - num_prompt
        return self.params if wanted is None or room < 1 else replace(self.params, max_tokens=min(wanted, room))

    def _prompt(self, text: str, turns: list[Message]) -> EncodedPrompt:
        from qnext.text.messages import Message
        from qnext.text.prompts import ChatPrompt, EncodedPrompt
        from qnext.text.thinking import TemplateRequest

        if self.chat_format is None:
            return EncodedPrompt(self.tokenizer.encode(text, allow_special=True), "possible")
        head = [Message("system", self.system)] if self.system else []
        asked = TemplateRequest(self.template_arguments, self.thinks)
        return ChatPrompt([*head, *turns], asked).encode(self.chat_format, self.tokenizer)

    def set_thinking(self, thinks: bool) -> None:
        if not self.can_think:
            raise UsageError("the chat format of this model has no thoughts")
        self.thinks = thinks

    def set_parameter(self, name: str, value: str) -> None:
        if name == "stop":
            self.stop = (value,) if value else ()
            return
        known = {item.name for item in fields(self.params)} - _NOT_IN_CHAT
        if name not in known:
            raise UsageError(f"no parameter {name!r}; known: {', '.join(sorted(known | {'stop'}))}")
        self.params = replace(self.params, **{name: parameter_value(name, value)})

    def parameters(self) -> dict[str, Any]:
        names = [item.name for item in fields(self.params) if item.name not in _NOT_IN_CHAT]
        return {name: getattr(self.params, name) for name in names}

    def _read_parameters(self, values: dict[str, Any]) -> Callable[[], None]:
        from qnext.engine import SamplingParams

        own = {"stop_token_ids": tuple(values.get("stop_token_ids", ())), "watermark": self.params.watermark}
        params = SamplingParams(**values | own)
        return lambda: setattr(self, "params", params)

    def info(self) -> list[str]:
        kind = "completion, no memory" if self.chat_format is None else f"chat format {self.chat_format.name}"
        config = self.engine.model_config
        layers = f"{len(config.layer_types)} layers, vocabulary of {config.vocab_size} tokens"
        return [kind, f"{layers}, context of {self.engine.max_model_len} tokens"]


def open_conversation(
    model: CausalLM,
    tokenizer: Tokenizer,
    params: SamplingParams | None = None,
    *,
    chat_format: ChatFormat | None = None,
    max_model_len: int | None = None,
    speculation: bool | None = None,
    **settings: Any,
) -> Conversation:
    """A conversation with its own engine. `settings` are fields of Talk.

    Without `chat_format` each input is completed as plain text, by at most 256 tokens unless `params` says otherwise.
    """
    from qnext.engine import Engine, EngineConfig, SamplingParams

    ends = end_token_ids(tokenizer, model.config)
    engine = Engine.of(
        model, EngineConfig(max_num_seqs=1, max_model_len=max_model_len, speculation=speculation, eos_token_ids=ends)
    )
    return Conversation(
        engine, tokenizer, chat_format, _with_an_end(params or SamplingParams(), chat_format), **settings
    )


def _with_an_end(params: SamplingParams, chat_format: ChatFormat | None) -> SamplingParams:
    """Plain text may never come to an end."""
    if chat_format is None and params.max_tokens is None:
        return replace(params, max_tokens=DEFAULT_MAX_TOKENS)
    return params


@dataclass(frozen=True)
class ConversationOpening:
    """The settings of a conversation with a folder. They are checked before the weights are read, which may take
    minutes."""

    folder: TextFolder
    chat_format: ChatFormat | None
    params: SamplingParams
    max_model_len: int | None = None
    speculation: bool | None = None

    def open(self, how: EngineOpening, **talk: Any) -> Conversation:
        """`talk` are fields of Talk. Raises UsageError, DoesNotFit, CorruptCheckpoint, LostRank."""
        from qnext.engine import EngineConfig

        ends = end_token_ids(self.folder.tokenizer, self.folder.config)
        config = EngineConfig(
            max_num_seqs=1, max_model_len=self.max_model_len, speculation=self.speculation, eos_token_ids=ends
        )
        self._check(talk.get("system"), talk.get("template_arguments", {}))
        engine = open_engine(self.folder, config, how)[1]
        return Conversation(
            engine, self.folder.tokenizer, self.chat_format, _with_an_end(self.params, self.chat_format), **talk
        )

    def _check(self, system: str | None, arguments: Mapping[str, Any]) -> None:
        """Raises UsageError for what needs a chat format, and for what its template does not read."""
        from qnext.text.thinking import TemplateRequest

        if self.chat_format is not None:
            TemplateRequest(arguments).for_template(self.chat_format.arguments)
        elif system is not None or arguments:
            raise UsageError(
                f"{'--chat-template-kwargs' if system is None else 'a system message'} needs a chat format"
            )


class _Sink:
    """Text of an answer to where content and thought are written, and to what is kept."""

    def __init__(self, parser: OutputParser | None, write: Write, write_thought: Write) -> None:
        self._parser = parser
        self._write = write
        self._write_thought = write_thought
        self._content: list[str] = []
        self._thought: list[str] = []

    def push(self, text: str) -> None:
        if self._parser is None:
            self._take(text, is_thought=False)
        else:
            self._read(self._parser.push(text))

    def finish(self) -> ChatReply:
        if self._parser is None:
            return ChatReply("".join(self._content))
        self._read(self._parser.finish())
        return ChatReply("".join(self._content), "".join(self._thought))

    def _read(self, events: list[Any]) -> None:
        from qnext.text.output import Reasoning

        for event in events:
            self._take(event.text, is_thought=isinstance(event, Reasoning))

    def _take(self, text: str, *, is_thought: bool) -> None:
        if text:
            (self._thought if is_thought else self._content).append(text)
            (self._write_thought if is_thought else self._write)(text)


def _reads(marks: ReadMarks, watch: Stopwatch, num_prompt: int) -> AnswerReads | None:
    before, after = watch.seconds
    return marks.reads(
        num_prompt=num_prompt, num_decoded=watch.num_tokens - 1, prefill_seconds=before, decode_seconds=after
    )


@contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C is only remembered; a second one interrupts as usual.

    A step of the engine is never torn apart by it. Signals belong to the main thread; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)
