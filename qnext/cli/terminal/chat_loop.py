"""The prompt of `qnext chat`: lines in, answers out, and the commands between."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from qnext.cli.terminal.text import note, printable, write_text
from qnext.errors import QnextError, UsageError, line_of
from qnext.interrupts import repeated_interrupts
from qnext.session.talk import Talk, Write, split_command

ReadLine = Callable[[str], str]  # prompt -> one line without its newline; EOFError at the end of input

_QUOTES = '"""'
_HELP = """\
/help, /?                   this list
/set parameter NAME VALUE   temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, seed, stop, ...
/set system TEXT            the system message; without TEXT none
/set think, /set nothink    whether the model thinks before it answers, where it can do without
/set format json|text       whether answers are JSON objects
/set verbose, /set quiet    whether times and rates follow an answer
/show [info|parameters|system]
/clear                      forget the conversation
/regenerate                 answer the last input once more
/save FILE, /load FILE      the conversation as JSON
/multi                      several lines, ended by a line \"\"\" (or begin the input with \"\"\")
/exit, /bye                 leave; Ctrl-D too. Ctrl-C stops an answer, Ctrl-G opens $EDITOR"""


def converse(talk: Talk, read_line: ReadLine | None = None) -> None:
    """Answer inputs until they end. Answers go to stdout, everything else to stderr.

    `read_line` None reads the terminal with line editing, or plain lines where standard input is none.
    """
    is_terminal = read_line is None and sys.stdin.isatty()
    if is_terminal:
        note("/help lists the commands, Ctrl-D leaves")
    read_line = read_line or (terminal_reader() if is_terminal else _plain_reader)
    with repeated_interrupts() if is_terminal else nullcontext():
        _answer_all(talk, read_line, is_terminal)


def _answer_all(talk: Talk, read_line: ReadLine, is_terminal: bool) -> None:
    while True:
        try:
            text = _read_input(read_line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            note("Ctrl-D or /exit leaves")
            continue
        if text.strip() in ("/exit", "/bye"):
            return
        try:
            _handle(talk, text, read_line)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            note("interrupted")
        except QnextError as error:
            if error.ends_engine:
                raise
            note(str(error))
        except OSError as error:
            note(line_of(error))


class Screen:
    """An answer on the terminal: its thought on stderr, dim, its content on stdout."""

    def __init__(self) -> None:
        is_plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ
        self._dim, self._normal = ("", "") if is_plain else ("\x1b[2m", "\x1b[0m")
        self._is_in_thought = False
        self._last = ""

    def write(self, text: str) -> None:
        self._leave_thought()
        self._last = text or self._last
        write_text(text)

    def write_thought(self, text: str) -> None:
        self._is_in_thought = True
        print(f"{self._dim}{printable(text, sys.stderr)}{self._normal}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """An answer ends its line."""
        self._leave_thought()
        if not self._last.endswith("\n"):
            write_text("\n")

    @property
    def has_begun(self) -> bool:
        return bool(self._last) or self._is_in_thought

    def _leave_thought(self) -> None:
        if self._is_in_thought:
            note("\n")
        self._is_in_thought = False


def _handle(talk: Talk, text: str, read_line: ReadLine) -> None:
    """One input: a command, or something to answer."""
    if not text.strip():
        return
    name, rest = split_command(text)
    if not name.startswith("/"):
        _show_answer(talk, partial(talk.answer, text))
    elif name in ("/help", "/?"):
        note(_HELP)
    elif name == "/set":
        talk.change(rest)
    elif name == "/show":
        note(talk.show(rest))
    elif name == "/clear":
        talk.clear()
    elif name == "/regenerate":
        _show_answer(talk, talk.regenerate)
    elif name in ("/save", "/load"):
        if not rest:
            raise UsageError(f"{name} needs a file")
        path = Path(rest).expanduser()
        (talk.save if name == "/save" else talk.load)(path)
    elif name == "/multi":
        many = _read_until_quotes(read_line, [])
        if many.strip():
            _show_answer(talk, partial(talk.answer, many))
    else:
        raise UsageError(f"no command {name}; /help lists them")


def _show_answer(talk: Talk, ask: Callable[[Write, Write], str]) -> None:
    screen = Screen()
    try:
        ask(screen.write, screen.write_thought)
    except QnextError:
        if screen.has_begun:
            screen.finish()
        raise
    screen.finish()
    if talk.shows_stats and talk.stopwatch is not None:
        note(talk.stopwatch.describe())


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


def terminal_reader() -> ReadLine:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import ColorDepth

    keys = KeyBindings()

    @keys.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    depth = ColorDepth.DEPTH_1_BIT if "NO_COLOR" in os.environ else None
    session: PromptSession[str] = PromptSession(color_depth=depth, key_bindings=keys, tempfile_suffix=".txt")
    return session.prompt


def _plain_reader(prompt: str) -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text: {error}") from None
    if not line:
        raise EOFError
    return line.rstrip("\n")
