"""What policy knows of the tiers beyond the device's memory: which prefix goes there, which comes back. No torch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from qnext.engine.policy.prefix_node import Tokens


class Load(NamedTuple):
    """What was fetched is to be written into `blocks`, those of its tokens from block number `first_block` on, and
    `slot`."""

    fetch_id: int
    first_block: int
    blocks: tuple[int, ...]
    slot: int | None


class Fetch(Protocol):
    """A prefix in a tier, brought to the host's memory by `start`. It is there for a Load as long as it is held."""

    @property
    def id(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def is_open(self) -> bool:
        """Whether it is still on its way."""

    @property
    def is_good(self) -> bool:
        """Whether it has come whole. Entries that are damaged or gone have not."""

    def start(self) -> None: ...

    def wait(self, seconds: float) -> None:
        """Until it has come, but no longer than so."""


class Archive(Protocol):
    """The tiers. Reads no file in `find`.

    Keys and values are kept in chunks of `chunk_tokens`. With `saves_at_once` what is cached is to be saved too, not
    only what is evicted.
    """

    chunk_tokens: int
    saves_at_once: bool

    def find(self, tokens: Tokens, *, salt: str, above: int, limit: int) -> Fetch | None:
        """The longest stored prefix of more than `above` and at most `limit` tokens."""

    def held_bytes(self, owner: str) -> tuple[int, int]:
        """Of one owner, in the host's memory and on disk. Any thread may ask."""
