"""`qnext watermark`: keys that mark answers, and whether a text shows one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qnext.cli.flags.values import AsJson, option
from qnext.cli.parsing.command import VerbCommand, VerbGroup
from qnext.cli.parsing.records import with_flags

app = typer.Typer(
    cls=VerbGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Marks of answers that only a key shows: `qnext serve --watermark KEYFILE`, `qnext generate --watermark`.",
)


@app.command(cls=VerbCommand)
@with_flags
def create(
    file: Annotated[Path, typer.Argument(metavar="KEYFILE", help="the file to make; only its owner may read it")],
    *,
    scheme: Annotated[
        Literal["tournament", "green"],
        option("tournament keeps the quality; green also marks greedy answers, at a cost"),
    ] = "tournament",
    context: Annotated[int, option("tokens that decide the mark of the next: more resist theft, fewer edits")] = 4,
    layers: Annotated[int | None, option("of a tournament [default: 30]", show_default=False)] = None,
    gamma: Annotated[float | None, option("share of green tokens [default: 0.5]", show_default=False)] = None,
    delta: Annotated[float | None, option("added to logits of green tokens [default: 2]", show_default=False)] = None,
) -> None:
    """Make a key. Without it a mark can neither be found nor forged; keep it as long as texts are to be found."""
    from qnext.engine.policy.watermark_key import WatermarkKey
    from qnext.errors import UsageError
    from qnext.session.watermark import write_key

    own = {"layers": layers} if scheme == "tournament" else {"gamma": gamma, "delta": delta}
    others: dict[str, Any] = {"gamma": gamma, "delta": delta} if scheme == "tournament" else {"layers": layers}
    for name, value in others.items():
        if value is not None:
            raise UsageError(f"--{name} is nothing of a {scheme}")
    values = {name: value for name, value in own.items() if value is not None}
    key = WatermarkKey.new(scheme=scheme, context=context, **values)
    write_key(file, key)
    print(f"made key {key.name} ({scheme}); whoever reads {file} can find and forge its mark", file=sys.stderr)
    print(file)


@app.command(cls=VerbCommand)
@with_flags
def detect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a UTF-8 text; - reads standard input")],
    *,
    key: Annotated[Path, option("the key that it may be marked by", metavar="KEYFILE")],
    model: Annotated[str, option("a folder or hub name: the tokenizer of the model that answered", metavar="MODEL")],
    level: Annotated[float, option("the chance of calling a text marked that is not", min=1e-300, max=0.5)] = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Say whether a text shows the mark of a key: z-score, p-value, and the number of tokens that count.

    A text that repeats itself counts once. The p-value holds for texts that were written without the key. That there is
    no sign proves nothing: edits, translation, and predictable text leave none.
    """
    from qnext.cli.terminal.text import read_stdin
    from qnext.session.folder import open_folder
    from qnext.session.watermark import find_mark, read_key
    from qnext.text.files import read_user_text

    secret = read_key(key)
    text = read_stdin() if str(file) == "-" else read_user_text(file)
    found = find_mark(text, secret, open_folder(model).tokenizer, level=level)
    if as_json:
        values = {"key": secret.name, "scheme": secret.scheme, **found.score._asdict(), "level": level}
        print(json.dumps({**values, "is_marked": found.is_marked, "verdict": found.verdict}, indent=2))
        return
    shown = found.score
    print(f"{shown.num_scored:,} of {shown.num_tokens:,} tokens count, z = {shown.z:.2f}, p = {shown.p_value:.3g}")
    print(found.verdict)
