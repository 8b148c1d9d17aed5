"""Strings to token ids and back, for one model folder.

Text from outside must never become a control token. `plain` knows the merges and the added words alone, so
`<|im_end|>` written by a user is ordinary pieces; reserved tokens are found by `qnext.text.added_tokens`, where the
caller vouches for the text. Everything between two reserved tokens is normalised, split and merged as one string,
whoever wrote it. A long text is merged in parts, cut where `qnext.text.cuts` proves that nothing changes.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qnext.errors import CorruptCheckpoint, NotSupported, UsageError
from qnext.text.added_tokens import AddedTokens
from qnext.text.confined_tokenizer import ConfinedTokenizer, Watch
from qnext.text.cuts import Cuts
from qnext.text.files import first_line
from qnext.text.template_files import read_templates
from qnext.text.tokenizer_files import end_tokens, padding_token, parsed, read_backend
from qnext.text.train import IM_END, IM_START, byte_alphabet

_PART = 1 << 15  # characters that are merged at once, where a text can be cut
_LONGEST = 1 << 17  # that are merged in this process where it cannot, if somebody watches
_COST_OF_TEXT = 32  # of one more text, in characters


class Piece(NamedTuple):
    """A run of text. Names of reserved tokens become their ids in trusted text, and stay text in untrusted text."""

    text: str
    is_trusted: bool


class Tokenizer:
    """Byte-level BPE with added tokens.

    `source` is the folder that error messages name. `eos_tokens` and `pad_token` may be ids or token names; leaving
    `eos_tokens` empty is allowed until `eos_ids` is read. `template_text` are the chat templates of the folder: marks
    that stand in there are reserved.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        source: str = "tokenizer",
        eos_tokens: Sequence[int | str] = (),
        pad_token: int | str | None = None,
        template_text: str = "",
    ) -> None:
        self._backend = backend
        self._source = source
        normalizer, added = backend.normalizer, backend.get_added_tokens_decoder()
        normalize = str if normalizer is None else normalizer.normalize_str
        self._added = AddedTokens(added, normalize=normalize, template_text=template_text)
        description = _without_reserved(backend, self._added, source)
        self._plain = parsed(json.dumps(description, ensure_ascii=False), f"{source}: tokenizer.json")
        self._confined = ConfinedTokenizer(self._plain.to_str)
        words = [token for token in added.values() if token.content in self._added.words]
        self._cuts = Cuts(description, words, normalize=normalize)
        self._bytes_by_id = _byte_table(backend, self._added.by_id, source)
        self._eos_ids = frozenset(self._resolve(token, "end-of-sequence") for token in eos_tokens)
        self._pad_id = None if pad_token is None else self._resolve(pad_token, "padding")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, num_rows: int | None = None) -> Tokenizer:
        """Read the tokenizer of a model folder; `qnext.text.tokenizer_files` says in which forms and from where.

        `num_rows` are those of the model that the tokenizer is for: see require_rows. Raises ModelNotFound where there
        is none, NotSupported for another form or kind, CorruptCheckpoint naming file and cause for bad content.
        """
        root = Path(folder)
        backend = read_backend(root)
        try:
            templates = read_templates(root)
        except CorruptCheckpoint:
            templates = None  # a folder without a sound template completes text all the same
        tokenizer = cls(
            backend,
            source=str(root),
            eos_tokens=end_tokens(root, backend),
            pad_token=padding_token(root, backend),
            template_text="" if templates is None else "\n".join(templates.texts.values()),
        )
        if num_rows is not None:
            tokenizer.require_rows(num_rows)
        return tokenizer

    def encode(self, text: str, *, allow_special: bool = False, watch: Watch | None = None) -> list[int]:
        """Token ids of `text`. No BOS is added. Names of reserved tokens become ids only with `allow_special`.

        `watch` as for `encode_pieces`. Raises UsageError for text that is not Unicode (lone surrogates).
        """
        return self.encode_pieces([Piece(text, allow_special)], watch=watch)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The result of `encode` for each text, on all cores and without the interpreter's lock. No special tokens."""
        try:
            return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            for text in texts if len(texts) > 1 else ():
                self.encode_batch([text])  # raises the error that names the cause
            if isinstance(error, (UnicodeEncodeError, TypeError)):
                raise UsageError("text holds a lone surrogate and is not valid Unicode") from None
            # A Rust panic is no Exception; it comes from a split pattern of the folder that explodes on this text.
            if type(error).__name__ != "PanicException":
                raise
            raise CorruptCheckpoint(f"{self._source}: tokenizer.json: {first_line(error)}") from None

    def encode_pieces(self, pieces: Iterable[Piece], *, watch: Watch | None = None) -> list[int]:
        """Token ids of the concatenation of `pieces`, cut only at reserved tokens that stand inside trusted text.

        A name that would arise across a border between two pieces is not one. `watch` may end it between parts, and
        has what cannot be cut merged in a child process. Raises what `watch` raises.
        """
        ids: list[int] = []
        texts: list[str] = []  # that are merged together, and what follows each
        marks: list[int | None] = []
        size = 0
        for text, mark in self._parts(pieces):
            is_long = watch is not None and len(text) > _LONGEST
            size += len(text) + _COST_OF_TEXT
            if not is_long:
                texts.append(text)
                marks.append(mark)
            if is_long or size >= _PART:
                self._merge(texts, marks, ids, watch)
                size = 0
            if is_long:
                assert watch is not None
                ids += self._confined.encode(text, num_before=len(ids), watch=watch)
                ids += () if mark is None else (mark,)
        self._merge(texts, marks, ids, watch)
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
            return self._added.ids[name]
        except KeyError:
            raise CorruptCheckpoint(f"{self._source}: tokenizer.json has no token {name!r}") from None

    def require_chat_tokens(self) -> None:
        """Raise CorruptCheckpoint unless the tokens that frame a chat turn exist."""
        for name in (IM_START, IM_END):
            if name not in self._added.ids:
                raise CorruptCheckpoint(f"{self._source}: tokenizer.json has no token {name!r}, chat needs it")

    def require_rows(self, num_rows: int) -> None:
        """Raise CorruptCheckpoint unless every token, and every end token, has a row in a model of so many.

        A model may have rows without a token, which are padding.
        """
        if self.vocab_size > num_rows:
            raise CorruptCheckpoint(
                f"{self._source}: tokenizer.json has {self.vocab_size} tokens, the model {num_rows}"
            )
        outside = sorted(token for token in self._eos_ids if token >= num_rows)
        if outside:
            raise CorruptCheckpoint(f"{self._source}: end token {outside[0]} is outside the vocabulary of {num_rows}")

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
                "nor config.json, nor eos_token in tokenizer_config.json is set"
            )
        return self._eos_ids

    @property
    def pad_id(self) -> int | None:
        return self._pad_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens: those that `decode(skip_special=True)` hides."""
        return self._added.control_ids

    @cached_property
    def added_ids(self) -> dict[str, int]:
        """Every added token by name: control, markup and words."""
        return dict(self._added.ids)

    @cached_property
    def reserved_ids(self) -> dict[str, int]:
        """Control tokens and markup by name. Untrusted text never encodes to one of these."""
        return dict(self._added.reserved)

    @property
    def backend(self) -> Backend:
        return self._backend

    def _parts(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, int | None]]:
        """The texts between reserved tokens in parts, each with the id of the reserved token that follows it."""
        runs = list(pieces)
        whole = "".join(text for text, _ in runs)
        taken = place = 0
        for text, is_trusted in runs:
            end = place + len(text)
            for found in self._added.find(whole, place, end, taken=taken) if is_trusted else ():
                yield from self._parts_of(whole[taken : found.begin], found.token_id)
                taken = found.end
            place = end
        yield from self._parts_of(whole[taken:], None)

    def _parts_of(self, text: str, mark: int | None) -> Iterator[tuple[str, int | None]]:
        if len(text) <= _PART:
            yield text, mark
            return
        left = len(text)
        for part in self._cuts.parts(text, _PART):
            left -= len(part)
            yield part, None if left else mark

    def _merge(self, texts: list[str], marks: list[int | None], ids: list[int], watch: Watch | None) -> None:
        """Adds the ids of `texts`, each with its mark, to `ids`, and empties both lists."""
        for found, mark in zip(self.encode_batch(texts) if any(texts) else [[]] * len(texts), marks, strict=True):
            ids += found
            if mark is not None:
                ids.append(mark)
        texts.clear()
        marks.clear()
        if watch is not None:
            watch.check(len(ids))

    def close(self) -> None:
        """End the child process, if there is one."""
        self._confined.close()

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


def _without_reserved(backend: Backend, added: AddedTokens, source: str) -> dict[str, Any]:
    """tokenizer.json with the same normaliser, splitter, merges and added words, and no way to a reserved token."""
    description: dict[str, Any] = json.loads(backend.to_str())
    model = description["model"]
    if model.get("type") != "BPE":
        raise NotSupported(f"{source}: tokenizer.json: model type {model.get('type')!r} is not read, only 'BPE'")
    # Some trainers put the added tokens into the vocabulary too; there a word could reach them without any merge. An
    # added word must stand there to keep its id.
    vocab = {name: index for name, index in model["vocab"].items() if name not in added.reserved}
    model["vocab"] = {**vocab, **added.words}
    model["dropout"] = None  # meant for training
    description["added_tokens"] = [e for e in description["added_tokens"] if e["content"] in added.words]
    description |= {"post_processor": None, "truncation": None, "padding": None}
    return description


def _byte_table(backend: Backend, added: dict[int, AddedToken], source: str) -> dict[int, bytes]:
    byte_of = {name: byte for byte, name in enumerate(byte_alphabet())}
    table: dict[int, bytes] = {}
    for name, index in backend.get_vocab(with_added_tokens=False).items():
        if index in added:
            continue
        try:
            value = bytes(byte_of[character] for character in name)
        except KeyError:
            raise NotSupported(f"{source}: tokenizer.json: token {name!r} is not byte-level BPE's") from None
        if index in table:
            raise CorruptCheckpoint(f"{source}: tokenizer.json: two tokens share id {index}")
        table[index] = value
    missing = len(set(range(256)) - {value[0] for value in table.values() if len(value) == 1})
    if missing:
        raise CorruptCheckpoint(f"{source}: tokenizer.json: {missing} of the 256 bytes have no token")
    for index, token in added.items():
        table[index] = token.content.encode("utf-8")
    return table
