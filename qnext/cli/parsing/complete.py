"""What may stand next on a command line, for the shells' completion. Imports a verb's module, never torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

FOLDERS, FILES = "#folders", "#files"  # lines that ask the shell for names of its own

_NO_HINT = re.compile(r"N|X|FACTOR|TEXT|PROMPT|NAME|URL|KEY|KEY=VALUE|[\dNX,.]+")


def candidates(words: Sequence[str]) -> list[str]:
    """Lines for the last word of `words`, which follow `qnext`: candidates with a tab and their help, or FOLDERS and
    FILES. A line that is wrong elsewhere has no candidates.
    """
    from qnext.cli import VERBS

    prefix = re.match("--[^=]+=", words[-1]) if words else None  # bash alone has it as words of their own
    words = _join_equals(words)
    if len(words) > 2 and "-".join(words[:2]) in VERBS:
        words = ["-".join(words[:2]), *words[2:]]
    last = words[-1] if words else ""
    if len(words) <= 1:
        found = [*(f"{verb}\t{text}" for verb, text in VERBS.items()), "--help\t", "--version\t"]
    elif words[0] in VERBS:
        found = list(_of_verb(words[0], words[1:-1], last))
    else:
        found = []
    found = [line for line in found if line in (FOLDERS, FILES) or line.startswith(last)]
    return [f"{prefix[0]}{line}" for line in found] if prefix and not {FOLDERS, FILES} & set(found) else found


def _join_equals(words: Sequence[str]) -> list[str]:
    """Bash cuts `--dtype=b` into three words; elsewhere it is one. Here it is two."""
    joined: list[str] = []
    for index, word in enumerate(words):
        if word == "=" and joined and joined[-1].startswith("--"):
            if index == len(words) - 1:
                joined.append("")
        elif word.startswith("--") and "=" in word:
            joined += word.split("=", 1)
        else:
            joined.append(word)
    return joined


def _of_verb(verb: str, before: list[str], last: str) -> Iterator[str]:
    from qnext.cli import click_command

    command = click_command(verb)
    parameters, model_flags = command.params, getattr(command, "model_flags", ())
    options = {
        flag: parameter
        for parameter in parameters
        if hasattr(parameter, "is_flag")
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    num_positional, waiting = 0, ""  # an option that waits for its value
    has_ended = False
    for word in before:
        if waiting:
            waiting = ""
        elif word == "--" and not has_ended:
            has_ended = True
        elif has_ended or not word.startswith("-") or word == "-":
            num_positional += 1
        elif word in ("--config", *model_flags) or (word in options and not options[word].is_flag):
            waiting = word
    if waiting == "--config":
        yield FILES
    elif waiting in model_flags:
        yield from _argument_values(next(each for each in parameters if each.name == "model"))
    elif waiting:
        yield from _values(options[waiting].metavar or "FILE")
    elif last.startswith("-") and not has_ended:
        yield from (f"{flag}\t{_first_sentence(parameter.help)}" for flag, parameter in options.items())
        yield "--config\tflags from a YAML or JSON file"
        yield from (f"{flag}\tMODEL by a flag" for flag in model_flags)
        yield from ("-h\t", "--help\t")
    else:
        arguments = [parameter for parameter in parameters if not hasattr(parameter, "is_flag")]
        if num_positional < len(arguments):
            yield from _argument_values(arguments[num_positional])
        elif arguments and arguments[-1].nargs == -1:
            yield from _argument_values(arguments[-1])


def _argument_values(argument: Any) -> Iterator[str]:
    metavar = argument.metavar or {"model": "MODEL"}.get(argument.name, "FILE")
    if "PRESET" in metavar:
        from qnext.config import PRESETS

        yield from (f"{name}\tpreset" for name in PRESETS)
    if "MODEL" in metavar:
        from qnext.checkpoint.nearby import cached_models

        yield from (f"{name}\tin the local cache" for name in cached_models())
        yield FILES if ".gguf" in metavar else FOLDERS
    elif "PRESET" not in metavar:
        yield from _values(metavar)


def _values(metavar: str) -> Iterator[str]:
    """Values of an option by what its help calls them."""
    if metavar in ("OUT", "FOLDER"):
        yield FOLDERS
    elif "|" in metavar and metavar == metavar.lower():
        yield from (f"{choice}\t" for choice in metavar.split("|"))
    elif not _NO_HINT.fullmatch(metavar):
        yield FILES


def _first_sentence(text: str | None) -> str:
    """One line, for menus."""
    return re.split(r"[.;] ", " ".join((text or "").split()), maxsplit=1)[0]
