"""Samples as people write them to conversations: which form a JSON value has is certain, or it is refused.

A form is known by its keys. Keys of no form, such as ids and scores, are not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qnext.errors import UsageError
from qnext.text.messages import (
    Message,
    checked_conversation,
    checked_tools,
    message_from_dict,
    message_to_dict,
)


class Sample(NamedTuple):
    """A text, or a conversation with its tools. `is_taught` has an entry for each message."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    is_taught: tuple[bool, ...] = ()

    @property
    def num_characters(self) -> int:
        return len(self.text or "") + sum(len(message.content) for message in self.messages)

    def digest(self) -> bytes:
        """Equal for equal contents, whatever form and file they came in."""
        value: Any = self.text
        if value is None:
            value = [[message_to_dict(message) for message in self.messages], self.tools, self.is_taught]
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()


def sample_of(value: Any, *, form: str | None = None) -> Sample:
    """The sample in a JSON value, in `form` or in the only form whose keys it has.

    Raises UsageError where no form fits, more than one does, or the value is not what its form demands.
    """
    if not isinstance(value, Mapping):
        raise UsageError(f"a sample is a JSON object, not {_kind(value)}")
    fitting = [name for name, keys in FORMS.items() if set(keys) <= value.keys()] if form is None else [form]
    if len(fitting) > 1:
        raise UsageError(f"keys of several forms ({', '.join(fitting)}); --set form=NAME says which is meant")
    if not fitting:
        if {"chosen", "rejected"} <= value.keys():
            raise UsageError("a pair of answers (chosen, rejected) is what `qnext train dpo` learns from")
        known = ", ".join(f"{name} ({' and '.join(keys)})" for name, keys in FORMS.items())
        raise UsageError(f"keys {', '.join(sorted(map(str, value))[:8]) or 'none'} are of no known form: {known}")
    (name,) = fitting
    for key in FORMS[name]:
        if key not in value:
            raise UsageError(f"no key {key!r}, which the form {name} has")
    return _READERS[name](value)


# The keys that make a form.
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
_ROLES_OF_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool": "tool",
}


def _messages(value: Mapping[str, Any]) -> Sample:
    return _conversation(_turns(value["messages"], "messages"), value)


def _sharegpt(value: Mapping[str, Any]) -> Sample:
    turns = _list(value["conversations"], "conversations")
    if turns and all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
        return _conversation(_turns(turns, "conversations"), value)
    found: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        where = f"conversations: turn {index}"
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise UsageError(f"{where}: needs from and value")
        role = _ROLES_OF_SHAREGPT.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise UsageError(f"{where}: from {turn['from']!r} is unknown, expected one of {_known_roles()}")
        text = _string(turn["value"], f"{where}: value")
        weight = {"weight": turn["weight"]} if "weight" in turn else {}
        if role == "call":
            found.append({"role": "assistant", "content": "", "tool_calls": _calls(text, where), **weight})
        else:
            found.append({"role": role, "content": text, **weight})
    return _conversation([*_system_of(value), *found], value)


def _alpaca(value: Mapping[str, Any]) -> Sample:
    given = _optional(value, "input")
    asked = _string(value["instruction"], "instruction") + (f"\n\n{given}" if given.strip() else "")
    found = _system_of(value)
    for index, pair in enumerate(_list(value.get("history") or [], "history")):
        question, reply = _pair(pair, f"history: pair {index}")
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    answer = {"role": "assistant", "content": _string(value["output"], "output")}
    return _conversation([*found, {"role": "user", "content": asked}, answer], value)


def _prompt_completion(value: Mapping[str, Any]) -> Sample:
    """Two strings are a question and its answer; two lists are the messages of one conversation, cut in two."""
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation([*_system_of(value), *turns], value)
    before = [{"weight": 0, **turn} for turn in _turns(prompt, "prompt")]
    return _conversation([*before, *_turns(completion, "completion")], value)


def _text(value: Mapping[str, Any]) -> Sample:
    return Sample(text=_string(value["text"], "text"))


_READERS: dict[str, Callable[[Mapping[str, Any]], Sample]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text,
}


def _conversation(turns: Sequence[Mapping[str, Any]], value: Mapping[str, Any]) -> Sample:
    messages: list[Message] = []
    is_taught: list[bool] = []
    for index, turn in enumerate(turns):
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise UsageError(f"message {index}: weight is 0 or 1, not {weight!r}")
        try:
            messages.append(message_from_dict(turn))
        except UsageError as error:
            raise UsageError(f"message {index}: {error}") from None
        is_taught.append(weight != 0)
    return Sample(
        messages=tuple(checked_conversation(messages)), tools=_tools(value.get("tools")), is_taught=tuple(is_taught)
    )


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """A list, or its JSON text, as ShareGPT has it."""
    if value is None or value == "":
        return ()
    return tuple(checked_tools(_list(_json(value, "tools") if isinstance(value, str) else value, "tools")))


def _calls(text: str, where: str) -> list[Any]:
    """Calls of tools as JSON text, one or a list."""
    value = _json(text, where)
    return value if isinstance(value, list) else [value]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON ({error})") from None


def _turns(value: Any, key: str) -> list[Mapping[str, Any]]:
    turns = _list(value, key)
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise UsageError(f"{key}: message {index} is {_kind(turn)}, not an object")
    return turns


def _pair(value: Any, where: str) -> tuple[str, str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UsageError(f"{where}: expected a question and its answer")
    return _string(value[0], where), _string(value[1], where)


def _system_of(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = _optional(value, "system")
    return [{"role": "system", "content": text}] if text else []


def _optional(value: Mapping[str, Any], key: str) -> str:
    return "" if value.get(key) is None else _string(value[key], key)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where} is {_kind(value)}, not a string")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{where} is {_kind(value)}, not a list")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _known_roles() -> str:
    return ", ".join(_ROLES_OF_SHAREGPT)
