"""The command line: one file per verb. A verb's module is imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from qnext import __version__

# verb -> one line of help; `qnext/cli/<verb>.py` holds a typer command called `command`, or several as `app`
VERBS = {
    "demo": "train a small Qwen3-Next on the Python library on this machine, then talk to it",
    "init": "make a model folder with random weights",
    "pull": "download a model from the Hugging Face hub",
    "inspect": "parameters by part, active parameters, dtypes, shapes",
    "verify": "check every tensor of a model folder",
    "logits": "token ids in, logits to a .npy file",
    "generate": "complete a prompt",
    "chat": "talk to a model",
    "train": "train by a recipe",
    "eval": "bits per byte on text files",
    "quantize": "a model folder in four or eight bits, and what that cost",
    "bench": "speed, loading and memory, beside peers and the limits of the machine",
    "convert": "a model folder to GGUF, for llama.cpp, and back",
    "keys": "API keys of a server: create, list, show, revoke, rotate",
}

_USAGE = """usage: qnext VERB [options]        qnext VERB --help for the options of a verb

{verbs}

  --version    print the version
exit codes: 0 ok, 2 usage, 3 model not found, 4 does not fit, 5 corrupt checkpoint, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `qnext` command; ends the process with the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(_USAGE.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())), end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        sys.exit(0)
    if arguments[0] not in VERBS:
        print(f"qnext: no verb {arguments[0]!r}; `qnext --help` lists them", file=sys.stderr)
        sys.exit(2)
    sys.exit(_run(arguments[0], arguments[1:]))


def _run(verb: str, arguments: list[str]) -> int:
    import typer

    from qnext.errors import QnextError

    module = importlib.import_module(f"qnext.cli.{verb}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(module.command)
    try:
        app(arguments, prog_name=f"qnext {verb}")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except QnextError as error:
        print(f"qnext {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"qnext {verb}: {error.filename or ''}: {error.strerror or error}".replace(": : ", ": "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
