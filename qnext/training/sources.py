"""Text files -> texts -> documents: reading, choosing, splitting by package, tokenising."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qnext.errors import UsageError
from qnext.text.tokenizer import Tokenizer
from qnext.training.data import Document


class TextFile(NamedTuple):
    """A text and where it came from; `package` is what a split never cuts apart."""

    name: str
    package: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Texts to train on and texts that are never trained on, with one line for people on where they came from."""

    train: list[TextFile]
    held_out: list[TextFile]
    description: str


def read_text(path: Path) -> str:
    """The text of one UTF-8 file. Raises UsageError naming the file: unreadable, empty, not UTF-8 or binary."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    if not data.strip():
        raise UsageError(f"{path}: empty, there is nothing to read")
    if b"\0" in data:
        raise UsageError(f"{path}: holds NUL bytes, not a text file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start})") from None


def collect(root: Path, *, suffixes: Sequence[str], skip_folders: Iterable[str] = ()) -> tuple[list[TextFile], int]:
    """Every distinct text under `root` with one of `suffixes`, sorted by path, and how many files were left out.

    The package of a file is the first part of its path below `root`, without suffix. Files that read_text refuses
    and repeated contents are left out; folders named in `skip_folders` are not entered. Raises UsageError when
    `root` is no folder or nothing is found.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    skipped_folders = set(skip_folders)
    files: list[TextFile] = []
    seen: set[bytes] = set()
    num_left_out = 0
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix not in suffixes or skipped_folders & set(relative.parts[:-1]) or not path.is_file():
            continue
        try:
            text = read_text(path)
        except UsageError:
            num_left_out += 1
            continue
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            num_left_out += 1
            continue
        seen.add(digest)
        files.append(TextFile(relative.as_posix(), relative.parts[0].split(".")[0], text))
    if not files:
        raise UsageError(f"{root}: no readable {' or '.join(suffixes)} file")
    return files, num_left_out


def split_by_package(
    files: Sequence[TextFile], *, held_out_share: float, salt: str = ""
) -> tuple[list[TextFile], list[TextFile]]:
    """(train, held out): whole packages are held out when the hash of their name falls below `held_out_share`.

    The share is of packages, not of bytes, and adding files never moves a package to the other side.
    """
    sides: tuple[list[TextFile], list[TextFile]] = ([], [])
    for file in files:
        digest = hashlib.blake2b(f"{salt}/{file.package}".encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "big") / 2**64 < held_out_share].append(file)
    return sides


def take_bytes(files: Sequence[TextFile], *, limit: int, salt: str = "") -> list[TextFile]:
    """Files in an order that their names' hashes fix, as many as stay within `limit` bytes; at least one."""
    order = sorted(files, key=lambda file: hashlib.blake2b(f"{salt}/{file.name}".encode(), digest_size=8).digest())
    taken: list[TextFile] = []
    total = 0
    for file in order:
        size = len(file.text.encode())
        if taken and total + size > limit:
            continue
        taken.append(file)
        total += size
    return taken


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, *, end_id: int) -> list[Document]:
    """One document per text: its tokens, then `end_id`. Names of control tokens in the text stay plain text."""
    return [np.array([*ids, end_id], dtype=np.int32) for ids in tokenizer.encode_batch(texts)]
