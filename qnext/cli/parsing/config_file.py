"""Where the flags of a verb come from beside its command line: `--config FILE`, then the environment.

A flag of the command line counts first, then the file, then `QNEXT_<VERB>_<FLAG>`, then the default.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qnext.errors import UsageError
from qnext.text.mappings import read_user_mapping

EPILOG = (
    "Any flag can also come from a file (--config FILE, YAML or JSON: flag names and their values) or from the "
    "environment (QNEXT_{verb}_FLAG)."
)


class _FlagName(NamedTuple):
    """What a key of the file stands for: a parameter of the verb, perhaps with its value turned round."""

    parameter: Any
    is_negative: bool  # the second half of --chat/--no-chat


def take_config(verb: str, arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Arguments without `--config FILE`, and the file; where there is none, that of `QNEXT_<VERB>_CONFIG`.

    Raises UsageError where the flag stands twice or without a file.
    """
    rest: list[str] = []
    files: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            rest += [argument, *waiting]
        elif argument == "--config":
            files.append(next(waiting, ""))
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if len(files) > 1:
        raise UsageError("--config: only one file")
    if files and not files[0]:
        raise UsageError("--config needs a file")
    name = files[0] if files else os.environ.get(f"{_prefix(verb)}_CONFIG", "")
    return rest, Path(name).expanduser() if name else None


def read_flags(path: Path, verb: str, command: Any, verbs: Collection[str]) -> dict[str, Any]:
    """Values of the file by parameter name, for click's `default_map`.

    The file is one mapping of flags, or a mapping of verbs to such mappings; then what stands there for other verbs is
    not looked at. Raises UsageError, which names the file and the key.
    """
    flags = read_user_mapping(path)
    sections = [key for key, value in flags.items() if key in verbs and (value is None or isinstance(value, dict))]
    place = f"{path}"
    if sections:
        if len(sections) < len(flags):
            other = next(key for key in flags if key not in sections)
            raise UsageError(f"{path}: {other}: is no verb, but {sections[0]} is; flags stand under their verb then")
        if verb not in flags:
            raise UsageError(f"{path}: has flags for {', '.join(sections)}, none for {verb}")
        flags, place = flags[verb] or {}, f"{path}: {verb}"
    names = _names(command)
    values: dict[str, Any] = {}
    for key, value in flags.items():
        name = names.get(_plain(key))
        if name is None:
            near = difflib.get_close_matches(_plain(key), names, n=1, cutoff=0.0)
            nearest = flag_name(names[near[0]].parameter) if near else "none"
            raise UsageError(f"{place}: {key}: qnext {verb} has no such flag; the nearest is {nearest}")
        if name.parameter.name in values:
            raise UsageError(f"{place}: {key}: the same flag stands there twice")
        if value is not None:
            values[name.parameter.name] = _value(f"{place}: {key}", name, value)
    return values


def apply_environment(verb: str, command: Any, from_file: Collection[str]) -> None:
    """Give each flag its variable, except those that the file has set.

    Only variables that are set are named in help and errors.
    """
    for parameter in command.params:
        if not hasattr(parameter, "allow_from_autoenv"):  # an argument
            continue
        parameter.show_envvar = False
        if parameter.name in from_file:
            continue
        for flag in sorted(parameter.opts, key=len, reverse=True):
            variable = f"{_prefix(verb)}_{_plain(flag).replace('-', '_').upper()}"
            if os.environ.get(variable):
                parameter.envvar, parameter.show_envvar = variable, True
                break


def flag_name(parameter: Any) -> str:
    """What users call a parameter: `--max-tokens`, or MODEL for an argument."""
    longest: str = max(parameter.opts, key=len)
    return longest if longest.startswith("-") else str(parameter.metavar or longest).upper()


def _prefix(verb: str) -> str:
    return f"QNEXT_{verb.replace('-', '_').upper()}"


def _plain(key: object) -> str:
    """
    >>> _plain("--max_tokens")
    'max-tokens'
    """
    return str(key).lstrip("-").replace("_", "-").lower()


def _names(command: Any) -> dict[str, _FlagName]:
    names: dict[str, _FlagName] = {}
    for parameter in command.params:
        names.update((_plain(flag), _FlagName(parameter, False)) for flag in parameter.opts)
        names.update((_plain(flag), _FlagName(parameter, True)) for flag in parameter.secondary_opts)
    return names


def _value(place: str, name: _FlagName, value: Any) -> Any:
    """A value as click would have it from a command line: text, a list of texts, or whether a switch is on."""
    parameter = name.parameter
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{place}: is a switch, true or false, not {value!r}")
        return value is not name.is_negative
    if parameter.nargs != 1 or getattr(parameter, "multiple", False):
        return [_text(place, each) for each in (value if isinstance(value, list) else [value])]
    return _text(place, value)


def _text(place: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        raise UsageError(f"{place}: takes a value; where the word itself is meant, put it in quotes")
    if isinstance(value, list):
        raise UsageError(f"{place}: takes one value, not a list")
    try:
        return json.dumps(value) if isinstance(value, dict) else str(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{place}: {error}") from None
