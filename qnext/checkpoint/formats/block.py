"""Typed values of one JSON object of a configuration, and the keys that no reader asked for. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qnext.errors import ConfigError, NotSupported

MAX_GROUP_SIZE = 2**31
_MAX_LISTED = 8


def shown(text: object) -> str:
    """One short line for any value of a file."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:80])


class ConfigBlock:
    """Reads keys by type. ConfigError names the key of a damaged value, NotSupported the key of one that is not
    implemented."""

    def __init__(self, values: Any, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: must be an object or null")
        self.values: dict[str, Any] = values
        self._known: set[str] = set()
        self._inner: list[ConfigBlock] = []

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}.{shown(key)}: {problem}")

    def not_supported(self, key: str, problem: str) -> NotSupported:
        return NotSupported(f"{self.where}.{shown(key)}: {problem}")

    def get(self, key: str) -> Any:
        self._known.add(key)
        return self.values.get(key)

    def neutral(self, *keys: str) -> None:
        """Accept keys that change no number here: how a folder was made, and how other programs compute."""
        self._known.update(keys)

    def unknown(self) -> Iterator[str]:
        """Keys that no reader asked for. Keys of inner objects have their path."""
        yield from (shown(key) for key in self.values if key not in self._known and self.values[key] is not None)
        for inner in self._inner:
            prefix = inner.where.removeprefix(f"{self.where}.")
            yield from (f"{prefix}.{key}" for key in inner.unknown())

    def choice(self, key: str, allowed: tuple[Any, ...]) -> Any:
        """A value that is one of `allowed`. None among them stands for an absent key too."""
        value = self.get(key)
        for known in allowed:
            if value == known and type(value) is type(known):
                return value
        listed = ", ".join(repr(known) for known in allowed if known is not None)
        if value is None:
            raise self.error(key, f"missing, only {listed}")
        raise self.not_supported(key, f"{shown(repr(value))} is not supported, only {listed or 'null'}")

    def word(self, key: str) -> str | None:
        """A string in lower case, or None where it is absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"must be a word, not {shown(value)!r}")
        return None if value is None else value.lower()

    def flag(self, key: str, default: bool | None = None) -> bool | None:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {shown(value)!r}")
        return default if value is None else value

    def group_size(self, key: str) -> int | None:
        """-1 means one group for all inputs, and so does an absent key."""
        value = self.get(key)
        if value is None:
            return None
        if type(value) is not int:
            raise self.error(key, f"must be an integer, not {shown(value)!r}")
        if value == -1:
            return None
        if not 0 < value < MAX_GROUP_SIZE:
            raise self.error(key, f"must be positive, or -1 for one group, not {value}")
        return value

    def block_size(self, key: str) -> tuple[int, int] | None:
        """The outputs and inputs that share a scale. null and an absent key are None."""
        value = self.get(key)
        if value is None:
            return None
        is_pair = isinstance(value, list) and len(value) == 2 and all(type(size) is int for size in value)
        if not is_pair or not all(0 < size < MAX_GROUP_SIZE for size in value):
            raise self.error(key, f"must be two positive integers, not {shown(value)!r}")
        return value[0], value[1]

    def names(self, *keys: str) -> list[str]:
        """The list of strings under the first of `keys` that has one. null and an absent key are the empty list."""
        for key in keys:
            value = self.get(key)
            if value is None:
                continue
            if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
                raise self.error(key, "must be a list of names")
            return value
        return []

    def block(self, key: str) -> ConfigBlock:
        """An inner object, which must exist."""
        return self.inner(self.get(key), shown(key))

    def inner(self, values: Any, name: str) -> ConfigBlock:
        """One of the objects of a list."""
        self._inner.append(ConfigBlock(values, f"{self.where}.{name}"))
        return self._inner[-1]

    def must_be_empty(self, *keys: str) -> None:
        for key in keys:
            if self.get(key):
                raise self.not_supported(key, f"{shown(self.values[key])} is not supported")


def list_unknown(block: ConfigBlock) -> str | None:
    """The warning that names all keys that no reader asked for, or None."""
    keys = list(block.unknown())
    if not keys:
        return None
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    listed = ", ".join(keys[:_MAX_LISTED])
    return f"{block.where}: {listed}{more}: not known here, read as if {'they were' if keys[1:] else 'it was'} absent"
