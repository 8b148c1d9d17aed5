"""Byte-level BPE vocabularies of the Qwen2 family: training, the merge-free fallback, and the files of a folder.

Everything but vocabulary and merges is fixed and equal to the released tokenizer: NFC, the "qwen2" split pattern,
byte-level alphabet in GPT-2's order, no BOS. A text made by one of these tokenizers is therefore cut into words
exactly as the released one cuts it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qnext.errors import UsageError
from qnext.files import new_folder, write_file, write_inside

# The pattern that llama.cpp calls "qwen2" and tokenizer.json of the family carries: contractions, words with one
# leading non-letter, single digits, punctuation with trailing newlines, newlines, spaces.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


class SpecialToken(NamedTuple):
    """A token outside the merges. `is_control` tokens vanish from displayed text, the others are visible markup."""

    content: str
    is_control: bool


# The released order with the vision tokens left out. The split into control and markup is the released one too:
# `<think>`, `<tool_call>` and the fill-in-the-middle tokens are added tokens that are not "special".
DEFAULT_SPECIAL_TOKENS: tuple[SpecialToken, ...] = (
    SpecialToken(END_OF_TEXT, True),
    SpecialToken(IM_START, True),
    SpecialToken(IM_END, True),
    SpecialToken("<tool_call>", False),
    SpecialToken("</tool_call>", False),
    SpecialToken("<|fim_prefix|>", False),
    SpecialToken("<|fim_middle|>", False),
    SpecialToken("<|fim_suffix|>", False),
    SpecialToken("<|fim_pad|>", False),
    SpecialToken("<|repo_name|>", False),
    SpecialToken("<|file_sep|>", False),
    SpecialToken("<tool_response>", False),
    SpecialToken("</tool_response>", False),
    SpecialToken("<think>", False),
    SpecialToken("</think>", False),
)


def byte_alphabet() -> list[str]:
    """The 256 one-character names of the bytes 0..255, in byte order (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {byte: chr(byte) for byte in printable}
    unprintable = [byte for byte in range(256) if byte not in names]
    names |= {byte: chr(256 + rank) for rank, byte in enumerate(unprintable)}
    return [names[byte] for byte in range(256)]


def build_tokenizer(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    special_tokens: Sequence[SpecialToken] = DEFAULT_SPECIAL_TOKENS,
) -> Tokenizer:
    """Tokenizer of the Qwen2 kind from a byte-level `vocab` and its `merges`, most frequent first.

    The special tokens get the ids after the vocabulary's last, unless `vocab` already names them.
    """
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    _set_family_parts(tokenizer)
    _add_special_tokens(tokenizer, special_tokens)
    return tokenizer


def byte_level_tokenizer(*, special_tokens: Sequence[SpecialToken] = DEFAULT_SPECIAL_TOKENS) -> Tokenizer:
    """One token per byte and no merges: ids 0..255 are the alphabet sorted by name, then the special tokens.

    A model may have more rows than this tokenizer has ids; the surplus decodes to nothing.
    """
    vocab = {name: index for index, name in enumerate(sorted(byte_alphabet()))}
    return build_tokenizer(vocab, [], special_tokens=special_tokens)


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[SpecialToken] = DEFAULT_SPECIAL_TOKENS,
) -> Tokenizer:
    """Learn byte-level BPE from `texts`.

    `vocab_size` counts everything: 256 bytes, merges, special tokens. A corpus with too few repeated pairs gives
    fewer. The same texts in the same order give the same tokenizer. Raises UsageError when `vocab_size` leaves
    less than the bytes and the special tokens, or when there is no text.
    """
    num_base = vocab_size - len(special_tokens)
    if num_base < 256:
        raise UsageError(
            f"vocab_size {vocab_size} is below 256 bytes + {len(special_tokens)} special tokens "
            f"= {256 + len(special_tokens)}"
        )
    learner = Tokenizer(models.BPE())
    _set_family_parts(learner)
    trainer = trainers.BpeTrainer(
        vocab_size=num_base,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=byte_alphabet(),
        special_tokens=[],
    )
    num_characters = 0

    def counted() -> Iterable[str]:
        nonlocal num_characters
        for text in texts:
            num_characters += len(text)
            yield text

    learner.train_from_iterator(counted(), trainer=trainer)
    if num_characters == 0:
        raise UsageError("cannot train a tokenizer on no text")
    _add_special_tokens(learner, special_tokens)
    return learner


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    model_max_length: int,
    chat_template: str | None = None,
    eos_token: str = IM_END,
    pad_token: str = END_OF_TEXT,
) -> list[Path]:
    """Write tokenizer.json, tokenizer_config.json and, where given, chat_template.jinja; returns their paths.

    A folder that is missing or empty appears with all of them at once, in one that holds files each is replaced whole.
    Raises UsageError when the end or padding token is not in the vocabulary.
    """
    for token in (eos_token, pad_token):
        if tokenizer.token_to_id(token) is None:
            raise UsageError(f"token {token!r} is not in the vocabulary")
    added = tokenizer.get_added_tokens_decoder()
    config = {
        "added_tokens_decoder": {str(index): _describe(token) for index, token in sorted(added.items())},
        "additional_special_tokens": [
            token.content for _, token in sorted(added.items()) if token.special and token.content != pad_token
        ],
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos_token,
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": pad_token,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    target = Path(folder)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template
    if target.is_dir() and any(target.iterdir()):
        for name, text in files.items():
            write_file(target / name, text)
    else:
        with new_folder(target) as partial:
            for name, text in files.items():
                write_inside(partial / name, text)
    return [target / name for name in files]


def _set_family_parts(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)


def _add_special_tokens(tokenizer: Tokenizer, special_tokens: Sequence[SpecialToken]) -> None:
    for token in special_tokens:
        tokenizer.add_tokens([AddedToken(token.content, special=token.is_control, normalized=False)])


def _describe(token: AddedToken) -> dict[str, str | bool]:
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
        "special": token.special,
    }
