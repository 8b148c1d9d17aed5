"""The vocabulary of a model folder as keys of a GGUF file, and back.

Keys and token types are those of llama.cpp (gguf-py/gguf/constants.py); its name for the family's splitting of text
is "qwen2".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.text.files import read_json_object
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import (
    DEFAULT_SPECIAL_TOKENS,
    END_OF_TEXT,
    IM_END,
    QWEN2_PATTERN,
    SpecialToken,
    build_tokenizer,
    save_tokenizer,
)

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# Stands where a tokenizer merges nothing, for llama.cpp refuses an empty list: two NUL bytes, which no token holds.
_NO_MERGE = "\u0100 \u0100"
# Tokens of the family that look like control tokens and are none.
_MARKUP = frozenset(token.content for token in DEFAULT_SPECIAL_TOKENS if not token.is_control)


def vocabulary_keys(folder: str | os.PathLike[str], *, num_rows: int) -> dict[str, Any]:
    """The keys `tokenizer.*` but for the ids of end, beginning and padding, which belong to the configuration.

    Rows of the embedding that have no token are called [PADn] and marked unused. Added tokens written `<|...|>` are
    marked as control tokens even where tokenizer.json does not, as llama.cpp's own converter does: text from outside
    can then not produce them. Raises UsageError for a tokenizer of another family.
    """
    tokenizer = Tokenizer.from_folder(folder)
    description = json.loads(tokenizer.backend.to_str())
    if not _is_of_family(description):
        raise UsageError(f"{folder}: tokenizer.json splits text in another way than the Qwen2 family does")
    tokens, types = [f"[PAD{i}]" for i in range(num_rows)], [_UNUSED] * num_rows
    if tokenizer.vocab_size > num_rows:
        raise CorruptCheckpoint(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model {num_rows}")
    for name, index in description["model"]["vocab"].items():
        tokens[index], types[index] = name, _NORMAL
    for name, index in tokenizer.added_ids.items():
        is_control = index in tokenizer.special_ids or (name.startswith("<|") and name.endswith("|>"))
        tokens[index], types[index] = name, _CONTROL if is_control else _USER_DEFINED
    keys: dict[str, Any] = {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": "qwen2",
        f"{_PREFIX}tokens": tokens,
        f"{_PREFIX}token_type": types,
        f"{_PREFIX}merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in description["model"]["merges"]
        ]
        or [_NO_MERGE],
        f"{_PREFIX}add_bos_token": False,
    }
    template = _chat_template(Path(folder))
    return keys if template is None else keys | {_TEMPLATE: template}


def write_vocabulary(
    keys: Mapping[str, Any], folder: str | os.PathLike[str], *, source: str, model_max_length: int
) -> None:
    """Write tokenizer.json and its companions from the keys of a GGUF file, named `source` in errors.

    generation_config.json gets the end token of the file and those two that llama.cpp knows by name. Raises
    CorruptCheckpoint naming the key that is missing, of another family, or contradicts another.
    """
    reader = _Reader(keys, source)
    backend = reader.backend()
    ids = reader.end_ids(backend)
    pad = reader.token(f"{_PREFIX}padding_token_id")
    fallback = END_OF_TEXT if END_OF_TEXT in reader.tokens else reader.tokens[ids[0]]
    try:
        Tokenizer(backend, source=source)
        save_tokenizer(
            backend, folder, model_max_length=model_max_length, chat_template=reader.template(),
            eos_token=reader.tokens[ids[0]], pad_token=fallback if pad is None else pad,
        )  # fmt: skip
    except UsageError as error:
        raise CorruptCheckpoint(f"{source}: {error}") from None
    generation = {"eos_token_id": ids if len(ids) > 1 else ids[0]}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if f"{_PREFIX}{key}" in keys:
            generation[name] = keys[f"{_PREFIX}{key}"]
    (Path(folder) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


class _Reader:
    """Typed reading of the keys. Every error names the file and the key."""

    def __init__(self, keys: Mapping[str, Any], source: str) -> None:
        self.keys = keys
        self.source = source
        for key, only in ((f"{_PREFIX}model", "gpt2"), (f"{_PREFIX}pre", "qwen2")):
            if keys.get(key) != only:
                raise self.error(key, f"{str(keys.get(key))[:60]!r} is not supported, only {only!r}")
        self.tokens: list[str] = self.list_of(str, f"{_PREFIX}tokens")
        self.types: list[int] = self.list_of(int, f"{_PREFIX}token_type")
        if len(self.types) != len(self.tokens):
            raise self.error(f"{_PREFIX}token_type", f"{len(self.types)} types of {len(self.tokens)} tokens")

    def error(self, key: str, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.source}: key {key}: {problem}")

    def list_of(self, kind: type, key: str) -> list[Any]:
        value = self.keys.get(key)
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.error(key, f"must be a list of {kind.__name__}")
        return value

    def backend(self) -> Backend:
        vocab: dict[str, int] = {}
        special: dict[str, tuple[int, SpecialToken]] = {}
        for index, (name, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == _UNUSED:
                continue
            if kind not in (_NORMAL, _CONTROL, _USER_DEFINED):
                raise self.error(f"{_PREFIX}token_type", f"token {index} has type {kind}, which BPE has not")
            if not name or name in vocab or name in special:
                raise self.error(f"{_PREFIX}tokens", f"{name[:60]!r} is empty or appears twice")
            if kind == _NORMAL:
                vocab[name] = index
            else:
                special[name] = (index, SpecialToken(name, kind == _CONTROL and name not in _MARKUP))
        merges = self.merges()
        added = [token for _, token in special.values()]
        try:
            backend = build_tokenizer(vocab, merges, special_tokens=added)
            if any(backend.token_to_id(name) != index for name, (index, _) in special.items()):
                # Where ids are left out, a token gets its own only by standing in the vocabulary too.
                whole = vocab | {name: index for name, (index, _) in special.items()}
                backend = build_tokenizer(whole, merges, special_tokens=added)
        except Exception as error:  # the library raises bare Exception
            raise self.error(f"{_PREFIX}merges", str(error).splitlines()[0][:200]) from None
        return backend

    def merges(self) -> list[tuple[str, str]]:
        if f"{_PREFIX}merges" not in self.keys:
            return []
        if self.keys[f"{_PREFIX}merges"] == [_NO_MERGE] and _NO_MERGE.replace(" ", "") not in self.tokens:
            return []
        pairs = [tuple(line.split(" ")) for line in self.list_of(str, f"{_PREFIX}merges")]
        for pair in pairs:
            if len(pair) != 2 or not all(pair):
                raise self.error(f"{_PREFIX}merges", f"{' '.join(pair)[:60]!r} is no pair")
        return pairs

    def token(self, key: str) -> str | None:
        """Name of the token whose id stands under `key`."""
        index = self.keys.get(key)
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens):
            raise self.error(key, f"{str(index)[:60]} is no token")
        return self.tokens[index]

    def end_ids(self, backend: Backend) -> list[int]:
        names = (self.token(f"{_PREFIX}eos_token_id"), IM_END, END_OF_TEXT)
        found = [backend.token_to_id(name) for name in names if name is not None]
        ids = list(dict.fromkeys(index for index in found if index is not None))
        if not ids:
            raise self.error(f"{_PREFIX}eos_token_id", "missing or unused, and no token is known to end a text")
        return ids

    def template(self) -> str | None:
        value = self.keys.get(_TEMPLATE)
        if value is not None and not isinstance(value, str):
            raise self.error(_TEMPLATE, "must be text")
        return value


def _is_of_family(description: dict[str, Any]) -> bool:
    splitter = description.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers") or [splitter]
    kinds = [part.get("type") for part in parts]
    return (
        kinds == ["Split", "ByteLevel"]
        and parts[0].get("pattern") == {"Regex": QWEN2_PATTERN}
        and parts[0].get("behavior") == "Isolated"
        and not parts[0].get("invert")
        and not parts[1].get("use_regex")
        and not parts[1].get("add_prefix_space")
        and not description["model"].get("ignore_merges")
    )


def _chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = read_json_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
