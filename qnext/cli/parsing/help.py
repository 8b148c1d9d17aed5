"""The help of a verb as plain text: names of flags are never cut, whatever the width, and a word finds its options."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_MOST_COLUMNS = 100
_INDENT = "  "
_KINDS = {"int": "N", "float": "X", "str": "TEXT", "text": "TEXT", "list": "TEXT", "path": "PATH", "file": "PATH"}


class HelpRow(NamedTuple):
    """An argument, a flag or a command: its section, what is typed, and its help."""

    section: str
    names: str
    text: str


def render(command: Any, context: Any) -> str:
    """The whole help of a verb, or of a group of commands."""
    width = _width()
    found = list(entries(command, context))
    parts = [_wrap(usage(context), width, indent=" " * len("usage: "), first="")]
    parts += [_wrap(text, width) for text in _paragraphs(command.help)]
    sections = dict.fromkeys(entry.section for entry in found)
    parts += [
        "\n".join([f"{section}:", *_rows([entry for entry in found if entry.section == section], width)])
        for section in sections
    ]
    parts += [_wrap(text, width) for text in _paragraphs(command.epilog)]
    return "\n\n".join(parts)


def usage(context: Any) -> str:
    """One line: what is typed."""
    words = [context.command_path]
    for parameter in context.command.params:
        if parameter.param_type_name == "argument" and not parameter.hidden:
            words.append(_argument_name(parameter))
    words.append("[OPTIONS]" if not hasattr(context.command, "commands") else "COMMAND [OPTIONS]")
    return "usage: " + " ".join(words)


def print_matching(verb: str, command: Any, word: str) -> None:
    """Options of a verb that mention `word`, with their help; one line on stderr where none does."""
    found = list(_matching(verb, command, word))
    if found:
        print("\n".join(_rows(found, _width())))
    else:
        print(f"qnext {verb}: no option mentions {word!r}; {example(command)} is one that does", file=sys.stderr)


def print_matching_everywhere(verbs: Sequence[str], command_of: Any, word: str) -> None:
    """The same for all verbs, each under its name."""
    parts = []
    for verb in verbs:
        found = list(_matching(verb, command_of(verb), word))
        if found:
            parts.append("\n".join([f"qnext {verb}:", *_rows(found, _width())]))
    if parts:
        print("\n\n".join(parts))
    else:
        print(f"qnext: no option of any verb mentions {word!r}", file=sys.stderr)


def example(command: Any) -> str:
    """`--help=` with a word that finds something among the options of this command."""
    flags = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")]
    return f"--help={min(flags or ['--help'], key=lambda flag: flag.count('-')).removeprefix('--')}"


def entries(command: Any, context: Any) -> Iterator[HelpRow]:
    """Arguments first, then flags in the order of their sections; what every verb has comes last."""
    parameters = command.get_params(context)
    for parameter in parameters:
        if parameter.param_type_name == "argument" and (record := parameter.get_help_record(context)):
            yield HelpRow("Arguments", _argument_name(parameter), record[1])
    general = []
    for parameter in parameters:
        if parameter.param_type_name == "argument" or (record := parameter.get_help_record(context)) is None:
            continue
        entry = HelpRow(getattr(parameter, "rich_help_panel", None) or "Options", _flag_names(parameter, record[0]), "")
        if "--help" in parameter.opts:
            general.append(entry._replace(section="General", text="Show this text and end."))
        else:
            yield entry._replace(text=record[1])
    for name, child in getattr(command, "commands", {}).items():
        yield HelpRow("Commands", name, (child.help or "").partition("\n")[0])
    yield from getattr(command, "extra_entries", list)()
    yield from general


def _matching(verb: str, command: Any, word: str) -> Iterator[HelpRow]:
    """Entries that have every piece of `word` somewhere, in either case; who copies the placeholder WORD gets all."""
    commands = {verb: command, **{f"{verb} {name}": child for name, child in getattr(command, "commands", {}).items()}}
    pieces = [] if word == "WORD" else _plain(word).split()
    for path, each in commands.items():
        context = each.make_context(f"qnext {path}", [], resilient_parsing=True)
        with context:
            for entry in entries(each, context):
                if all(piece in _plain(" ".join(entry)) for piece in pieces):
                    yield entry


def _plain(text: str) -> str:
    return re.sub("[-_]", " ", text).casefold()


def _argument_name(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name.upper()) + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _flag_names(parameter: Any, shown: str) -> str:
    """Short names first; the kind of value last. `shown` is what typer calls them."""
    names = ", ".join(sorted(parameter.opts, key=lambda name: name.startswith("--")))
    if parameter.secondary_opts:
        names += f", {', '.join(parameter.secondary_opts)}"
    if parameter.is_flag:
        return names
    kind = parameter.metavar or shown.rsplit(parameter.opts[-1], 1)[-1].strip(" <>[]")
    return f"{names} {_KINDS.get(re.split(r'[ [<]', kind.lower().replace('integer', 'int'))[0], kind)}"


def _rows(found: Sequence[HelpRow], width: int) -> Iterator[str]:
    """Two columns; a name that is too long for the first has a line, or lines, of its own."""
    column = min(max(len(entry.names) for entry in found) + 4, max(10, min(30, width // 3)))
    for entry in found:
        text = _wrap(" ".join(entry.text.split()), width, indent=" " * column)
        if not entry.text:
            yield _INDENT + entry.names
        elif len(entry.names) + 4 <= column:
            yield f"{_INDENT}{entry.names:<{column - 2}}" + text[column:]
        else:
            yield _wrap(entry.names, width, indent=_INDENT * 2, first=_INDENT)
            yield text


def _wrap(text: str, width: int, *, indent: str = "", first: str | None = None) -> str:
    """Lines of at most `width` characters. Words stay whole, but long lists of choices break after a bar or comma."""
    pieces = (
        re.sub(r"(?<=[|,])(?=\S{12})", "\0", text).replace("\0", "\x1f ") if len(text) > width - len(indent) else text
    )
    lines = textwrap.wrap(
        pieces,
        max(width, len(indent) + 12),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return re.sub("\x1f ?", "", "\n".join(lines))


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text or "") if part.strip()]


def _width() -> int:
    return max(20, min(_MOST_COLUMNS, shutil.get_terminal_size((80, 24)).columns))
