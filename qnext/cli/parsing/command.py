"""The command of a verb: help as plain text, MODEL also by a flag, mistakes in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import typer.core

from qnext.cli.parsing.config_file import flag_name
from qnext.cli.parsing.help import HelpRow, render, usage
from qnext.errors import UsageError, did_you_mean

# What users of llama.cpp, vLLM and SGLang type. Where MODEL is the first argument, these are another way to give it.
MODEL_FLAGS = ("-m", "--model", "--model-path")
HELP_FLAGS = ("-h", "--help")


class _PlainHelp:
    """Help as qnext.cli.parsing.help makes it."""

    def format_help(self, context: Any, formatter: Any) -> None:
        formatter.write(render(self, context) + "\n")


class VerbGroup(_PlainHelp, typer.core.TyperGroup):
    """A verb with commands of its own."""


class VerbCommand(_PlainHelp, typer.core.TyperCommand):
    """A verb, or a command of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        found: list[str] = super().parse_args(ctx, self.with_model_first(args))
        return found

    def extra_entries(self) -> Iterator[HelpRow]:
        """Flags that are no parameters."""
        if self.model_flags:
            yield HelpRow("General", f"{', '.join(self.model_flags)} MODEL", "MODEL by a flag instead of by its place.")
        if "--config" in (self.epilog or ""):
            yield HelpRow("General", "--config FILE", "Flags from a YAML or JSON file.")

    @property
    def model_flags(self) -> tuple[str, ...]:
        """The flags that stand for the first argument; none where that is no model, or the verb has one of them."""
        arguments = [parameter for parameter in self.params if parameter.param_type_name == "argument"]
        own = {flag for parameter in self.params for flag in parameter.opts}
        if not arguments or arguments[0].name != "model" or own & set(MODEL_FLAGS):
            return ()
        return MODEL_FLAGS

    def with_model_first(self, arguments: Sequence[str]) -> list[str]:
        """`-m X` anywhere becomes X in the first place. Raises UsageError where it stands twice or without a value."""
        takes_value = {
            flag
            for parameter in self.params
            if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False)
            for flag in parameter.opts
        }
        models: list[str] = []
        rest: list[str] = []
        waiting = iter(arguments)
        for word in waiting:
            flag, equals, value = word.partition("=")
            if word == "--":
                rest += [word, *waiting]
            elif flag in self.model_flags:
                models.append(value if equals else next(waiting, ""))
            elif word in takes_value:
                rest += [word, *([following] if (following := next(waiting, None)) is not None else [])]
            else:
                rest.append(word)
        if not models:
            return rest
        if len(models) > 1 or not models[0]:
            raise UsageError(f"{'/'.join(self.model_flags)}: takes one model")
        return [*models, *rest] if not models[0].startswith("-") else ["--", *models, *rest]


def mistake(error: Any, verb: str) -> str:
    """What click says of a wrong command line, as one line."""
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    name = context.command_path if context is not None else f"qnext {verb}"
    hint = f"; `{name} -h` lists the options"
    if hasattr(error, "possibilities") and context is not None:
        flags = [flag for each in context.command.params for flag in (*each.opts, *each.secondary_opts)]
        flags = [flag for flag in flags if flag.startswith("-")] + ["--config", *HELP_FLAGS]
        flags += getattr(context.command, "model_flags", ())
        return f"{name}: no option {error.option_name}" + (did_you_mean(error.option_name, flags) or hint)
    if hasattr(error, "param_type") and parameter is not None and context is not None:
        return f"{name}: {flag_name(parameter)} is missing; {usage(context)}"
    text = " ".join(error.format_message().split()).rstrip(".")
    if parameter is not None:
        variable = re.search(r" \(env var: .*?\)", parameter.get_error_hint())
        text = re.sub("Value error, |, unable to parse.*", "", error.message.strip().rstrip("."))
        text = text.replace("Input should be", "must be")
        return f"{name}: {flag_name(parameter)}{variable[0] if variable else ''}: {' '.join(text.split())}"
    if "unexpected extra" in text:
        text += f"; a value with spaces needs quotes; {usage(context)}"
    return f"{name}: {text[:1].lower()}{text[1:]}"
