"""The key of a watermark: how answers are marked, and the secret without which nobody finds or forges the mark."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qnext.errors import UsageError

Scheme = Literal["tournament", "green"]
SCHEMES: Mapping[Scheme, str] = {
    "tournament": "SynthID-Text (Dathathri et al., Nature 2024): no answer becomes likelier over all keys",
    "green": "soft green list (Kirchenbauer et al., 2301.10226): also at temperature 0, at a cost in quality",
}
_FORMAT_KEY = "qnext_watermark"
_SECRET_BYTES = 32
MAX_CONTEXT, MAX_LAYERS, MAX_DELTA = 16, 60, 20.0


@dataclass(frozen=True)
class WatermarkKey:
    """Raises UsageError naming the field for a value that is out of range.

    The mark of a token depends on the secret and on the `context` tokens of the answer before it. `layers` are those
    of a tournament. Of a green list, `gamma` is the share of green tokens, `delta` what is added to their logits.
    """

    secret: bytes = field(repr=False)
    scheme: Scheme = "tournament"
    context: int = 4
    layers: int = 30
    gamma: float = 0.5
    delta: float = 2.0

    def __post_init__(self) -> None:
        ranges = {
            "context": (1, MAX_CONTEXT),
            "layers": (1, MAX_LAYERS),
            "gamma": (0.01, 0.99),
            "delta": (0.01, MAX_DELTA),
        }
        if self.scheme not in SCHEMES:
            raise UsageError(f"watermark: scheme must be {' or '.join(SCHEMES)}, not {str(self.scheme)[:40]!r}")
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            kinds = (int,) if isinstance(least, int) else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
                raise UsageError(f"watermark: {name} must be between {least} and {most}, not {str(value)[:40]}")
        if len(self.secret) != _SECRET_BYTES:
            raise UsageError(f"watermark: the secret must have {_SECRET_BYTES} bytes, not {len(self.secret)}")

    @classmethod
    def new(cls, **values: Any) -> WatermarkKey:
        return cls(secrets.token_bytes(_SECRET_BYTES), **values)

    @property
    def name(self) -> str:
        """A public name of the key, for logs: the secret cannot be told from it."""
        return hashlib.sha256(b"name of a watermark's key" + self.secret).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """Only what its scheme reads."""
        own = ("layers",) if self.scheme == "tournament" else ("gamma", "delta")
        values = {name: getattr(self, name) for name in ("scheme", "context", *own)}
        return {_FORMAT_KEY: 1, **values, "secret": self.secret.hex()}

    @classmethod
    def from_json(cls, document: Any) -> WatermarkKey:
        """Raises UsageError for what is no key."""
        if not isinstance(document, dict) or document.get(_FORMAT_KEY) != 1:
            raise UsageError("is no key of a watermark; `qnext watermark create` makes one")
        values = {name: value for name, value in document.items() if name != _FORMAT_KEY}
        try:
            return cls(**{**values, "secret": bytes.fromhex(values["secret"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"is a malformed key of a watermark: {error}") from None
        except ValueError as error:
            raise UsageError(f"is a malformed key of a watermark: {error}") from None

    def seed(self, context: tuple[int, ...]) -> int:
        """64 bits of the tokens before a place, which only who has the secret can compute."""
        text = b"".join(token.to_bytes(4, "little") for token in context)
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=self.secret).digest(), "little")


class MarkedPlaces:
    """Which places of one answer are marked, and by which seed: those whose context was not there before.

    So a text that repeats itself is not pulled towards the same tokens again and again, and each context counts once
    when the mark is looked for. It depends on the tokens of the answer alone.
    """

    def __init__(self, key: WatermarkKey) -> None:
        self.key = key
        self._seen: set[int] = set()
        self._num_read = key.context  # places whose context is in `_seen`, or that have none

    def seed(self, output_ids: list[int], more: tuple[int, ...] = ()) -> int | None:
        """The seed of the place behind `output_ids` and `more`; None where it is not marked. `output_ids` only grow."""
        width = self.key.context
        for place in range(self._num_read, len(output_ids)):
            self._seen.add(self.key.seed(tuple(output_ids[place - width : place])))
        self._num_read = max(self._num_read, len(output_ids))
        ids = (*output_ids[-width:], *more)
        ends = range(max(width, len(ids) - len(more)), len(ids) + 1)
        seeds = [self.key.seed(ids[end - width : end]) for end in ends]
        return None if not seeds or seeds[-1] in self._seen or seeds[-1] in seeds[:-1] else seeds[-1]
