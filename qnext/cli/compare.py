"""`qnext compare`: where two models, precisions, backends or adapters part, layer by layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.values import AsJson, Strict, option
from qnext.cli.terminal.progress import byte_progress
from qnext.cli.terminal.source import parse_tokens
from qnext.cli.terminal.text import note
from qnext.errors import UsageError
from qnext.text.files import read_user_text

if TYPE_CHECKING:
    from qnext.diagnostics.inside.sides import Side

_DTYPE, _SCHEME, _BACKEND = "float32|bfloat16", "SCHEME", "cpu|torch"


@dataclass(frozen=True)
class SideFlags:
    """How each model is loaded and run."""

    dtype: Annotated[str | None, typer.Option(metavar=_DTYPE, help="of the weights of A; default: as stored")] = None
    dtype_b: Annotated[str | None, typer.Option(metavar=_DTYPE, help="of the weights of B")] = None
    scheme: Annotated[str | None, typer.Option(metavar=_SCHEME, help="quantise A first, as `qnext quantize`")] = None
    scheme_b: Annotated[str | None, typer.Option(metavar=_SCHEME, help="quantise B first")] = None
    backend: Annotated[str | None, typer.Option(metavar=_BACKEND, help="that runs A; default: as ever")] = None
    backend_b: Annotated[str | None, typer.Option(metavar=_BACKEND, help="that runs B")] = None

    def sides(self, model: str, other: str) -> tuple[Side, Side]:
        from qnext.diagnostics.inside.sides import Side, second_side

        first = Side(model, self.dtype, self.scheme, None, self.backend)
        return first, second_side(first, other, dtype=self.dtype_b, scheme=self.scheme_b, backend=self.backend_b)


@dataclass(frozen=True)
class ReadFlags:
    """What both models read."""

    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="a text, by the tokenizer of A")] = None
    file: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text instead of TEXT")] = None
    tokens: Annotated[str | None, typer.Option(metavar="1,2,3|@FILE", help="token ids instead of a text")] = None
    random: Annotated[int, typer.Option(min=1, metavar="N", help="without a text: so many random ids")] = 64

    def token_ids(self, side: Side, vocab_size: int) -> list[int]:
        from qnext.diagnostics.inside.sides import random_ids, token_ids_of

        given = [self.text is not None, self.file is not None, self.tokens is not None]
        if sum(given) > 1:
            raise UsageError("give one of TEXT, --text FILE and --tokens")
        if self.tokens is not None:
            return parse_tokens(self.tokens)
        if not any(given):
            return random_ids(self.random, vocab_size)
        text = self.text if self.file is None else read_user_text(self.file)
        if not text:
            raise UsageError("the text is empty")
        return token_ids_of(text, side)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A: a folder, or the name of a pulled model")],
    other: Annotated[str, typer.Argument(metavar="MODEL2|RUN", help="B: another one, or a run or adapter on A")],
    *,
    reading: ReadFlags,
    sides: SideFlags,
    tolerance: Annotated[
        float, option("relative error that is no difference [default: 1e-3]", min=0.0, metavar="X", show_default=False)
    ] = 1e-3,
    exact: Annotated[bool, typer.Option("--exact", help="end with exit code 1 where any bit differs")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="errors by layer, .svg or .png")
    ] = None,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Print the first weight, layer and part in which two models differ, on the same tokens.

    They are loaded one after the other. A relative error is |a - b| / |a| over all tokens, and of the worst one. Parts
    are named as in docs/guide/look-inside.md. KL is that of the logits of B from A, in nats.
    """
    if picture is not None:
        from qnext.diagnostics.heatmap import check_picture

        check_picture(picture)
    first, second = sides.sides(model, other)
    configs = [side.check().config for side in (first, second)]
    from qnext.session.prefill import check_token_ids

    token_ids = reading.token_ids(first, min(config.vocab_size for config in configs))
    for config in configs:
        check_token_ids(token_ids, config)
    from qnext.diagnostics.inside.divergence import compare_passes
    from qnext.diagnostics.inside.sides import record_side

    passes = [record_side(side, token_ids, progress=byte_progress) for side in (first, second)]
    found = compare_passes(*passes, tolerance=tolerance)
    if picture is not None:
        from qnext.diagnostics.inside.show_divergence import write_divergence

        write_divergence(picture, found, title=f"{first.label} beside {second.label}: {len(token_ids)} tokens")
        note(str(picture))
    if as_json:
        print(json.dumps({"a": first.label, "b": second.label, **found.document()}))
    else:
        from qnext.diagnostics.inside.show_divergence import show_divergence

        show_divergence(found)
    if exact and not found.is_exact:
        raise typer.Exit(1)
