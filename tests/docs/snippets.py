"""Code blocks of Markdown, the commands in them, and whether the program has such a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from qnext.cli import VERBS, click_command
from qnext.cli.parsing.config_file import read_flags, take_config

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(?P<mark><!-- run -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
_SHELLS = ("sh", "bash")
USAGE_ERROR = typer.BadParameter.__mro__[1]  # click's UsageError, whichever click typer has


@dataclass(frozen=True)
class Block:
    path: Path
    language: str
    text: str
    is_run: bool  # stands under the mark for blocks that the tests run

    def __str__(self) -> str:
        return f"{self.path.name}: {self.text.splitlines()[0][:60]}"


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [Block(path, m["language"], m["text"], m["mark"] is not None) for m in _FENCE.finditer(text)]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block for a shell, `\\` at line ends joined, pipes and && cut."""
    if block.language not in _SHELLS:
        return
    words: list[str] = []
    for line in _lines(block.text):
        for word in shlex.split(line, comments=True):
            if word in ("|", "&&", ";"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words
        words = []


def _lines(text: str) -> Iterator[str]:
    """Lines of a script; one goes on while its quotes are open or it ends with a backslash."""
    held = ""
    for line in text.splitlines():
        held += line
        if held.endswith("\\"):
            held = held[:-1] + " "
            continue
        try:
            shlex.split(held, comments=True)
        except ValueError:
            held += "\n"
            continue
        yield held
        held = ""
    assert not held, f"a quote stays open: {held[:80]}"


def qnext_arguments(words: Sequence[str]) -> list[str] | None:
    """What `qnext` is given in a command; None where it is not called."""
    for position, word in enumerate(words):
        if word == "qnext" or word.endswith("/bin/qnext"):
            # `docker run ... qnext:0.1.0 serve` has another first word; `systemctl enable qnext` has no verb.
            rest = list(words[position + 1 :])
            return rest if rest and words[0] not in ("docker", "kubectl", "systemctl") else None
        if word.startswith("qnext:") and len(words) > position + 1 and words[0] == "docker" and words[1] == "run":
            return list(words[position + 1 :])
    return None


def check_arguments(arguments: Sequence[str], *, folder: Path | None = None) -> None:
    """Parse a command as the program would, values and all, without running it. Raises USAGE_ERROR.

    Files of `--config` are looked for in `folder` by their name alone, where it is given.
    """
    verb, *rest = arguments
    joined = f"{verb}-{rest[0]}" if rest else verb
    if joined in VERBS:
        verb, rest = joined, rest[1:]
    assert verb in VERBS, f"qnext has no verb {verb}"
    command = click_command(verb)
    rest, file = take_config(verb, rest)
    if any(word.startswith("--help") for word in rest):
        return
    flags = {}
    if file is not None and folder is not None:
        flags = read_flags(folder / file.name, verb, command, VERBS)
    name = f"qnext {verb}"
    if hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"{name} has no {rest[:1]}"
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    command.make_context(name, list(rest), default_map=flags)
