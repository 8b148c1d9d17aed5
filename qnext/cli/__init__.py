"""The command line: one file per verb, which parses, calls and prints. Nothing else lives here.

May touch everything, and nobody imports from here. A new verb is a file with a `command` and a line of `VERBS`; flags
that belong together are a record (parsing/records.py) in `flags`, what people see is in `terminal`, and what is not
about the terminal belongs to another room. A verb's module is imported only when it is called, and what is heavy
inside its functions.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings

from qnext.interrupts import Ending, Terminated
from qnext.version import __version__

TYPE_CHECKING = False  # as in typing, whose import would leave Ctrl-C without a handler for longer
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

# verb -> one line of help; `qnext/cli/<verb>.py` holds a typer command called `command`, or several as `app`
VERBS = {
    "demo": "train a small Qwen3-Next on the Python library of this machine, then let it complete code",
    "init": "make a model folder with random weights",
    "pull": "download a model from the Hugging Face hub",
    "inspect": "parameters by part, active parameters, dtypes, shapes",
    "plan": "what fits into memory, and how fast it will be, before anything is loaded",
    "verify": "check every tensor of a model folder",
    "logits": "token ids in, logits to a .npy file",
    "generate": "complete a prompt",
    "chat": "talk to a model, in the terminal",
    "serve": "a model behind OpenAI's and Anthropic's APIs, with a page",
    "run-batch": "answer a file of requests, here or by a running server",
    "train": "train by a recipe",
    "watch": "the page of a training run that goes on or has ended",
    "train-sft": "teach a model to answer as your chats do, as `qnext train sft`",
    "train-gspo": "let a model answer problems and learn from what is right, as `qnext train gspo`",
    "train-reason": "train a small model from random weights to think, as `qnext train reason`",
    "train-dpo": "teach a model to prefer the better of two answers, as `qnext train dpo`",
    "train-distill": "teach a model what a larger one knows, as `qnext train distill`",
    "eval": "bits per byte on text files",
    "eval-bias": "what changes when a group is exchanged in a sentence, as `qnext eval bias`",
    "eval-docs": "questions about your documents, with checked citations, as `qnext eval docs`",
    "eval-harness": "tasks of lm-evaluation-harness and the announcement's tables, as `qnext eval harness`",
    "eval-quant": "what a quantised folder lost against a reference, as `qnext eval quant`",
    "eval-speed": "latency by context, of the first request and sustained, as `qnext eval speed`",
    "eval-tasks": "generated tasks by length and depth, as `qnext eval tasks`",
    "quantize": "a model folder in four or eight bits, and what that cost",
    "bench": "speed, loading and memory, beside peers and the limits of the machine",
    "bench-serve": "a load on a running server, as `qnext bench serve`",
    "claims": "the published claims about the architecture, run here beside the published numbers",
    "convert": "a model folder to GGUF, for llama.cpp, and back",
    "merge": "a LoRA adapter becomes part of a model folder",
    "keys": "API keys of a server: create, list, show, revoke, rotate",
    "audit": "whether the audit log of a server is whole, as `qnext audit verify`",
    "audit-verify": "whether each line of an audit log follows the one before, and none is missing",
    "audit-show": "the records of an audit log: by key, time, request, and their sums",
    "audit-trace": "what one answer came from, and whether a folder is the same model",
    "watermark": "keys that mark answers, and whether a text shows one",
    "experts": "which experts a text goes to, and what quantisation changed of that",
    "attention": "where a model looks and what its states keep on a text, layer by layer",
    "compare": "the first layer and part in which two models, precisions, backends or adapters differ",
    "doctor": "what the machine and a model offer, and what is in the way",
    "completion": "a script that completes verbs, flags and models in bash, zsh or fish",
}

# What other programs call these verbs.
_SYNONYMS = {
    "run": "chat",
    "talk": "chat",
    "complete": "generate",
    "download": "pull",
    "info": "inspect",
    "api": "serve",
    "check": "verify",
    "perplexity": "eval",
    "new": "init",
    "export": "convert",
}

_USAGE = """usage: qnext VERB [options]        qnext VERB -h               options of a verb
                                   qnext VERB --help=memory    those that mention a word

{verbs}

  --version    print the version
exit codes: 0 ok, 2 usage, 3 model not found, 4 does not fit, 5 corrupt checkpoint,
            6 not supported, 7 a rank was lost, 130 interrupted, 143 ended by SIGTERM
"""


_BROKEN_PIPE = 128 + 13  # what shells see of a program that SIGPIPE has ended


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `qnext` command; ends the process with the exit code."""
    ending = Ending()
    code = 1
    try:
        ending.begin()
        _open_closed_streams()
        code = _ended_by_signals(list(sys.argv[1:] if arguments is None else arguments), ending)
    finally:
        ending.end(is_last=arguments is None)
    sys.exit(code)


def _open_closed_streams() -> None:
    """A stream that was closed (`>&-`) is opened to nothing, so that no file of ours gets its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _ended_by_signals(arguments: list[str], ending: Ending) -> int:
    """The exit code, be it a signal's or that of a reader of stdout who left."""
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code if ending.number is None or code == 0 else 128 + ending.number
    except OSError as error:
        _drop_stdout()
        if isinstance(error, BrokenPipeError):
            return _BROKEN_PIPE
        from qnext.errors import FULL, DiskFull

        print(f"qnext: standard output: {error.strerror}", file=sys.stderr)
        return DiskFull.exit_code if error.errno in FULL else 2
    except BaseException as error:
        # Libraries make other errors of an exception that comes in their midst.
        if ending.number is None and not isinstance(error, (KeyboardInterrupt, Terminated)):
            raise
        code = error.code if isinstance(error, Terminated) else 128 + (ending.number or signal.SIGINT)
        print("interrupted" if code == 130 else "terminated", file=sys.stderr)
        return code


def _stdout_fails() -> bool:
    """Whether it was stdout that an error without a name is of; what it holds is dropped then."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
        return True
    return False


def _drop_stdout() -> None:
    """Have what Python still holds for stdout go nowhere when the process ends."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return  # not a file: a caller's own
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _dispatch(arguments: list[str]) -> int:
    arguments = _joined_verb(arguments)
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = _joined_verb([*arguments[1:], "--help"])
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(_USAGE.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())), end="")
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V", "version"):
        print(__version__)
        return 0
    if arguments[0].startswith("--help="):
        from qnext.cli.parsing.help import print_matching_everywhere

        print_matching_everywhere(list(VERBS), click_command, arguments[0].partition("=")[2])
        return 0
    if arguments[0] not in VERBS:
        _say(f"qnext: no verb {arguments[0]!r}{_verb_hint(arguments[0])}")
        return 2
    with warnings.catch_warnings():
        _show_warnings(arguments[0])
        return _run(arguments[0], arguments[1:])


def _say(line: str) -> None:
    from qnext.errors import one_line

    print(one_line(line), file=sys.stderr)


def _joined_verb(words: list[str]) -> list[str]:
    """The two words of a verb may stand apart: `bench serve` is `bench-serve`."""
    joined = "-".join(words[:2])
    return [joined, *words[2:]] if len(words) > 1 and joined in VERBS else words


def _verb_hint(word: str) -> str:
    from qnext.errors import did_you_mean

    if word in _SYNONYMS:
        return f"; did you mean {_SYNONYMS[word]}?"
    return did_you_mean(word, VERBS) or "; `qnext --help` lists them"


def click_command(verb: str) -> Any:
    """The click command of a verb. Imports its module, nothing heavier."""
    import typer

    from qnext.cli.parsing.command import HELP_FLAGS, VerbCommand
    from qnext.cli.parsing.config_file import EPILOG
    from qnext.cli.parsing.help import example
    from qnext.cli.parsing.records import with_flags

    name = verb.replace("-", "_")
    module = importlib.import_module(f"qnext.cli.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(cls=VerbCommand, epilog=EPILOG.format(verb=name.upper()))(with_flags(module.command))
    command = typer.main.get_command(app)
    command.context_settings["help_option_names"] = list(HELP_FLAGS)  # commands of a group inherit them
    for each in getattr(command, "commands", {"": command}).values():
        each.epilog = f"{each.epilog or ''} {example(each)} prints the options that mention that word.".strip()
    return command


def _run(verb: str, arguments: list[str]) -> int:
    from qnext.cli.parsing.config_file import apply_environment, flag_name, read_flags, take_config
    from qnext.cli.parsing.requirements import check_torch, missing
    from qnext.errors import FULL, DiskFull, QnextError, line_of

    try:
        command = click_command(verb)
        arguments, file = take_config(verb, arguments)
        flags = {} if file is None else read_flags(file, verb, command, VERBS)
        apply_environment(verb, command, flags)
        word = _help_word(arguments)
        if word is not None:
            from qnext.cli.parsing.help import print_matching

            print_matching(verb, command, word)
            return 0
        if not {"-h", "--help"} & set(arguments):
            check_torch(verb)
        code = _call(command, verb, arguments, flags)
        if code == 2 and flags:
            given = ", ".join(flag_name(parameter) for parameter in command.params if parameter.name in flags)
            _say(f"qnext {verb}: {file} has given {given}")
        return code
    except QnextError as error:
        _say(f"qnext {verb}: {error}")
        return error.exit_code
    except ImportError as error:
        text = missing(error)
        if text is None:
            raise
        _say(f"qnext {verb}: {text}")
        return 2
    except BrokenPipeError:
        raise  # the reader of stdout has left
    except OSError as error:
        if error.filename is None and _stdout_fails():
            error.filename = "standard output"
        _say(f"qnext {verb}: {line_of(error)}")
        return DiskFull.exit_code if error.errno in FULL else 2


def _show_warnings(verb: str) -> None:
    """A QnextWarning is one line on stderr, the same line once."""
    from qnext.errors import QnextWarning

    show = warnings.showwarning
    shown: set[str] = set()

    def show_line(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, QnextWarning):
            show(message, category, *rest, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            _say(f"qnext {verb}: warning: {message}")

    warnings.simplefilter("always", QnextWarning)
    warnings.showwarning = show_line


def _call(command: Any, verb: str, arguments: list[str], flags: dict[str, Any]) -> int:
    import typer

    from qnext.cli.parsing.command import mistake

    try:
        # What `command.main` does, but for signals and broken pipes, which it makes exit codes without a word.
        with command.make_context(f"qnext {verb}", arguments, default_map=flags) as context:
            code = command.invoke(context)
    except typer.Exit as exit_:
        return exit_.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own errors have it, whichever click typer has
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
        else:
            _say(mistake(error, verb))
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


def _help_word(arguments: list[str]) -> str | None:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return next((argument[len("--help=") :] for argument in options if argument.startswith("--help=")), None)
