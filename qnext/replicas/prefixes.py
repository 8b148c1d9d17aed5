"""Which replica holds the longest beginning of a request: the text of a body in hashed chunks, and who has seen them.

A chunk's hash covers all chunks before it, so equal hashes mean equal beginnings. Nothing is tokenized. No torch, no
Ray.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import orjson

ReplicaName = TypeVar("ReplicaName", bound=Hashable)

_CHUNK_BYTES = 256  # of text, about 64 tokens
_HASH_BYTES = 8
MAX_CHUNKS = 4_096  # of one request: beyond the first megabyte nothing is compared
MAX_HELD_CHUNKS = 262_144  # of one replica that are remembered, some 30 MB of this process
SPREAD = 8  # requests by which a replica may be busier than the least busy one and still get what it holds
# Members of a message that are no part of the prompt, or move from one to the next.
_ASIDE = frozenset(("role", "content", "cache_control", "reasoning_content", "reasoning", "id", "status"))


def chain_of(owner: str, body: Any) -> tuple[bytes, ...]:
    """The hashes of a request's beginning, chunk by chunk, shortest beginning first; empty for a body without a prompt.

    `owner` and the body's `cache_salt` and `model` go before all text: prefixes of others are never looked at.
    """
    if not isinstance(body, Mapping):
        return ()
    link = hashlib.sha256(orjson.dumps([owner, _word(body, "cache_salt"), _word(body, "model")])).digest()
    chain: list[bytes] = []
    for piece in _pieces(body):
        for start in range(0, len(piece), _CHUNK_BYTES):
            link = hashlib.blake2b(piece[start : start + _CHUNK_BYTES], key=link, digest_size=_HASH_BYTES).digest()
            chain.append(link)
            if len(chain) == MAX_CHUNKS:
                return tuple(chain)
    return tuple(chain)


class PrefixIndex(Generic[ReplicaName]):
    """What each replica has been sent, as far as memory goes: of each the `max_chunks` that were asked for last."""

    def __init__(self, max_chunks: int = MAX_HELD_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._held: dict[ReplicaName, OrderedDict[bytes, None]] = {}

    def match(self, replica: ReplicaName, chain: Sequence[bytes]) -> int:
        """How many chunks of the beginning the replica has been sent before."""
        held = self._held.get(replica)
        if not held:
            return 0
        return next((count for count, link in enumerate(chain) if link not in held), len(chain))

    def learn(self, replica: ReplicaName, chain: Sequence[bytes]) -> None:
        """The replica gets this request."""
        held = self._held.setdefault(replica, OrderedDict())
        for link in reversed(chain):  # so that the ends of conversations are forgotten before their beginnings
            held[link] = None
            held.move_to_end(link)
        while len(held) > self._max_chunks:
            held.popitem(last=False)

    def forget(self, replica: ReplicaName) -> None:
        """The replica has ended."""
        self._held.pop(replica, None)

    def keep(self, replicas: Iterator[ReplicaName] | Sequence[ReplicaName]) -> None:
        """Forget all other replicas."""
        for gone in self._held.keys() - set(replicas):
            del self._held[gone]

    @property
    def num_chunks(self) -> int:
        return sum(map(len, self._held.values()))


def ranked(
    index: PrefixIndex[ReplicaName], chain: Sequence[bytes], loads: Mapping[ReplicaName, int], *, spread: int = SPREAD
) -> list[ReplicaName]:
    """All replicas, the best for a request first.

    Who holds the longest beginning comes first, unless its requests exceed those of the least busy replica by more than
    `spread`. Then the less busy one; of equals the one that every router would name for this beginning.
    """
    least = min(loads.values(), default=0)

    def rank(replica: ReplicaName) -> tuple[int, int, bytes]:
        match = index.match(replica, chain) if loads[replica] - least <= spread else -1
        return -match, loads[replica], _lot(replica, chain)

    return sorted(loads, key=rank)


def _lot(replica: Hashable, chain: Sequence[bytes]) -> bytes:
    """The same for the same replica and beginning in every process."""
    beginning = chain[0] if chain else b""
    return hashlib.blake2b(str(replica).encode(), key=beginning, digest_size=_HASH_BYTES).digest()


def _pieces(body: Mapping[str, Any]) -> Iterator[bytes]:
    """What the prompt is written from, in its order. A piece begins a new chunk."""
    for name in ("tools", "chat_template_kwargs", "reasoning_effort", "thinking"):
        if body.get(name) is not None:
            yield _json(body[name])
    for name in ("system", "instructions"):
        if body.get(name) is not None:
            yield b"system\0" + _text(body[name])
    prompt = body.get("prompt")
    if prompt is not None:
        yield _prompt(prompt)
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        yield b"user\0" + _encoded(messages)
    elif isinstance(messages, list):
        yield from map(_message, messages)


def _prompt(prompt: Any) -> bytes:
    """A text, token ids, or the first of several of these."""
    while isinstance(prompt, list) and prompt and isinstance(prompt[0], (list, str)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _encoded(prompt)
    try:
        return array("q", prompt).tobytes()
    except (TypeError, OverflowError):
        return b""


def _message(message: Any) -> bytes:
    if not isinstance(message, Mapping):
        return b""
    more = {name: value for name, value in message.items() if name not in _ASIDE and value is not None}
    head = _encoded(str(message.get("role", ""))) + b"\0" + _text(message.get("content"))
    return head + _json(more) if more else head


def _text(content: Any) -> bytes:
    """Text parts as one text, so that both forms of a message are the same; other parts as JSON."""
    if isinstance(content, str):
        return _encoded(content)
    if not isinstance(content, list):
        return b"" if content is None else _json(content)
    return b"".join(map(_part, content))


def _part(part: Any) -> bytes:
    if isinstance(part, str):
        return _encoded(part)
    if not isinstance(part, Mapping):
        return _json(part)
    if part.get("type") in ("thinking", "redacted_thinking"):
        return b""  # the templates write no thoughts of earlier turns
    if isinstance(part.get("text"), str):
        return _encoded(part["text"])
    return _json({name: value for name, value in part.items() if name != "cache_control"})


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _word(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    return value if isinstance(value, str) else ""
