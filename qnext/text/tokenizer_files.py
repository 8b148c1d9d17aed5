"""The files of a model folder that define its tokenizer, in all forms that are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, warn
from qnext.text.added_tokens import FAMILY_CONTROL
from qnext.text.files import first_line, read_json, read_json_object, read_text
from qnext.text.train import IM_END, build_tokenizer

# Tables are made by id, by this program and by the library, whatever ids have a token. The largest vocabularies that
# are known have some 260,000.
MAX_TOKEN_IDS = 1 << 22
READ_FORMS = {
    "tokenizer.json": "byte-level BPE in the form of the tokenizers library",
    "vocab.json + merges.txt": "byte-level BPE of the Qwen2 family, with the added tokens of its companions",
}
UNREAD_FORMS = {
    "qwen.tiktoken": "a vocabulary of tiktoken",
    "tokenizer.model": "a model of SentencePiece",
    "spiece.model": "a model of SentencePiece",
    "tekken.json": "a vocabulary of Mistral's",
}
# Classes whose vocab.json and merges.txt mean the family's splitting of words.
_FAMILY_CLASSES = (
    None,
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "Qwen3Tokenizer",
    "Qwen3TokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_backend(folder: Path) -> Backend:
    """The tokenizer of a folder: tokenizer.json, else vocab.json with merges.txt; neither cuts nor pads.

    Added tokens that only tokenizer_config.json, added_tokens.json or special_tokens_map.json know are added.
    Raises ModelNotFound where there is none, NotSupported for a form that is not read, CorruptCheckpoint naming file
    and cause for bad content.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        backend = parsed(read_text(path), path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_vocabulary(folder)
    else:
        for name, form in UNREAD_FORMS.items():
            if (folder / name).is_file():
                raise NotSupported(f"{folder / name}: {form} is not read; save it as tokenizer.json with transformers")
        raise ModelNotFound(f"{folder}: no tokenizer.json here, nor vocab.json with merges.txt")
    backend.no_truncation()
    backend.no_padding()
    missing = {
        index: token
        for index, token in _added_tokens(folder).items()
        if backend.token_to_id(token.content) is None and backend.id_to_token(index) is None
    }
    return _with_tokens(backend, missing, path) if missing else backend


def end_tokens(folder: Path, backend: Backend) -> list[int | str]:
    """What ends an answer: ids of generation_config.json, else of config.json, and the tokenizer's own end token.

    Where no file says any, those of the family's own end tokens that are in the vocabulary, with a warning.
    """
    found: list[int | str] = []
    for name in ("generation_config.json", "config.json"):
        values = read_json_object(folder / name)
        inner = values.get("text_config")
        value = values.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
        if ids := _id_list(value, folder / name, "eos_token_id"):
            found += ids
            break
    own = _named_token(folder, "eos_token")
    found += [own] if own is not None else []
    if not found and (known := [name for name in (IM_END, FAMILY_CONTROL[0]) if backend.token_to_id(name) is not None]):
        warn(f"{folder}: no file names an end token; taken as such: {', '.join(known)}")
        found += known
    return found


def padding_token(folder: Path, backend: Backend) -> int | str | None:
    """The padding token, which no computation here reads; None, with a warning, where the vocabulary lacks it."""
    name = _named_token(folder, "pad_token")
    if name is None:
        path = folder / "generation_config.json"
        ids = _id_list(read_json_object(path).get("pad_token_id"), path, "pad_token_id")
        return ids[0] if ids else None
    if backend.token_to_id(name) is None:
        warn(f"{folder}: the padding token is not in the vocabulary, which has no effect here")
        return None
    return name


def named_tokens(folder: Path) -> dict[str, str]:
    """The tokens that chat templates know by their part, such as `eos_token`."""
    return {key: name for key in _NAMED_TOKENS if (name := _named_token(folder, key)) is not None}


def _named_token(folder: Path, key: str) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_json_object(folder / name).get(key)
        if value is not None:
            return _token_name(value, folder / name, key)
    return None


def parsed(text: str, source: object) -> Backend:
    """A tokenizer from its JSON text. Raises CorruptCheckpoint naming `source`, also for ids beyond all reason."""
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception for every fault in the file
        raise CorruptCheckpoint(f"{source}: {first_line(error)}") from error
    check_ids(backend.get_vocab(with_added_tokens=True), source)
    return backend


def check_ids(ids: Mapping[str, int], source: object) -> None:
    """Refuse a vocabulary before anything is made of it that is as long as its largest id."""
    if ids:
        name = max(ids, key=ids.__getitem__)
        if ids[name] >= MAX_TOKEN_IDS:
            raise CorruptCheckpoint(f"{source}: token {name!r} has id {ids[name]}; ids are below {MAX_TOKEN_IDS}")


def _from_vocabulary(folder: Path) -> Backend:
    kind = read_json_object(folder / "tokenizer_config.json").get("tokenizer_class")
    if kind not in _FAMILY_CLASSES:
        raise NotSupported(
            f"{folder}: vocab.json and merges.txt of a {kind} are not read; save it as tokenizer.json with transformers"
        )
    path = folder / "vocab.json"
    vocab = read_json_object(path)
    if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in vocab.values()):
        raise CorruptCheckpoint(f"{path}: the value of every token must be its id")
    check_ids(vocab, path)
    added = _added_tokens(folder)
    try:
        backend = build_tokenizer(vocab, _merges(folder / "merges.txt"), special_tokens=[])
    except Exception as error:  # the library raises bare Exception for a merge of unknown parts
        raise CorruptCheckpoint(f"{folder / 'merges.txt'}: {first_line(error)}") from error
    for index, token in added.items():
        present = backend.token_to_id(token.content), backend.id_to_token(index)
        if present not in ((None, None), (index, token.content)):
            raise CorruptCheckpoint(
                f"{path}: added token {token.content!r} has id {index}, which contradicts this file"
            )
    return _with_tokens(backend, added, path)


def _merges(path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    # Only "\n" ends a line: a merge may hold other characters that Python takes for the end of one.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise CorruptCheckpoint(f"{path}: line {number}: a merge is two tokens with a space between them")
        merges.append((parts[0], parts[1]))
    return merges


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """What the companions of a tokenizer say of added tokens, by id and in that order."""
    path = folder / "tokenizer_config.json"
    config, named = read_json_object(path), read_json_object(folder / "special_tokens_map.json")
    special = _special_names(config) | _special_names(named) | set(FAMILY_CONTROL)
    found: dict[int, AddedToken] = {}
    listed = config.get("added_tokens_decoder") or {}
    for key, entry in listed.items() if isinstance(listed, dict) else ():
        if not str(key).isascii() or not str(key).isdigit() or not isinstance(entry, dict):
            raise CorruptCheckpoint(f"{path}: added_tokens_decoder must map ids to tokens")
        name = _token_name(entry, path, "added_tokens_decoder")
        flags = {flag: entry[flag] for flag in _FLAGS if isinstance(entry.get(flag), bool)}
        if name:
            found[int(key)] = AddedToken(name, **flags)
    path = folder / "added_tokens.json"
    for name, index in (read_json(path) if path.is_file() else {}).items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise CorruptCheckpoint(f"{path}: the value of every token must be its id")
        is_special = name in special
        found.setdefault(index, AddedToken(name, special=is_special, normalized=not is_special))
    check_ids({token.content: index for index, token in found.items()}, folder)
    return dict(sorted(found.items()))


_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def _special_names(values: Mapping[str, Any]) -> set[str]:
    """Names of the tokens that a file calls special, each a text or an object with its text."""
    entries = [values.get(key) for key in _NAMED_TOKENS]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = values.get(key)
        entries += list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
    names = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return {name for name in names if isinstance(name, str)}


def _with_tokens(backend: Backend, tokens: Mapping[int, AddedToken], source: Path) -> Backend:
    """The tokenizer with more added tokens, each at its id."""
    description = json.loads(backend.to_str())
    entries = {entry["id"]: entry for entry in description["added_tokens"]}
    for index, token in tokens.items():
        flags = {flag: getattr(token, flag) for flag in _FLAGS}
        entries.setdefault(index, {"id": index, "content": token.content, **flags})
    # An added token that the vocabulary names keeps its id; others would be numbered from the vocabulary's size on.
    description["model"]["vocab"] |= {entry["content"]: index for index, entry in entries.items()}
    description["added_tokens"] = [entries[index] for index in sorted(entries)]
    return parsed(json.dumps(description, ensure_ascii=False), source)


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
