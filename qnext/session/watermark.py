"""Keys of watermarks as files, and the search for a mark in a text."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import NamedTuple

from qnext.engine.policy.watermark_key import WatermarkKey
from qnext.engine.sampling.watermark import MarkScore, score
from qnext.errors import UsageError, warn
from qnext.files import write_file
from qnext.text.tokenizer import Tokenizer

_MOST_BYTES = 4096
LEAST_SCORED = 16  # of fewer tokens nothing is said


def write_key(path: Path, key: WatermarkKey) -> None:
    """A new file that only its owner may read. Raises UsageError where one exists: its texts could not be found any
    more."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path}: exists already, and texts that it marked can be found by it alone")
    write_file(path, json.dumps(key.to_json(), indent=1) + "\n", mode=0o600)


def read_key(path: Path) -> WatermarkKey:
    """Raises UsageError for what is no key. Warns of one that others may read."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    with path.open("rb") as file:
        raw = file.read(_MOST_BYTES)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        document = None
    try:
        key = WatermarkKey.from_json(document)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        warn(f"{path}: others may read it, and who has the key can forge or wash out the mark; chmod 600 helps")
    return key


class MarkFinding(NamedTuple):
    """What a text shows of a key at a `level`: the chance of calling an unmarked text marked."""

    score: MarkScore
    level: float

    @property
    def is_marked(self) -> bool | None:
        """None where the text is too short to say."""
        if self.score.num_scored < LEAST_SCORED:
            return None
        return self.score.p_value < self.level

    @property
    def verdict(self) -> str:
        if self.is_marked is None:
            return f"too short to say: {self.score.num_scored} tokens count, at least {LEAST_SCORED} are needed"
        if self.is_marked:
            return (
                f"marked by this key: a text without the mark scores so high with a chance of {self.score.p_value:.1g}"
            )
        return (
            f"no sign of this key (p = {self.score.p_value:.2g}, not below {self.level:g}): the text may be unmarked, "
            "too short, too predictable, or edited too much"
        )


def find_mark(text: str, key: WatermarkKey, tokenizer: Tokenizer, *, level: float) -> MarkFinding:
    """Look for the mark in a text, as the tokenizer of the model divides it. Raises UsageError where there is none."""
    if not text.strip():
        raise UsageError("the text is empty")
    return MarkFinding(score(tokenizer.encode(text), key), level)
