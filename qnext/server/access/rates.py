"""How much each key may use: token buckets, requests at once, and a limit of wrong keys. No torch.

Each process counts for itself, so several replicas each give a key its whole limit. Only one thread may use it.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from qnext.server.access.keys import MAX_KEYS, Key

_MINUTE = 60.0
# Sums of floats may fall this much short of a whole request or token.
_ROUNDING = 1e-6
_SWEEP_SECONDS = 1.0

Name = TypeVar("Name", bound=Hashable)
State = TypeVar("State", bound="_Idles")


@dataclass(frozen=True)
class Refusal:
    """Why a request is refused. `reason` is one of requests, tokens, too_large, parallel, table and bad_keys.

    `retry_after` is in seconds; None where waiting does not help, since one request exceeds the limit of a minute.
    """

    reason: str
    message: str
    retry_after: float | None
    headers: dict[str, str] = field(default_factory=dict)  # Retry-After in whole seconds, and x-ratelimit-*


class KeyRates:
    """Requests and tokens per minute and requests at once, of every key that has such limits.

    A bucket holds the limit of one minute and fills evenly. In any t seconds a key gets at most limit * (1 + t / 60). A
    request is charged the tokens of its prompt when it comes, and those of its answer when it ends. So a bucket may
    become negative; then the key waits until it is filled. `clock` gives monotonic seconds. When more than
    `max_tracked` keys have limits, further such keys are refused.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, max_tracked: int = 2 * MAX_KEYS) -> None:
        self._clock = clock
        self._table: _Table[str, _KeyState] = _Table(max_tracked)

    def check(self, key: Key, num_tokens: int) -> Refusal | None:
        """Admit and charge a request with a prompt of `num_tokens`, or return why it is refused.

        None means admitted. Exactly one call of `finish` has to follow.
        """
        if not _is_limited(key):
            return None
        now = self._clock()
        state = self._table.find(key.id, now, lambda: _KeyState(key, now))
        if state is None:
            return _refusal("table", "too many keys are in use at once", _SWEEP_SECONDS, {})
        state.update(key, now)
        refusal = self._refuse(key, state, num_tokens)
        if refusal is None:
            state.num_running += 1
            for bucket, amount in ((state.requests, 1), (state.tokens, num_tokens)):
                if bucket is not None:
                    bucket.level -= amount
        return refusal

    def peek(self, key: Key) -> Refusal | None:
        """Why every request of this key would be refused now, or None. Nothing is charged, and nothing is promised."""
        state = self._table.get(key.id)
        if state is None or not _is_limited(key):
            return None
        state.update(key, self._clock())
        return self._refuse(key, state, 0)

    def finish(self, key: Key, num_charged: int, num_used: int) -> None:
        """An admitted request that was charged `num_charged` tokens has ended, after `num_used` tokens of prompt and
        answer."""
        now = self._clock()
        state = self._table.get(key.id)
        if state is not None:
            state.update(key, now)
            state.num_running = max(0, state.num_running - 1)
            if state.tokens is not None:
                state.tokens.level -= num_used - num_charged

    def headers(self, key: Key) -> dict[str, str]:
        """The headers x-ratelimit-* for the limits that the key has, as of now."""
        now = self._clock()
        state = self._table.get(key.id) or _KeyState(key, now)
        state.update(key, now)
        return _headers(state)

    def _refuse(self, key: Key, state: _KeyState, num_tokens: int) -> Refusal | None:
        headers = _headers(state)
        if state.tokens is not None and num_tokens > state.tokens.limit:
            message = f"this key may use {key.tokens_per_minute} tokens a minute; the prompt has {num_tokens}"
            return _refusal("too_large", message, None, headers)
        if key.max_parallel is not None and state.num_running >= key.max_parallel:
            return _refusal("parallel", f"this key may have {key.max_parallel} requests at once", 1.0, headers)
        if state.requests is not None and (wait := state.requests.wait(1)):
            message = f"this key may make {key.requests_per_minute} requests a minute"
            return _refusal("requests", message, wait, headers)
        if state.tokens is not None and (wait := state.tokens.wait(num_tokens)):
            return _refusal("tokens", f"this key may use {key.tokens_per_minute} tokens a minute", wait, headers)
        return None


class FailedLogins:
    """Counts bad keys by client address: `burst` at once, then `per_second`.

    Addresses of one /64 of IPv6 count as one. Beyond `max_tracked` addresses all others share one count, so that a
    flood from many addresses is limited too and takes no memory.
    """

    def __init__(
        self,
        *,
        per_second: float = 10.0,
        burst: int = 20,
        clock: Callable[[], float] = time.monotonic,
        max_tracked: int = 4096,
    ) -> None:
        self._clock = clock
        self._per_second = per_second
        self._burst = burst
        self._table: _Table[str, _Bucket] = _Table(max_tracked)
        self._others = _Bucket(burst, per_second, clock())

    def fail(self, client: str) -> Refusal | None:
        """Note a bad key from this address. None means answer 401; otherwise answer 429."""
        now = self._clock()
        bucket = self._table.find(network_of(client), now, lambda: _Bucket(self._burst, self._per_second, now))
        bucket = self._others if bucket is None else bucket
        bucket.fill(now)
        if wait := bucket.wait(1):
            return _refusal("bad_keys", "too many wrong keys from this address", wait, {})
        bucket.level -= 1
        return None


class _Idles:
    """A state that can be forgotten: a new one would be equal."""

    def is_idle(self, now: float) -> bool:
        raise NotImplementedError


class _Bucket(_Idles):
    def __init__(self, limit: float, per_second: float, now: float) -> None:
        self.limit = self.level = float(limit)
        self.per_second = per_second
        self._filled_at = now

    def fill(self, now: float) -> None:
        self.level = min(self.limit, self.level + max(0.0, now - self._filled_at) * self.per_second)
        self._filled_at = max(now, self._filled_at)

    def wait(self, amount: float) -> float:
        """Seconds until the level is `amount`; 0.0 when it is."""
        missing = amount - self.level
        return 0.0 if missing <= _ROUNDING else missing / self.per_second

    def is_idle(self, now: float) -> bool:
        self.fill(now)
        return self.level >= self.limit


class _KeyState(_Idles):
    def __init__(self, key: Key, now: float) -> None:
        self.num_running = 0
        self.requests = _with_limit(None, key.requests_per_minute, now)
        self.tokens = _with_limit(None, key.tokens_per_minute, now)

    def update(self, key: Key, now: float) -> None:
        """Take over the limits of a key, which a reload may have changed; what was used stays used."""
        self.requests = _with_limit(self.requests, key.requests_per_minute, now)
        self.tokens = _with_limit(self.tokens, key.tokens_per_minute, now)

    def is_idle(self, now: float) -> bool:
        return not self.num_running and all(b is None or b.is_idle(now) for b in (self.requests, self.tokens))


class _Table(Generic[Name, State]):
    """A bounded number of states. When it is full, idle ones are dropped, at most once a second."""

    def __init__(self, max_tracked: int) -> None:
        self._max_tracked = max_tracked
        self._states: dict[Name, State] = {}
        self._swept_at = -math.inf

    def get(self, name: Name) -> State | None:
        return self._states.get(name)

    def find(self, name: Name, now: float, make: Callable[[], State]) -> State | None:
        """None when there is no room for a new one."""
        state = self._states.get(name)
        if state is None:
            if len(self._states) >= self._max_tracked and now - self._swept_at >= _SWEEP_SECONDS:
                self._swept_at = now
                self._states = {name: state for name, state in self._states.items() if not state.is_idle(now)}
            if len(self._states) >= self._max_tracked:
                return None
            state = self._states[name] = make()
        return state


def _is_limited(key: Key) -> bool:
    return any(limit is not None for limit in (key.requests_per_minute, key.tokens_per_minute, key.max_parallel))


def _with_limit(bucket: _Bucket | None, limit: int | None, now: float) -> _Bucket | None:
    """The bucket of a key with `limit` a minute, as filled at `now`."""
    if limit is None:
        return None
    if bucket is None:
        return _Bucket(limit, limit / _MINUTE, now)
    bucket.fill(now)
    bucket.limit, bucket.per_second = float(limit), limit / _MINUTE
    bucket.level = min(bucket.limit, bucket.level)
    return bucket


def _refusal(reason: str, message: str, retry_after: float | None, headers: dict[str, str]) -> Refusal:
    if retry_after is not None:
        headers = {**headers, "Retry-After": str(max(1, math.ceil(retry_after)))}
    return Refusal(reason, message, retry_after, headers)


def _headers(state: _KeyState) -> dict[str, str]:
    headers = {}
    for name, bucket in (("requests", state.requests), ("tokens", state.tokens)):
        if bucket is not None:
            headers[f"x-ratelimit-limit-{name}"] = f"{bucket.limit:.0f}"
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level + _ROUNDING)))
            headers[f"x-ratelimit-reset-{name}"] = f"{bucket.wait(bucket.limit):.3f}s"  # until nothing is used
    return headers


def network_of(client: str) -> str:
    """The group of clients that count as one: one address, or one /64 of IPv6."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client[:64]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return client
