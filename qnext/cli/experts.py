"""`qnext experts`: which experts a text goes to, layer by layer, and what quantisation has changed of that."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli._sampling import DType, Speculation
from qnext.cli._types import Strict
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.cli._experts import LayerComparison, LayerReport
    from qnext.cli._text_model import TextFolder

_PICTURES = (".png", ".svg")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder or a hub name")],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="the text; - reads standard input")] = None,
    file: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text instead of TEXT")] = None,
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
    speculation: Speculation = False,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, with every count")] = False,
    strict: Strict = False,
) -> None:
    """Print how evenly each layer uses its experts on a text.

    Entropy and balance (mean over highest count) are 1 where all experts do the same. With --compare: distance is the
    part of all choices that has moved, overlap the common part of the hottest experts. With --speculation drafted
    tokens count as well, and the MTP layer that drafts them.
    """
    if (text is None) == (file is None):
        raise UsageError("give one text: TEXT, --text FILE, or - for standard input")
    if picture is not None and picture.suffix.lower() not in _PICTURES:
        raise UsageError(f"{picture}: pictures are {' or '.join(_PICTURES)}")
    if picture is not None and not picture.parent.is_dir():
        raise UsageError(f"{picture.parent}: no such folder for the picture")
    if other is not None and speculation:
        raise UsageError("--compare counts the same tokens in both models, but --speculation counts drafts too")
    from qnext.cli._experts import compare, layer_document
    from qnext.cli._text_model import open_folder

    folder = open_folder(model)
    second = None if other is None else open_folder(other)
    token_ids = folder.tokenizer.encode(_read(text, file))
    if second is not None:
        _check_pair(folder, second)
    layers, answer = _count(folder, dtype, token_ids, max_tokens=max_tokens, top=top, speculation=bool(speculation))
    document: dict[str, Any] = {
        "model": model, "tokens": len(token_ids), "generated": len(answer),
        "layers": [layer_document(layer) for layer in layers],
    }  # fmt: skip
    comparisons: list[LayerComparison] = []
    if second is not None:
        others, _ = _count(second, dtype, [*token_ids, *answer], top=top)
        comparisons = compare(layers, others)
        document["compare"] = {
            "model": other, "layers": [layer_document(layer) for layer in others],
            "comparison": [asdict(each) for each in comparisons],
            "alerts": [each.alert for each in comparisons if each.alert],
        }  # fmt: skip
    if picture is not None:
        _draw(picture, layers, f"{model}: load of the experts, {len(token_ids) + len(answer):,} tokens")
    if as_json:
        print(json.dumps(document))
    else:
        _print(layers, comparisons)
    for each in comparisons:
        if each.alert:
            print(f"qnext experts: {each.alert}", file=sys.stderr)


def _read(text: str | None, file: Path | None) -> str:
    try:
        if file is not None:
            found = file.read_text(encoding="utf-8")
        else:
            found = sys.stdin.read() if text == "-" else text or ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{file or 'standard input'}: is not UTF-8 text: {error}") from None
    if not found:
        raise UsageError("the text is empty")
    return found


def _check_pair(first: TextFolder, second: TextFolder) -> None:
    """Before weights are read: the same ids must mean the same, and layers and experts be as many."""
    a, b = first.config, second.config
    shapes = [(c.num_hidden_layers, c.num_experts, c.num_experts_per_tok, c.vocab_size) for c in (a, b)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"{second.path}: {shapes[1]} layers, experts, chosen ones and tokens of the vocabulary, but {first.path} "
            f"has {shapes[0]}"
        )


def _count(
    folder: TextFolder,
    dtype: str | None,
    token_ids: Sequence[int],
    *,
    top: int,
    max_tokens: int = 0,
    speculation: bool = False,
) -> tuple[list[LayerReport], list[int]]:
    """Load a model, count, and let go of it."""
    from qnext.cli._experts import count_experts, report
    from qnext.cli._progress import token_progress
    from qnext.cli._text_model import end_token_ids, load_weights

    config = folder.config
    if not config.num_experts:
        raise UsageError(f"{folder.path}: the model has no experts")
    network = load_weights(folder, dtype)
    with token_progress("counting") as progress:
        load, answer = count_experts(
            network, token_ids, max_tokens=max_tokens, speculation=speculation,
            eos_token_ids=end_token_ids(folder.tokenizer, config), progress=progress,
        )  # fmt: skip
    del network
    gc.collect()  # before the next model is loaded
    layers = report(load, num_trunk_layers=config.num_hidden_layers, top_k=config.num_experts_per_tok, num_hottest=top)
    return layers, answer


def _draw(path: Path, layers: list[LayerReport], title: str) -> None:
    from qnext.cli._experts import relative_loads
    from qnext.cli._heatmap import png, svg
    from qnext.files import write_file

    loads_LE = relative_loads(layers)
    if path.suffix.lower() == ".png":
        write_file(path, png(loads_LE))
    else:
        write_file(path, svg(loads_LE, labels=[layer.label for layer in layers], title=title))
    print(path, file=sys.stderr)


def _print(layers: list[LayerReport], comparisons: list[LayerComparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layer", "tokens", "entropy", "balance", "top 1 %", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    if comparisons:
        for name in ("distance", "overlap", "change of entropy", "newly dead"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("hottest")
    for index, layer in enumerate(layers):
        row = [
            layer.label, f"{layer.num_tokens:,}", f"{layer.entropy:.3f}", f"{layer.balance:.3f}",
            f"{layer.top_percent:.1%}", str(len(layer.dead)),
        ]  # fmt: skip
        if comparisons:
            each = comparisons[index]
            row += [
                f"{each.distance:.1%}", f"{each.overlap:.0%}", f"{each.entropy_change:+.3f}", str(len(each.newly_dead)),
            ]  # fmt: skip
        table.add_row(*row, " ".join(f"{expert}:{share:.1%}" for expert, share in layer.hottest))
    # A pipe has no width to keep to.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
