"""qnext quantize: a model folder in four or eight bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli._types import Strict
from qnext.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from qnext.checkpoint.quantize import TextSample
    from qnext.config import ModelConfig

_MIN_TOKENS = 64
_SEQUENCE_LENGTH = 2048
_EVALUATION_SHARE = 5  # every fifth sequence is measured on and never calibrated on
_METHODS = ("gptq", "nearest")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model folder: bf16, fp16, fp32 or official FP8")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make; must be new or empty")],
    scheme: Annotated[str, typer.Option(help="int4-g32|int4-g64|int4-g128|int8|int8-g32|int8-g64|int8-g128")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text to calibrate and measure on; without, round nearest")
    ] = None,
    method: Annotated[str, typer.Option(help="with --text: gptq, or nearest to measure only")] = "gptq",
    head: Annotated[
        str | None, typer.Option(metavar="keep|int8|int4", help="the output matrix [default: int8; keep where tied]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=_MIN_TOKENS, help="of the text, at most; spread over all of it")] = 131072,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="write the quality report there, as JSON")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the quality report on stdout, as JSON")] = False,
    strict: Strict = False,
) -> None:
    """Quantise a model and report what it cost.

    The layout is compressed-tensors' pack-quantized. Layers are read, rounded and written one at a time. With --text
    four fifths of its sequences calibrate GPTQ; KL, perplexity and the routers' choices are measured on the rest.
    """
    from qnext.checkpoint.check import read_layout
    from qnext.checkpoint.header import read_index
    from qnext.checkpoint.quantize import quantize_folder
    from qnext.checkpoint.resolve import resolve_model
    from qnext.cli._progress import byte_progress
    from qnext.files import write_file
    from qnext.quant.scheme import find_scheme, make_policy

    if method not in _METHODS:
        raise UsageError(f"--method {method}: must be {' or '.join(_METHODS)}")
    find_scheme(scheme)
    if report is not None and report.exists():
        raise UsageError(f"{report}: exists already")
    source = resolve_model(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty")
    config = read_layout(source, read_index(source).tensors).config
    policy = make_policy(scheme, head=head, is_tied=config.tie_word_embeddings)
    sample = None if text is None else _read_sample(text, source, config, tokens)
    with byte_progress("quantising") as progress:
        result = quantize_folder(
            source, out, policy=policy, sample=sample, is_calibrated=method == "gptq", progress=progress
        )
    document = json.dumps(result.to_json(), indent=2)
    print(document if as_json else result.table(), file=sys.stdout if as_json else sys.stderr)
    if report is not None:
        write_file(report, document + "\n")
    if not as_json:
        print(out)


def _read_sample(text: Path, folder: Path, config: ModelConfig, max_tokens: int) -> TextSample:
    """Sequences spread evenly over the text, as many as `max_tokens` allows."""
    import torch

    from qnext.checkpoint.quantize import TextSample
    from qnext.text.tokenizer import Tokenizer
    from qnext.training.sources import read_text

    tokenizer = Tokenizer.from_folder(folder, num_rows=config.vocab_size)
    ids = torch.tensor(tokenizer.encode(read_text(text)), dtype=torch.long)
    if len(ids) < _MIN_TOKENS:
        raise UsageError(f"{text}: {len(ids)} tokens, at least {_MIN_TOKENS} are needed")
    longest = min(_SEQUENCE_LENGTH, config.max_position_embeddings)
    length = max(1, min(longest, len(ids) // _EVALUATION_SHARE, max_tokens // _EVALUATION_SHARE))
    pieces: list[Tensor] = [piece for piece in ids.split(length + 1) if len(piece) > 1]
    wanted = min(len(pieces), max(_EVALUATION_SHARE, max_tokens // length))
    pieces = [pieces[i * len(pieces) // wanted] for i in range(wanted)]
    # The middle of each five: a text's end often differs from its bulk.
    is_measured = [i % _EVALUATION_SHARE == _EVALUATION_SHARE // 2 for i in range(wanted)]
    return TextSample(
        [piece for piece, measured in zip(pieces, is_measured, strict=True) if not measured],
        [piece for piece, measured in zip(pieces, is_measured, strict=True) if measured],
    )
