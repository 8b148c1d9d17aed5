"""The vocabulary of a model folder as keys of a GGUF file, and back.

Keys and token types are those of llama.cpp (gguf-py/gguf/constants.py); its name for the family's splitting of text
is "qwen2".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from qnext.errors import CorruptCheckpoint, NotSupported, UsageError, warn
from qnext.files import write_file
from qnext.text.template_files import read_templates
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

_UNDEFINED, _NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 0, 1, 2, 3, 4, 5
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# Values of tokenizer.ggml.pre that llama.cpp splits in the family's way (src/llama-vocab.cpp).
SPLITTINGS = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez")
_PADDING = re.compile(r"\[PAD\d+\]|\[EMPTY_\d+\]")
_LOOKS_LIKE_CONTROL = re.compile(r"<\|.+\|>")
# general.sampling.* -> key of generation_config.json, smallest and largest value that it may have there
SAMPLING_KEYS = {
    "temp": ("temperature", 0.0, 100.0),
    "top_k": ("top_k", 0, 1 << 31),
    "top_p": ("top_p", 1e-6, 1.0),
    "min_p": ("min_p", 0.0, 1.0),
    "penalty_repeat": ("repetition_penalty", 1e-6, 100.0),
}
# general.sampling.* that have no counterpart, with the value that does nothing
_OTHER_SAMPLING: dict[str, Any] = {"xtc_probability": 0, "mirostat": 0}
# Stands where a tokenizer merges nothing, for llama.cpp refuses an empty list: two NUL bytes, which no token holds.
_NO_MERGE = "\u0100 \u0100"
# Tokens of the family that look like control tokens and are none.
_MARKUP = frozenset(token.content for token in DEFAULT_SPECIAL_TOKENS if not token.is_control)


def vocabulary_keys(folder: str | os.PathLike[str], *, num_rows: int) -> dict[str, Any]:
    """The keys `tokenizer.*` except the ids of end, beginning and padding, which belong to the configuration.

    Rows of the embedding without a token are called [PADn] and marked unused. Added tokens written `<|...|>` are marked
    as control tokens even where tokenizer.json does not mark them, as in llama.cpp's own converter. So text from
    outside cannot produce them. Raises UsageError for a tokenizer of another family.
    """
    tokenizer = Tokenizer.from_folder(folder, num_rows=num_rows)
    description = json.loads(tokenizer.backend.to_str())
    if not _is_of_family(description):
        raise UsageError(f"{folder}: tokenizer.json splits text in another way than the Qwen2 family does")
    tokens, types = [f"[PAD{i}]" for i in range(num_rows)], [_UNUSED] * num_rows
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
    templates = read_templates(Path(folder))
    return keys if templates is None else keys | {_TEMPLATE: templates.texts["default"]}


def has_vocabulary(keys: Mapping[str, Any]) -> bool:
    """Whether the keys of a GGUF file describe a tokenizer. Some weights are converted without one."""
    return f"{_PREFIX}tokens" in keys and keys.get(f"{_PREFIX}model") not in ("none", "no_vocab")


def write_vocabulary(
    keys: Mapping[str, Any], folder: str | os.PathLike[str], *, source: str, model_max_length: int
) -> None:
    """Write tokenizer.json and its companion files from the keys of a GGUF file, which errors call `source`.

    generation_config.json gets the file's end tokens, the two end tokens that llama.cpp knows by name, and the file's
    values for sampling. Raises CorruptCheckpoint naming the key that is missing or contradicts another, NotSupported
    for a tokenizer of another family.
    """
    reader = _VocabularyKeys(keys, source)
    backend = reader.backend()
    ids = reader.end_ids(backend)
    pad = reader.token(f"{_PREFIX}padding_token_id")
    fallback = END_OF_TEXT if END_OF_TEXT in reader.tokens else reader.tokens[ids[0]]
    try:
        Tokenizer(backend, source=source)
        save_tokenizer(
            backend,
            folder,
            model_max_length=model_max_length,
            chat_template=reader.template(),
            eos_token=reader.tokens[ids[0]],
            pad_token=fallback if pad is None else reader.tokens[pad],
        )
    except UsageError as error:
        raise CorruptCheckpoint(f"{source}: {error}") from None
    generation: dict[str, Any] = {"eos_token_id": ids if len(ids) > 1 else ids[0]}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        index = reader.token(f"{_PREFIX}{key}")
        if index is not None:
            generation[name] = index
    generation |= _sampling(keys, source)
    write_file(Path(folder) / "generation_config.json", json.dumps(generation, indent=2) + "\n")


class _VocabularyKeys:
    """Typed reading of the keys. Every error names the file and the key."""

    def __init__(self, keys: Mapping[str, Any], source: str) -> None:
        self.keys = keys
        self.source = source
        if f"{_PREFIX}pre" not in keys:
            self.warn(f"{_PREFIX}pre", f"missing; texts are split as {SPLITTINGS[0]!r} says")
        for key, known in (("model", ("gpt2",)), ("pre", SPLITTINGS)):
            value = keys.get(_PREFIX + key, SPLITTINGS[0] if key == "pre" else None)
            if value not in known:
                problem = f"{str(value)[:60]!r} is not supported, only {known[0]!r}"
                raise NotSupported(f"{source}: key {_PREFIX}{key}: {problem}")
        for key in ("add_bos_token", "add_eos_token"):
            if keys.get(_PREFIX + key):
                self.warn(_PREFIX + key, "is true; the family's tokenizers add none, and none is added")
        self.tokens: list[str] = self.list_of(str, f"{_PREFIX}tokens")
        self.types = self.token_types()

    def token_types(self) -> list[int]:
        """What each token is. Without the list the names tell, as far as they do in this family."""
        key = f"{_PREFIX}token_type"
        if key not in self.keys:
            self.warn(key, "missing; names such as <|im_end|> tell which tokens are control tokens")
            return [_type_by_name(name) for name in self.tokens]
        types: list[int] = self.list_of(int, key)
        if len(types) < len(self.tokens):
            raise self.error(key, f"{len(types)} types of {len(self.tokens)} tokens")
        return types[: len(self.tokens)]

    def warn(self, key: str, problem: str) -> None:
        warn(f"{self.source}: key {key}: {problem}")

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
            if kind == _UNUSED or not name:
                continue
            if kind not in (_UNDEFINED, _NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED):
                raise self.error(f"{_PREFIX}token_type", f"token {index} has type {kind}, which BPE has not")
            if name in vocab or name in special:
                raise self.error(f"{_PREFIX}tokens", f"{name[:60]!r} appears twice")
            if kind in (_UNDEFINED, _NORMAL):
                vocab[name] = index
            else:
                special[name] = (index, SpecialToken(name, kind != _USER_DEFINED and name not in _MARKUP))
        merges = self.merges(vocab)
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

    def merges(self, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
        """Pairs of tokens that make a token. The library that merges them must see no others: some stop the process."""
        if f"{_PREFIX}merges" not in self.keys and all(map(_is_single, self.tokens, self.types)):
            return []
        if self.keys.get(f"{_PREFIX}merges") == [_NO_MERGE] and _NO_MERGE.replace(" ", "") not in self.tokens:
            return []
        pairs = [tuple(line.split(" ")) for line in self.list_of(str, f"{_PREFIX}merges")]
        for pair in pairs:
            if len(pair) != 2 or not all(pair):
                raise self.error(f"{_PREFIX}merges", f"{' '.join(pair)[:60]!r} is no pair")
            if not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab):
                raise self.error(f"{_PREFIX}merges", f"{' '.join(pair)[:60]!r} makes no token out of two")
        return pairs

    def token(self, key: str) -> int | None:
        """The id under `key`. One that is none is passed over, as llama.cpp does; -1 is how some tools write none."""
        index = self.keys.get(key)
        if index is None or index == -1:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens):
            self.warn(key, f"{str(index)[:60]} is no token and is ignored")
            return None
        return index

    def end_ids(self, backend: Backend) -> list[int]:
        given = [self.token(f"{_PREFIX}{name}_token_id") for name in ("eos", "eot", "eom")]
        names = [self.tokens[index] for index in given if index is not None]
        found = [backend.token_to_id(name) for name in (*names, IM_END, END_OF_TEXT)]
        ids = list(dict.fromkeys(index for index in found if index is not None))
        if not ids:
            raise self.error(f"{_PREFIX}eos_token_id", "missing or unused, and no token is known to end a text")
        return ids

    def template(self) -> str | None:
        value = self.keys.get(_TEMPLATE)
        if value is not None and not isinstance(value, str):
            raise self.error(_TEMPLATE, "must be text")
        others = sorted(key for key in self.keys if key.startswith(f"{_TEMPLATE}."))
        if others:
            warn(f"{self.source}: only {_TEMPLATE} is kept, not {', '.join(others)[:200]}")
        return value


def _type_by_name(name: str) -> int:
    if _PADDING.fullmatch(name):
        return _UNUSED
    if name in _MARKUP:
        return _USER_DEFINED
    return _CONTROL if _LOOKS_LIKE_CONTROL.fullmatch(name) else _NORMAL


def _is_single(name: str, kind: int) -> bool:
    """Whether no merge is needed to make the token."""
    return len(name) <= 1 or kind not in (_UNDEFINED, _NORMAL)


def _sampling(keys: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What general.sampling.* says, as keys of generation_config.json."""
    values: dict[str, Any] = {}
    for key, (name, smallest, largest) in SAMPLING_KEYS.items():
        value = keys.get(f"general.sampling.{key}")
        if value is None or (key == "top_k" and value == -1):
            continue
        if type(value) not in (int, float) or not smallest <= value <= largest:
            warn(f"{source}: key general.sampling.{key}: {str(value)[:60]} is out of range and is ignored")
            continue
        values[name] = int(value) if key == "top_k" else float(f"{value:.7g}")  # fp32 has no more digits
    for key, neutral in _OTHER_SAMPLING.items():
        if keys.get(f"general.sampling.{key}", neutral) != neutral:
            warn(f"{source}: key general.sampling.{key}: has no counterpart and is ignored")
    last = keys.get("general.sampling.penalty_last_n", -1)
    if values.get("repetition_penalty", 1) != 1 and last != -1:
        if last == 0:
            del values["repetition_penalty"]  # it looks at no token
        else:
            warn(f"{source}: key general.sampling.penalty_last_n: without effect, repetition_penalty counts all tokens")
    return values | ({"do_sample": values.get("temperature", 1.0) > 0} if values else {})


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
