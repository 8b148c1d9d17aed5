"""`qnext init`: a model folder with random weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags.values import AsRecords, option

if TYPE_CHECKING:
    from qnext.config import ModelConfig
    from qnext.quant.scheme import QuantPolicy

_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class ShapeFlags:
    """What differs from the preset."""

    layers: Annotated[int | None, option("layers of the trunk; the pattern of layer kinds is kept")] = None
    experts: Annotated[int | None, option("routed experts per layer")] = None
    experts_per_token: Annotated[int | None, option("experts that each token goes to")] = None
    vocab_size: Annotated[int | None, option("rows of the embedding and the head")] = None
    mtp: Annotated[bool, option("with the multi-token prediction layer", "--mtp/--no-mtp")] = True


def command(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="a named configuration; a wrong name lists them")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make; must be new or empty")],
    *,
    shape: ShapeFlags,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="copy its tokenizer; without, one token per byte")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="|".join(_DTYPES), help="of the weights on disk")] = "bfloat16",
    scheme: Annotated[
        str | None,
        typer.Option(help="as of qnext quantize: int4-g32|int4-g64|int4-g128|int8|..."),
    ] = None,
    records: AsRecords = False,
) -> None:
    """Make a model folder with random weights, tensor by tensor, and print its path.

    With --scheme it holds what `qnext quantize` makes of the folder that is made without, bit for bit.
    """
    from qnext.checkpoint.reshape import reshaped
    from qnext.config import preset as named
    from qnext.errors import UsageError
    from qnext.quant.scheme import make_policy

    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype}: must be {' or '.join(_DTYPES)}")
    config = reshaped(
        named(preset),
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.experts_per_token,
        vocab_size=shape.vocab_size,
        has_mtp=shape.mtp,
    )
    policy = None if scheme is None else make_policy(scheme, head=None, is_tied=config.tie_word_embeddings)
    if tokenizer is not None:
        _write(config, out, seed, dtype, policy, records, tokenizer)
        return
    from qnext.files import scratch_folder
    from qnext.text.templates import INSTRUCT_TEMPLATE
    from qnext.text.train import byte_level_tokenizer, save_tokenizer

    with scratch_folder() as made:
        length = config.max_position_embeddings
        save_tokenizer(byte_level_tokenizer(), made, model_max_length=length, chat_template=INSTRUCT_TEMPLATE)
        _write(config, out, seed, dtype, policy, records, made)


def _write(
    config: ModelConfig,
    out: Path,
    seed: int,
    dtype: str,
    policy: QuantPolicy | None,
    records: bool,
    tokenizer_folder: Path,
) -> None:
    import torch

    from qnext.checkpoint import create_folder
    from qnext.checkpoint.reshape import with_token_ids
    from qnext.cli.terminal.progress import byte_progress
    from qnext.planning import count_parameters

    config = with_token_ids(config, tokenizer_folder)
    with byte_progress("writing") as progress:
        create_folder(
            config,
            out,
            seed=seed,
            dtype=getattr(torch, dtype),
            policy=policy,
            with_records=records,
            tokenizer_folder=tokenizer_folder,
            progress=progress,
        )
    form = dtype if policy is None else f"{policy.scheme.name}, {dtype}"
    print(f"{count_parameters(config).total:,} parameters, {form}, seed {seed}", file=sys.stderr)
    print(out)
