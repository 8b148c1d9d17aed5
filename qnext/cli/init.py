"""`qnext init`: a model folder with random weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qnext.config import ModelConfig

_DTYPES = ("bfloat16", "float32")


def command(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="a named configuration; a wrong name lists them")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make; must be new or empty")],
    layers: Annotated[int | None, typer.Option(help="layers of the trunk; the pattern of layer kinds is kept")] = None,
    experts: Annotated[int | None, typer.Option(help="routed experts per layer")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="experts that each token goes to")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="rows of the embedding and the head")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="copy its tokenizer; without, one token per byte")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="|".join(_DTYPES), help="of the weights on disk")] = "bfloat16",
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="with the multi-token prediction layer")] = True,
) -> None:
    """Make a model folder with random weights, tensor by tensor, and print its path."""
    from qnext.config import preset as named
    from qnext.errors import UsageError

    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype}: must be {' or '.join(_DTYPES)}")
    config = _reshape(named(preset), layers, experts, experts_per_token, vocab_size, mtp)
    if tokenizer is not None:
        _write(config, out, seed, dtype, tokenizer)
        return
    from qnext.files import scratch_folder
    from qnext.text.templates import INSTRUCT_TEMPLATE
    from qnext.text.train import byte_level_tokenizer, save_tokenizer

    with scratch_folder() as made:
        save_tokenizer(
            byte_level_tokenizer(), made, model_max_length=config.max_position_embeddings,
            chat_template=INSTRUCT_TEMPLATE,
        )  # fmt: skip
        _write(config, out, seed, dtype, made)


def _reshape(
    config: ModelConfig, layers: int | None, experts: int | None, top_k: int | None, vocab_size: int | None, mtp: bool
) -> ModelConfig:
    """The preset with the sizes that were asked for. Token ids are left out: the tokenizer gives them."""
    from qnext.errors import ConfigError, UsageError

    if (experts is not None or top_k is not None) and not config.num_experts:
        raise UsageError("--experts and --experts-per-token: this preset has no experts")
    if experts is not None and experts < 1:
        raise UsageError(f"--experts must be at least 1, not {experts}")
    num_experts = config.num_experts if experts is None else experts
    num_chosen = config.num_experts_per_tok if top_k is None else top_k
    if num_chosen > num_experts:
        raise UsageError(
            f"{num_chosen} experts per token of {num_experts}; --experts-per-token N chooses fewer"
        )  # fmt: skip
    try:
        if layers is not None:
            config = config.with_layers(layers)
        return replace(
            config, num_experts=num_experts, num_experts_per_tok=num_chosen,
            vocab_size=config.vocab_size if vocab_size is None else vocab_size,
            num_nextn_predict_layers=config.num_nextn_predict_layers if mtp else 0,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _write(config: ModelConfig, out: Path, seed: int, dtype: str, tokenizer_folder: Path) -> None:
    import torch

    from qnext.checkpoint import create_folder
    from qnext.cli._progress import byte_progress
    from qnext.planning import count_parameters

    config = _with_token_ids(config, tokenizer_folder)
    with byte_progress("writing") as progress:
        create_folder(
            config, out, seed=seed, dtype=getattr(torch, dtype), tokenizer_folder=tokenizer_folder, progress=progress
        )
    print(f"{count_parameters(config).total:,} parameters, {dtype}, seed {seed}", file=sys.stderr)
    print(out)


def _with_token_ids(config: ModelConfig, tokenizer_folder: Path) -> ModelConfig:
    """The configuration with the ids of its tokenizer, whose tokens must all have a row."""
    from qnext.errors import UsageError
    from qnext.text.tokenizer import Tokenizer
    from qnext.text.train import END_OF_TEXT

    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    num_ids = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
    if num_ids > config.vocab_size:
        raise UsageError(f"--vocab-size {config.vocab_size} is below the {num_ids} tokens of the tokenizer")
    end_of_text = tokenizer.added_ids.get(END_OF_TEXT)
    eos = sorted(tokenizer.eos_ids - {end_of_text})
    # A text ends with <|endoftext|>, a turn with the tokenizer's own end token; both end a generation.
    eos += [] if end_of_text is None else [end_of_text]
    return replace(
        config, bos_token_id=end_of_text, eos_token_id=eos[0] if len(eos) == 1 else tuple(eos),
        pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
