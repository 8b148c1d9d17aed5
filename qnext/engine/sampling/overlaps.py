"""Whether two JSON schemas may fit one value, as far as a look at them tells. Neither torch nor a library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exclude(one: Any, other: Any) -> bool:
    """Whether no value fits both schemas, by their types, their values or a property that tells them apart."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one is False or other is False
    values, others = _values(one), _values(other)
    if values is not None and others is not None:
        return not any(_same(value, another) for value in values for another in others)
    kinds, other_kinds = _kinds(one), _kinds(other)
    if kinds and other_kinds and not kinds & other_kinds:
        return True
    if kinds != {"object"} or other_kinds != {"object"}:
        return False
    shared = set(_required_names(one)) & set(_required_names(other))
    return any(exclude(_property(one, name), _property(other, name)) for name in shared)


def _values(node: Mapping[str, Any]) -> list[Any] | None:
    if "const" in node:
        return [node["const"]]
    values = node.get("enum")
    return values if isinstance(values, list) else None


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _kinds(node: Mapping[str, Any]) -> set[str]:
    """Types that a value of the schema may have; an integer is a number. Empty: any."""
    kinds = node.get("type")
    found = {kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)}
    return found | {"number"} if "integer" in found else found


def _required_names(node: Mapping[str, Any]) -> list[str]:
    names = node.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _property(node: Mapping[str, Any], name: str) -> Any:
    properties = node.get("properties")
    return properties.get(name) if isinstance(properties, Mapping) else None
