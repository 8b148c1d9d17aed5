"""Strings to token ids and back, for one model folder.

Text from outside must never become a control token. Two engines share one vocabulary: `plain` knows the merges
only, so `<|im_end|>` written by a user is eight or so ordinary pieces; added tokens are found by this module, and
only where the caller vouches for the text. Everything between two added tokens is normalised, split and merged as
one string, whoever wrote it, which is what a tokenizer does with the plain concatenation.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qnext.errors import CorruptCheckpoint, ModelNotFound, UsageError
from qnext.text.train import IM_END, IM_START, byte_alphabet

# The released tokenizer.json is 11 MB; a file far above that is refused before it is parsed.
MAX_TOKENIZER_BYTES = 256 << 20


class Piece(NamedTuple):
    """A run of text. In trusted text added-token names become their ids, in untrusted text they stay text."""

    text: str
    is_trusted: bool


class Tokenizer:
    """Byte-level BPE with added tokens.

    `source` is the folder that error messages name. `eos_tokens` and `pad_token` may be ids or token names; leaving
    `eos_tokens` empty is allowed until `eos_ids` is read.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        source: str = "tokenizer",
        eos_tokens: Sequence[int | str] = (),
        pad_token: int | str | None = None,
    ) -> None:
        self._backend = backend
        self._source = source
        added = backend.get_added_tokens_decoder()
        self._added_by_id: dict[int, AddedToken] = dict(added)
        self._added_ids = {token.content: index for index, token in added.items()}
        self._plain = _without_added_tokens(backend, added, source)
        self._bytes_by_id = _byte_table(backend, added, source)
        self._eos_ids = frozenset(self._resolve(token, "end-of-sequence") for token in eos_tokens)
        self._pad_id = None if pad_token is None else self._resolve(pad_token, "padding")
        names = sorted(self._added_ids, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and generation_config.json (the last two may be missing).

        The end ids are those of generation_config.json and the `eos_token` of tokenizer_config.json together.
        Raises ModelNotFound without a tokenizer.json, CorruptCheckpoint naming file and cause for bad content.
        """
        root = Path(folder)
        path = root / "tokenizer.json"
        if not path.is_file():
            raise ModelNotFound(f"{root}: no tokenizer.json here")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CorruptCheckpoint(f"{path}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB, not a tokenizer")
        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for every fault in the file
            raise CorruptCheckpoint(f"{path}: {_first_line(error)}") from error
        config = read_json_object(root / "tokenizer_config.json")
        generation = read_json_object(root / "generation_config.json")
        eos_tokens = _id_list(generation.get("eos_token_id"), root / "generation_config.json", "eos_token_id")
        eos_name = _token_name(config.get("eos_token"), root / "tokenizer_config.json", "eos_token")
        pad_name = _token_name(config.get("pad_token"), root / "tokenizer_config.json", "pad_token")
        pad_ids = _id_list(generation.get("pad_token_id"), root / "generation_config.json", "pad_token_id")
        return cls(
            backend,
            source=str(root),
            eos_tokens=[*eos_tokens, *([eos_name] if eos_name is not None else [])],
            pad_token=pad_name if pad_name is not None else (pad_ids[0] if pad_ids else None),
        )

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; no BOS is added. Names of added tokens become ids only with `allow_special`.

        Raises UsageError for text that is not Unicode (lone surrogates).
        """
        return self.encode_pieces([Piece(text, allow_special)])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """What `encode` gives for each text, on all cores and about twice as fast on one. No special tokens."""
        try:
            return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            return [self._encode_plain(text) for text in texts]  # raises the error that names the cause

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Token ids of the concatenation of `pieces`, cut only at added tokens that stand inside trusted text.

        A name that would arise across a border between two pieces is not one.
        """
        ids: list[int] = []
        segment: list[str] = []
        for text, is_trusted in pieces:
            position = 0
            for match in self._added_pattern.finditer(text) if is_trusted else ():
                segment.append(text[position : match.start()])
                ids.extend(self._encode_plain("".join(segment)))
                ids.append(self._added_ids[match.group()])
                segment.clear()
                position = match.end()
            segment.append(text[position:])
        ids.extend(self._encode_plain("".join(segment)))
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` drops control tokens."""
        hidden = self.special_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that `token_id` stands for; empty for the unused ids above the vocabulary of a padded model."""
        if token_id < 0:
            raise UsageError(f"token id {token_id} is negative")
        return self._bytes_by_id.get(token_id, b"")

    def token_table(self) -> list[bytes]:
        """The bytes of every id below `vocab_size`, empty for an id without a token."""
        return [self._bytes_by_id.get(index, b"") for index in range(self.vocab_size)]

    def token_id(self, name: str) -> int:
        """Id of an added token such as `<|im_end|>`; raises CorruptCheckpoint where the folder has none."""
        try:
            return self._added_ids[name]
        except KeyError:
            raise CorruptCheckpoint(f"{self._source}: tokenizer.json has no token {name!r}") from None

    def require_chat_tokens(self) -> None:
        """Raise CorruptCheckpoint unless the tokens that frame a chat turn exist."""
        for name in (IM_START, IM_END):
            if name not in self._added_ids:
                raise CorruptCheckpoint(f"{self._source}: tokenizer.json has no token {name!r}, chat needs it")

    @property
    def vocab_size(self) -> int:
        """Largest id + 1: the number of embedding rows that this tokenizer needs."""
        return max(self._bytes_by_id) + 1

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a generation. Raises CorruptCheckpoint where the folder names none."""
        if not self._eos_ids:
            raise CorruptCheckpoint(
                f"{self._source}: no end token; neither eos_token_id in generation_config.json "
                "nor eos_token in tokenizer_config.json is set"
            )
        return self._eos_ids

    @property
    def pad_id(self) -> int | None:
        return self._pad_id

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens: those that `decode(skip_special=True)` hides."""
        return frozenset(index for index, token in self._added_by_id.items() if token.special)

    @cached_property
    def added_ids(self) -> dict[str, int]:
        """Every added token, control and markup, by name. Untrusted text never encodes to one of these."""
        return dict(self._added_ids)

    @property
    def backend(self) -> Backend:
        return self._backend

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise UsageError("text holds a lone surrogate and is not valid Unicode") from None
        except BaseException as error:
            # A Rust panic is no Exception; it comes from a split pattern of the folder that explodes on this text.
            if type(error).__name__ != "PanicException":
                raise
            raise CorruptCheckpoint(f"{self._source}: tokenizer.json: {_first_line(error)}") from None

    def _resolve(self, token: int | str, purpose: str) -> int:
        if isinstance(token, int):
            # An id may lie above the tokenizer's own in a model with more rows; the model checks that bound.
            return token
        index = self._backend.token_to_id(token)
        if index is None:
            raise CorruptCheckpoint(f"{self._source}: the {purpose} token {token!r} is not in tokenizer.json")
        return index


class IncrementalDecoder:
    """Text of one stream of token ids, as early as whole characters allow.

    The pushed strings and the flush, joined, equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; bytes of an unfinished character wait for the next call."""
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end of the stream: U+FFFD for an unfinished character. The decoder starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no file. Raises CorruptCheckpoint otherwise."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _without_added_tokens(backend: Backend, added: dict[int, AddedToken], source: str) -> Backend:
    """The same normaliser, splitter and merges with no token outside the merges."""
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise CorruptCheckpoint(
                f"{source}: tokenizer.json: added token {token.content!r} uses lstrip, rstrip or single_word, "
                "which no tokenizer of the family does"
            )
    description = json.loads(backend.to_str())
    model = description["model"]
    if model.get("type") != "BPE":
        raise CorruptCheckpoint(f"{source}: tokenizer.json: model type {model.get('type')!r}, expected 'BPE'")
    # Some trainers put the added tokens into the vocabulary too; there a word could reach them without any merge.
    names = {token.content for token in added.values()}
    model["vocab"] = {name: index for name, index in model["vocab"].items() if name not in names}
    description["added_tokens"] = []
    description["post_processor"] = None
    try:
        return Backend.from_str(json.dumps(description, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception
        raise CorruptCheckpoint(f"{source}: tokenizer.json: {_first_line(error)}") from error


def _byte_table(backend: Backend, added: dict[int, AddedToken], source: str) -> dict[int, bytes]:
    byte_of = {name: byte for byte, name in enumerate(byte_alphabet())}
    table: dict[int, bytes] = {}
    for name, index in backend.get_vocab(with_added_tokens=False).items():
        if index in added:
            continue
        try:
            value = bytes(byte_of[character] for character in name)
        except KeyError:
            raise CorruptCheckpoint(f"{source}: tokenizer.json: token {name!r} is not byte-level") from None
        if index in table:
            raise CorruptCheckpoint(f"{source}: tokenizer.json: two tokens share id {index}")
        table[index] = value
    missing = len(set(range(256)) - {value[0] for value in table.values() if len(value) == 1})
    if missing:
        raise CorruptCheckpoint(f"{source}: tokenizer.json: {missing} of the 256 bytes have no token")
    for index, token in added.items():
        table[index] = token.content.encode("utf-8")
    return table


def _id_list(value: Any, path: Path, key: str) -> list[int]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if any(not isinstance(item, int) or isinstance(item, bool) or item < 0 for item in values):
        raise CorruptCheckpoint(f"{path}: {key} must be a token id or a list of token ids")
    return list(values)


def _token_name(value: Any, path: Path, key: str) -> str | None:
    """A token is written as its name or as an object with its name under "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise CorruptCheckpoint(f"{path}: {key} must be a token name")
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
