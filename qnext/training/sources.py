"""Text files -> texts -> documents: reading, choosing, splitting by package, tokenising."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qnext.errors import UsageError
from qnext.text.files import read_user_text
from qnext.text.tokenizer import Tokenizer
from qnext.training.data import Document


class TextFile(NamedTuple):
    """A text and its origin. A split never divides a `package`."""

    name: str
    package: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, texts that are never trained on, and one line for people on their origin."""

    train: list[TextFile]
    held_out: list[TextFile]
    description: str


def collect(root: Path, *, suffixes: Sequence[str], skip_folders: Iterable[str] = ()) -> tuple[list[TextFile], int]:
    """Every distinct text under `root` with one of `suffixes`, sorted by path, and how many files were left out.

    The package of a file is the first part of its path below `root`, without suffix. Files that read_user_text refuses
    and repeated contents are left out. Folders named in `skip_folders` are not entered. Raises UsageError when `root`
    is no folder or nothing is found.
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
            text = read_user_text(path)
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
    """(train, held out). A whole package is held out when the hash of its name falls below `held_out_share`.

    The share is one of packages, not of bytes. Adding files never moves a package to the other side.
    """
    sides: tuple[list[TextFile], list[TextFile]] = ([], [])
    for file in files:
        digest = hashlib.blake2b(f"{salt}/{file.package}".encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "big") / 2**64 < held_out_share].append(file)
    return sides


def take_bytes(files: Sequence[TextFile], *, limit: int, salt: str = "") -> list[TextFile]:
    """Files in an order that the hashes of their names fix, as many as stay within `limit` bytes; at least one."""
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
