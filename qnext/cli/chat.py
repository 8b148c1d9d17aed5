"""`qnext chat`: talk to a model in the terminal, or line by line through a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli import _sampling as options
from qnext.cli._conversation import Conversation, split_command
from qnext.cli._text_model import TextFolder, end_token_ids, load_weights, open_folder, write_text
from qnext.cli._types import human_int
from qnext.errors import QnextError, UsageError

if TYPE_CHECKING:
    from qnext.engine import SamplingParams
    from qnext.model import CausalLM
    from qnext.text.chat import ChatFormat
    from qnext.text.tokenizer import Tokenizer

COMPLETION_TOKENS = 256

ReadLine = Callable[[str], str]  # prompt -> one line without its newline; EOFError at the end of input

_QUOTES = '"""'
_HELP = """\
/help, /?                   this list
/set parameter NAME VALUE   temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, seed, stop, ...
/set system TEXT            the system message; without TEXT none
/show                       settings
/clear                      forget the conversation
/regenerate                 answer the last input once more
/save FILE, /load FILE      the conversation as JSON
/multi                      several lines, ended by a line \"\"\" (or begin the input with \"\"\")
/exit, /bye                 leave; Ctrl-D too. Ctrl-C stops an answer"""


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder.")],
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Complete each input as plain text, without chat format or memory.")
    ] = False,
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
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="N", parser=human_int, help="Tokens of context, such as 32k; default: the model's."
        ),
    ] = None,
    yarn: options.Yarn = None,
    speculation: options.Speculation = None,
    dtype: options.DType = None,
) -> None:
    """Talk to a model; /help lists the commands.

    A folder without chat format is used for completion. A flag counts first, then generation_config.json, then greedy.
    """
    folder = open_folder(model, yarn=yarn)
    params = options.resolve_sampling(
        folder.path,
        {
            "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty, "seed": seed,
        },
    )  # fmt: skip
    chat_format = None if complete else _chat_format(folder)
    if system is not None and chat_format is None:
        raise UsageError("a system message needs a chat format")
    run_chat(
        load_weights(folder, dtype), folder.tokenizer, chat_format=chat_format, params=params, stop=tuple(stop or ()),
        system=system, max_model_len=context, speculation=speculation,
    )  # fmt: skip


def run_chat(
    model: CausalLM,
    tokenizer: Tokenizer,
    *,
    chat_format: ChatFormat | None = None,
    params: SamplingParams | None = None,
    stop: tuple[str, ...] = (),
    system: str | None = None,
    max_model_len: int | None = None,
    speculation: bool | None = None,
    read_line: ReadLine | None = None,
) -> None:
    """Converse until the input ends. Without `chat_format` each input is completed as plain text, by 256 tokens unless
    `params` says otherwise.

    Answers go to stdout, everything else to stderr. `read_line` None reads the terminal with line editing, or plain
    lines where standard input is none.
    """
    from qnext.engine import Engine, SamplingParams

    engine = Engine(
        model, max_num_seqs=1, max_model_len=max_model_len, speculation=speculation,
        eos_token_ids=end_token_ids(tokenizer, model.config),
    )  # fmt: skip
    _note(engine.memory_plan.describe())
    params = params or SamplingParams()
    if chat_format is None and params.max_tokens is None:
        params = replace(params, max_tokens=COMPLETION_TOKENS)
    conversation = Conversation(engine, tokenizer, chat_format, params, stop=stop, system=system)
    is_terminal = read_line is None and sys.stdin.isatty()
    if is_terminal:
        _note("/help lists the commands, Ctrl-D leaves")
    read_line = read_line or (_terminal_reader() if is_terminal else _plain_reader)
    while True:
        try:
            text = _read_input(read_line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _note("Ctrl-D or /exit leaves")
            continue
        if text.strip() in ("/exit", "/bye"):
            return
        try:
            _handle(conversation, text, read_line)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _note("interrupted")
        except QnextError as error:
            _note(str(error))
        except OSError as error:
            _note(f"{error.filename}: {error.strerror}")


def _handle(conversation: Conversation, text: str, read_line: ReadLine) -> None:
    """One input: a command, or something to answer."""
    if not text.strip():
        return
    name, rest = split_command(text)
    if not name.startswith("/"):
        _finish_line(conversation.answer(text, write_text))
    elif name in ("/help", "/?"):
        _note(_HELP)
    elif name == "/set":
        _set(conversation, rest)
    elif name == "/show":
        _note(conversation.show())
    elif name == "/clear":
        conversation.clear()
    elif name == "/regenerate":
        _finish_line(conversation.regenerate(write_text))
    elif name in ("/save", "/load"):
        if not rest:
            raise UsageError(f"{name} needs a file")
        path = Path(rest).expanduser()
        (conversation.save if name == "/save" else conversation.load)(path)
    elif name == "/multi":
        many = _read_until_quotes(read_line, [])
        if many.strip():
            _finish_line(conversation.answer(many, write_text))
    else:
        raise UsageError(f"no command {name}; /help lists them")


def _set(conversation: Conversation, rest: str) -> None:
    what, value = split_command(rest)
    if what == "system":
        if conversation.chat_format is None:
            raise UsageError("a system message needs a chat format")
        conversation.system = value or None
    elif what == "parameter":
        conversation.set_parameter(*split_command(value))
    else:
        raise UsageError("usage: /set parameter NAME VALUE, or /set system TEXT")


def _read_input(read_line: ReadLine) -> str:
    """A line, or the lines between triple quotes."""
    line = read_line(">>> ")
    if not line.lstrip().startswith(_QUOTES):
        return line
    first = line.lstrip()[len(_QUOTES) :]
    if first.rstrip().endswith(_QUOTES):
        return first.rstrip()[: -len(_QUOTES)]
    return _read_until_quotes(read_line, [first] if first else [])


def _read_until_quotes(read_line: ReadLine, lines: list[str]) -> str:
    while True:
        try:
            line = read_line("... ")
        except EOFError:
            return "\n".join(lines)
        if line.rstrip().endswith(_QUOTES):
            last = line.rstrip()[: -len(_QUOTES)]
            return "\n".join([*lines, last] if last else lines)
        lines.append(line)


def _terminal_reader() -> ReadLine:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import ColorDepth

    depth = ColorDepth.DEPTH_1_BIT if "NO_COLOR" in os.environ else None
    session: PromptSession[str] = PromptSession(color_depth=depth)
    return session.prompt


def _plain_reader(prompt: str) -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text: {error}") from None
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _chat_format(folder: TextFolder) -> ChatFormat | None:
    """The folder's format; None, with one line that says so, where it has none."""
    from qnext.text.chat import ChatFormat

    try:
        return ChatFormat.for_folder(folder.path, tokenizer=folder.tokenizer)
    except UsageError as error:
        _note(f"{error}: each input is completed as plain text")
        return None


def _finish_line(answer: str) -> None:
    if not answer.endswith("\n"):
        write_text("\n")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
