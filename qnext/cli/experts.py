"""`qnext experts`: which experts a text goes to, layer by layer, and what quantisation has changed of that."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.sampling import DType, ExpertMemory, Speculation
from qnext.cli.flags.values import AsJson, Model, Strict
from qnext.cli.terminal.progress import byte_progress, token_progress
from qnext.cli.terminal.text import note, read_stdin
from qnext.errors import UsageError
from qnext.text.files import read_user_text

if TYPE_CHECKING:
    from qnext.diagnostics.experts import LayerComparison, LayerReport


@dataclass(frozen=True)
class TextFlags:
    """One text, from one of three places."""

    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="the text; - reads standard input")] = None
    file: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text instead of TEXT")] = None

    def read(self) -> str:
        """Raises UsageError for a text that is none."""
        if self.file is not None:
            return read_user_text(self.file)
        found = read_stdin() if self.text == "-" else self.text
        if not found:
            raise UsageError("the text is empty")
        return found


@dataclass(frozen=True)
class RunningFlags:
    """How MODEL is loaded and run."""

    speculation: Speculation = False
    dtype: DType = None
    expert_memory: ExpertMemory = None


def command(
    model: Model,
    *,
    source: TextFlags,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, metavar="N", help="count up to N tokens that the model goes on with")
    ] = 0,
    other: Annotated[
        str | None, typer.Option("--compare", metavar="MODEL2", help="the same tokens through this model too")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="hottest experts to name and to compare")] = 5,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="write a heat map of MODEL, .svg or .png")
    ] = None,
    running: RunningFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Print how evenly each layer uses its experts on a text.

    Entropy and balance (mean over highest count) are 1 where all experts do the same. With --compare: distance is the
    part of all choices that has moved, overlap the common part of the hottest experts. With --speculation drafted
    tokens count as well, and the MTP layer that drafts them.
    """
    if (source.text is None) == (source.file is None):
        raise UsageError("give one text: TEXT, --text FILE, or - for standard input")
    if picture is not None:
        from qnext.diagnostics.heatmap import check_picture

        check_picture(picture)
    if other is not None and running.speculation:
        raise UsageError("--compare counts the same tokens in both models, but --speculation counts drafts too")
    from qnext.diagnostics.experts import ExpertQuestion, check_pair, compare, experts_document, experts_of_folder
    from qnext.session.folder import open_folder

    folder = open_folder(model, expert_memory=running.expert_memory)
    second = None if other is None else open_folder(other)
    token_ids = folder.tokenizer.encode(source.read())
    if second is not None:
        check_pair(folder, second)
    dtype = running.dtype
    count = partial(experts_of_folder, loading=byte_progress, counting=token_progress)
    layers, answer = count(folder, token_ids, ExpertQuestion(top, dtype, max_tokens, bool(running.speculation)))
    others: list[LayerReport] = []
    comparisons: list[LayerComparison] = []
    if second is not None:
        others, _ = count(second, [*token_ids, *answer], ExpertQuestion(top, dtype))
        comparisons = compare(layers, others)
    if picture is not None:
        _draw(picture, layers, f"{model}: load of the experts, {len(token_ids) + len(answer):,} tokens")
    if as_json:
        document = {"model": model, "tokens": len(token_ids), "generated": len(answer)}
        print(json.dumps({**document, **experts_document(layers, other, others, comparisons)}))
    else:
        from qnext.diagnostics.tables import show_experts

        show_experts(layers, comparisons)
    for each in comparisons:
        if each.alert:
            print(f"qnext experts: {each.alert}", file=sys.stderr)


def _draw(path: Path, layers: list[LayerReport], title: str) -> None:
    from qnext.diagnostics.experts import relative_loads
    from qnext.diagnostics.heatmap import write_picture

    write_picture(path, relative_loads(layers), labels=[layer.label for layer in layers], title=title)
    note(str(path))
