"""The configuration of a new folder: a preset with other sizes, and with the token ids of a tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qnext.config import ModelConfig
from qnext.errors import ConfigError, UsageError
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import END_OF_TEXT


def reshaped(
    config: ModelConfig,
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    vocab_size: int | None = None,
    has_mtp: bool = True,
) -> ModelConfig:
    """The configuration with the wanted sizes. Token ids are left out, because the tokenizer gives them.

    Raises UsageError for sizes that do not fit together, naming the flag of `qnext init`.
    """
    if (experts is not None or top_k is not None) and not config.num_experts:
        raise UsageError("--experts and --experts-per-token: this preset has no experts")
    if experts is not None and experts < 1:
        raise UsageError(f"--experts must be at least 1, not {experts}")
    num_experts = config.num_experts if experts is None else experts
    num_chosen = config.num_experts_per_tok if top_k is None else top_k
    if num_chosen > num_experts:
        raise UsageError(f"{num_chosen} experts per token of {num_experts}; --experts-per-token N chooses fewer")
    try:
        if layers is not None:
            config = config.with_layers(layers)
        return replace(
            config,
            num_experts=num_experts,
            num_experts_per_tok=num_chosen,
            vocab_size=config.vocab_size if vocab_size is None else vocab_size,
            num_nextn_predict_layers=config.num_nextn_predict_layers if has_mtp else 0,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    except ConfigError as error:
        raise UsageError(str(error)) from None


def with_token_ids(config: ModelConfig, tokenizer_folder: Path) -> ModelConfig:
    """The configuration with the ids of its tokenizer. Raises UsageError where a token has no row."""
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    num_ids = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
    if num_ids > config.vocab_size:
        raise UsageError(f"--vocab-size {config.vocab_size} is below the {num_ids} tokens of the tokenizer")
    end_of_text = tokenizer.added_ids.get(END_OF_TEXT)
    eos = sorted(tokenizer.eos_ids - {end_of_text})
    # A text ends with <|endoftext|>, a turn with the tokenizer's own end token; both end a generation.
    eos += [] if end_of_text is None else [end_of_text]
    eos_ids = eos[0] if len(eos) == 1 else tuple(eos)
    return replace(config, bos_token_id=end_of_text, eos_token_id=eos_ids, pad_token_id=tokenizer.pad_id)
