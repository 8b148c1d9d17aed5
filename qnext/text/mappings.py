"""Files of settings that a user writes: one mapping, as YAML or JSON."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from qnext.errors import UsageError

MAX_FILE_BYTES = 1 << 20


def read_user_mapping(path: Path) -> dict[Any, Any]:
    """The mapping in a JSON file (`.json`) or a YAML file; an empty one where the file holds nothing.

    Raises OSError, and UsageError where it is too long, no mapping, or has a key twice.
    """
    import yaml

    with path.open("rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError(f"{path}: more than {MAX_FILE_BYTES:,} bytes, which no set of flags needs")

    def without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for key, value in pairs:
            if key in values:
                raise UsageError(f"{path}: {key}: stands there twice")
            values[key] = value
        return values

    class UniqueKeyLoader(yaml.SafeLoader):
        """Safe, and no key twice: the first would be lost without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            without_duplicates([(key, None) for key in keys if isinstance(key, Hashable)])
            return super().construct_mapping(node, deep)

    try:
        if path.suffix == ".json":
            values = json.loads(raw, object_pairs_hook=without_duplicates)
        else:
            values = yaml.load(raw.decode("utf-8"), UniqueKeyLoader)
    except UsageError:
        raise
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must be a mapping of flags to values, not {type(values).__name__}")
    return values
