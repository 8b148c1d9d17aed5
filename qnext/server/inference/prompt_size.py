"""The length of a prompt in characters, before it is tokenised. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qnext.text.messages import Message
from qnext.text.prompts import ChatPrompt


def num_characters_of(prompt: ChatPrompt) -> int:
    """Characters of everything that the template may write."""
    messages = sum(map(_num_characters_in, prompt.messages))
    return messages + _num_characters(prompt.tools) + _num_characters(prompt.asked.arguments)


def texts_of(prompt: ChatPrompt) -> Iterator[str]:
    """All texts of a conversation and its tools except thoughts, which a template may leave out."""
    written = ([m.content, [call.arguments for call in m.tool_calls]] for m in prompt.messages)
    return _texts([*written, list(prompt.tools)])


def whole_words(text: str, length: int) -> str:
    """At most the first `length` characters of a text, cut before a space if there is one, because no token spans that
    place."""
    end = text.rfind(" ", 1, length)
    while end > 0 and text[end - 1].isspace():
        end = text.rfind(" ", 1, end)
    return text[: end if end > 0 else length]


def _num_characters_in(message: Message) -> int:
    calls = sum(len(call.name) + _num_characters(call.arguments) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning_content or "") + calls


def _texts(value: object) -> Iterator[str]:
    """All texts inside a value, keys left out."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, Sequence):
            waiting.extend(reversed(item))


def _num_characters(value: object) -> int:
    """Characters of all texts inside a value, keys as well."""
    waiting, total = [value], 0
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, Sequence):
            waiting.extend(item)
        else:
            total += 1
    return total
