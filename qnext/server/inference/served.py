"""The served model: its names, its text side, and what a request may ask of it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from qnext.engine.policy.watermark_key import WatermarkKey
from qnext.engine.sampling.constraint import Constraint, GrammarLimits
from qnext.engine.sampling.grammar import CompiledGrammar, CompilersBusy, GrammarCompiler, Vocabulary
from qnext.errors import CorruptCheckpoint, QnextError
from qnext.server.errors import ApiError, from_user_error
from qnext.server.inference.origin import AnswerOrigin
from qnext.server.inference.prompt_size import num_characters_of, texts_of, whole_words
from qnext.server.lanes import LARGE, Asker, Lane
from qnext.server.limits import MAX_LARGE_WAITING, MAX_TEXT_PER_TOKEN
from qnext.text.confined_tokenizer import NoTokenizerProcess, TooManyTokens, Watch
from qnext.text.output.parser import ToolStyle
from qnext.text.prompts import ChatPrompt, EncodedPrompt, thought_of_format
from qnext.text.thinking import (
    THINK,
    THINK_END,
    TemplateRequest,
    is_hybrid,
    may_think,
)

if TYPE_CHECKING:
    from qnext.text.chat import ChatFormat
    from qnext.text.tokenizer import Tokenizer

Result = TypeVar("Result")

GRAMMAR_PROGRAM = Path(__file__).with_name("grammar_worker.py")
DEFAULTS: Mapping[str, float] = {"temperature": 1.0}  # OpenAI's, where neither request nor model says otherwise
_CLAUDE = re.compile(r"(?:anthropic[./])?claude-")
_FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@dataclass(frozen=True)
class Marking:
    """The watermark of answers. `is_optional`: those alone that ask for it have it, otherwise all."""

    key: WatermarkKey | None = None
    is_optional: bool = False

    def of(self, wanted: bool | None) -> WatermarkKey | None:
        """The key for a request. Raises ApiError 400 for what the server does not do."""
        if wanted and self.key is None:
            raise ApiError.bad("this server marks no answers", param="watermark")
        if wanted is False and self.key is not None and not self.is_optional:
            raise ApiError.bad("this server marks all answers", param="watermark")
        return self.key if wanted or (wanted is None and not self.is_optional) else None


class ServedModel:
    """Text to token ids and back for one model, outside the event loop where that could take long.

    `names` are the model names that requests may use; answers carry the first. `vocab_size` counts the rows of the
    model's head, which may be more than the tokenizer's. `defaults` are the sampling parameters, and
    `template_defaults` the template arguments, of requests that do not name them. `tool_style` None is that of the chat
    format. Answers of a model without an `origin` cannot be traced. Raises UsageError for arguments that the template
    does not read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_format: ChatFormat | None,
        *,
        names: Sequence[str],
        adapters: Sequence[str] = (),
        vocab_size: int,
        max_model_len: int,
        eos_ids: frozenset[int],
        defaults: Mapping[str, Any] | None = None,
        template_defaults: Mapping[str, Any] | None = None,
        tool_style: ToolStyle | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.names = tuple(names)
        self.adapters = tuple(adapters)
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_ids = eos_ids
        self.defaults = {**DEFAULTS, **(defaults or {})}
        self.template_defaults = dict(template_defaults or {})
        TemplateRequest(self.template_defaults).for_template(self.template_arguments)
        # What whoever has loaded the model says of it, beside what is said to it.
        self.origin: AnswerOrigin | None = None
        self.marking = Marking()
        self.created = int(time.time())
        self.tool_style: ToolStyle = tool_style or self._style_of_format()
        self.tokens = list(tokenizer.token_table())
        self._json_of_tokens: dict[int, str] = {}
        # What takes long waits for its own kind alone, and of each asker one runs at a time.
        self._short = Lane("text", num_threads=2, per_owner=2, max_waiting=1_024)
        self._long = Lane("long-text", num_threads=2, per_owner=1, max_waiting=MAX_LARGE_WAITING)
        self._constraints = ThreadPoolExecutor(1, thread_name_prefix="constraint")  # reads them; no text waits for it

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def all_names(self) -> tuple[str, ...]:
        """What requests may name: the model under each of its names, and its adapters."""
        return self.names + self.adapters

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """The compiler of grammars, made on first use, because it reads the whole vocabulary."""
        vocabulary = Vocabulary(
            self.tokens,
            eos_ids=self.eos_ids,
            special_ids=self.tokenizer.reserved_ids.values(),
            size=self.vocab_size,
        )
        return GrammarCompiler(vocabulary, program=GRAMMAR_PROGRAM)

    def warm(self) -> None:
        """Start the process that compiles grammars now, and not with the first constraint."""
        self._constraints.submit(lambda: self.grammars.warm())

    @property
    def template_arguments(self) -> frozenset[str]:
        """Names that the chat template reads beside conversation and tools."""
        return frozenset() if self.chat_format is None else self.chat_format.arguments

    @cached_property
    def is_thinking(self) -> bool:
        """Whether answers begin inside a thought, because the generation prompt opens it."""
        if self.chat_format is None:
            return False
        asked = TemplateRequest(self.template_defaults)
        try:
            return thought_of_format(self.chat_format, asked) == "open"
        except QnextError:
            return False

    @cached_property
    def may_think(self) -> bool:
        """Whether an answer may begin with a thought where the prompt has not opened one."""
        return may_think(self.tokenizer) or self.is_thinking

    @property
    def is_hybrid(self) -> bool:
        """Whether the template has a switch for thoughts. Where it is not set, the model decides."""
        return is_hybrid(self.chat_format, self.tokenizer)

    @cached_property
    def think_start(self) -> int | None:
        return self.tokenizer.added_ids.get(THINK)

    @cached_property
    def think_end(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(THINK_END, allow_special=True))

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 for another model's name. A missing name is accepted, and so is every name of Claude's.

        Claude Code uses several of Claude's names by itself, whatever model it was told to use.
        """
        if name is not None and name not in self.all_names and not _CLAUDE.match(name):
            raise ApiError(404, "no such model; GET /v1/models lists them", code="model_not_found", param="model")

    async def run(
        self,
        function: Callable[[], Result],
        *,
        asker: Asker,
        param: str | None = None,
        num_characters: int = 0,
        watch: Watch | None = None,
    ) -> Result:
        """Run `function` in a thread. A QnextError becomes ApiError 400. `watch` is stopped when the asker leaves.

        Work on a large body, or on many `num_characters`, has a lane of its own, where it waits for its turn.
        """
        lane = self._long if max(asker.num_bytes, num_characters) > LARGE else self._short
        try:
            return await lane.run(asker.owner, function, stop=None if watch is None else watch.stop)
        except QnextError as error:
            raise from_user_error(error, param=param) from None
        except NoTokenizerProcess:
            raise ApiError.busy("the process that tokenizes long words did not start", retry_after=5.0) from None

    async def encode(
        self, text: str, *, asker: Asker, param: str = "prompt", allow_special: bool = False, is_prompt: bool = True
    ) -> list[int]:
        """Token ids of a text. Raises ApiError for a text that is too long for the context.

        `is_prompt`: a long text is refused as soon as its first part is known to exceed the context.
        """
        watch = Watch(most=self.max_model_len - 1 if is_prompt and len(text) > LARGE else None)

        def work() -> list[int]:
            try:
                self._check_length(len(text), (text,), param, watch)
                return self.tokenizer.encode(text, allow_special=allow_special, watch=watch)
            except TooManyTokens as error:
                raise ApiError.too_long(error.num_tokens, self.max_model_len - 1, is_least=True, param=param) from None

        return await self.run(work, asker=asker, param=param, num_characters=len(text), watch=watch)

    async def encode_chat(
        self, prompt: ChatPrompt, *, asker: Asker, param: str = "messages", is_prompt: bool = True
    ) -> EncodedPrompt:
        """A conversation as `ChatPrompt` writes it; `is_prompt` as for `encode`.

        Raises ApiError 400, also for arguments that no template reads.
        """
        if self.chat_format is None:
            raise ApiError.bad("this model has no chat format; use /v1/completions", code="no_chat_template")
        chat_format = self.chat_format
        wanted = replace(prompt, asked=prompt.asked.over(self.template_defaults))
        watch = Watch(most=self.max_model_len - 1 if is_prompt and asker.is_large else None)
        begun = prompt.messages[-1] if prompt.continues and prompt.messages else None
        if prompt.continues and (begun is None or begun.role != "assistant" or begun.tool_calls):
            raise ApiError.bad("only an assistant's message without tool calls can be continued", param=param)

        try:
            wanted.asked.for_template(self.template_arguments)
        except QnextError as error:
            raise from_user_error(error, param="chat_template_kwargs") from None

        def work() -> EncodedPrompt:
            try:
                self._check_length(num_characters_of(wanted), texts_of(wanted), param, watch)
                return wanted.encode(chat_format, self.tokenizer, watch=watch)
            except TooManyTokens as error:
                raise ApiError.too_long(error.num_tokens, self.max_model_len - 1, is_least=True, param=param) from None

        return await self.run(work, asker=asker, param=param, watch=watch)

    def fill_in_middle(self) -> tuple[int, int, int] | None:
        """Ids of the tokens around prefix, suffix and middle, where the vocabulary has them."""
        ids = self.tokenizer.added_ids
        if any(name not in ids for name in _FIM):
            return None
        prefix, suffix, middle = (ids[name] for name in _FIM)
        return prefix, suffix, middle

    async def compile(self, constraint: Constraint, *, param: str, owner: str = "") -> CompiledGrammar:
        """The grammar of a constraint.

        Raises ApiError 400 for a constraint that is malformed, impossible, too large or too costly. Raises 429 where
        too many constraints of its owner wait, and 503 where too many of all owners wait or the machine is too busy.
        """
        reading = self._constraints.submit(lambda: self.grammars.submit(constraint, owner=owner))
        try:
            compiling = await asyncio.wrap_future(reading)
            return await asyncio.wait_for(asyncio.wrap_future(compiling), GrammarLimits().wait_seconds)
        except asyncio.CancelledError:  # the client has left
            reading.add_done_callback(_cancel_what_came)
            raise
        except asyncio.TimeoutError:
            raise ApiError.busy("the machine is too busy to compile output constraints", retry_after=5.0) from None
        except CompilersBusy as error:
            if error.is_own:
                raise ApiError.over_limit(str(error), retry_after=2.0) from None
            raise ApiError.busy(str(error), retry_after=5.0) from None
        except QnextError as error:
            where = "tools" if str(error).startswith("tools") else param
            source = str([constraint.value, constraint.alternative])
            raise from_user_error(error, param=where, source=source) from None

    def check_ids(self, ids: Sequence[int], *, param: str) -> None:
        """Raises ApiError 400 unless all are ids of the vocabulary."""
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise ApiError.bad(f"token ids are out of vocabulary; it has {self.vocab_size} tokens", param=param)

    def token_text(self, token_id: int) -> str:
        """A token as text. Bytes that are no text on their own are written in hex, so that each token has its own
        name."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_json(self, token_id: int) -> str:
        """`token_text` as JSON, made once for each token."""
        found = self._json_of_tokens.get(token_id)
        if found is None:
            found = self._json_of_tokens[token_id] = orjson.dumps(self.token_text(token_id)).decode()
        return found

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    @property
    def eos_token(self) -> str | None:
        try:
            return self.token_text(min(self.tokenizer.eos_ids))
        except (CorruptCheckpoint, ValueError):
            return None

    def close(self) -> None:
        self._short.close()
        self._long.close()
        self.tokenizer.close()
        self._constraints.shutdown(wait=False, cancel_futures=True)
        if "grammars" in self.__dict__:
            self.grammars.close()

    def _check_length(self, num_characters: int, texts: Iterable[str], param: str, watch: Watch) -> None:
        """Refuse what is far too long by the tokens of its first part: the whole could take long to count."""
        left, found = MAX_TEXT_PER_TOKEN * self.max_model_len, 0
        if num_characters <= left:
            return
        maximum = self.max_model_len - 1
        for text in texts:
            found += len(self.tokenizer.encode(text if len(text) <= left else whole_words(text, left), watch=watch))
            left -= len(text)
            if left <= 0:
                break
        if found > maximum:
            raise ApiError.too_long(found, maximum, is_least=True, param=param)
        raise ApiError.bad(
            f"prompt is too long: {num_characters} characters, more than {MAX_TEXT_PER_TOKEN} per token of the "
            f"maximum of {maximum} tokens",
            param=param,
            code="context_length_exceeded",
        )

    def _style_of_format(self) -> ToolStyle:
        chat_format = self.chat_format
        if chat_format is None:
            return "json"
        if chat_format.template is None:
            return "xml" if chat_format.name == "coder" else "json"
        return "xml" if "<function=" in chat_format.template.text else "json"


def _cancel_what_came(reading: Future[Future[CompiledGrammar]]) -> None:
    if not reading.cancelled() and reading.exception() is None:
        reading.result().cancel()
