"""Pairs of answers to one prompt as people write them: a chosen and a rejected one, in the forms that samples have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qnext.errors import UsageError
from qnext.text.samples import Sample, sample_of

_PROMPTS = {"prompt": "prompt", "question": "prompt", "instruction": "instruction", "conversations": "conversations"}


class PairSample(NamedTuple):
    """Two conversations. What they have in common is not taught."""

    chosen: Sample
    rejected: Sample

    @property
    def num_characters(self) -> int:
        return sum(each.num_characters for each in self)

    def digest(self) -> bytes:
        """Equal for equal contents, whatever form and file they came in."""
        return hashlib.blake2b(b"".join(each.digest() for each in self), digest_size=16).digest()


def pair_of(value: Any) -> PairSample:
    """The pair in a JSON value.

    The prompt is a text (`prompt`, `question`; `instruction` and `input`) or a list of messages (`prompt`;
    `conversations` in ShareGPT's words), or it begins both answers. An answer is a text, a message or a list of
    messages. `system` and `tools` are as in samples. Raises UsageError naming what is not so.
    """
    if not isinstance(value, Mapping):
        raise UsageError("a pair is not a JSON object")
    if not {"chosen", "rejected"} <= value.keys():
        keys = ", ".join(sorted(map(str, value))[:8]) or "none"
        raise UsageError(f"a pair needs chosen and rejected, not only keys {keys}")
    prompts = [key for key in _PROMPTS if value.get(key) is not None]
    if len(prompts) > 1:
        raise UsageError(f"a pair has one prompt, not {' and '.join(prompts)}")
    return _compared(*(_sample(value, prompts[0] if prompts else None, answer) for answer in ("chosen", "rejected")))


def _compared(chosen: Sample, rejected: Sample) -> PairSample:
    """Both with the messages that they begin with in common taken out of what is taught."""
    shared = 0
    for one, other in zip(chosen.messages, rejected.messages, strict=False):
        if one != other:
            break
        shared += 1
    if not shared:
        raise UsageError("chosen and rejected do not begin with the same message: there is no prompt")
    return PairSample(*(_taught_from(each, shared) for each in (chosen, rejected)))


def _taught_from(sample: Sample, first: int) -> Sample:
    return sample._replace(is_taught=tuple(i >= first and taught for i, taught in enumerate(sample.is_taught)))


def _sample(value: Mapping[str, Any], prompt: str | None, answer: str) -> Sample:
    """The conversation that ends with one of the answers."""
    try:
        return _conversation(value, prompt, value[answer])
    except UsageError as error:
        raise UsageError(f"{answer}: {error}") from None


def _conversation(value: Mapping[str, Any], prompt: str | None, answer: Any) -> Sample:
    rest = {key: value[key] for key in ("system", "tools") if key in value}
    turns = _turns(answer)
    if prompt is None:
        if turns is None:
            raise UsageError("a text needs a prompt beside it")
        return _of_messages(turns, rest)
    asked = value[prompt]
    if prompt == "conversations":
        said = [{"from": "gpt", "value": answer}] if turns is None else turns
        return sample_of({"conversations": [*_listed(asked, prompt), *said], **rest}, form="sharegpt")
    if prompt == "instruction":
        return sample_of({**value, "output": _text_of(answer, turns)}, form="alpaca")
    if not isinstance(asked, str):
        said = [{"role": "assistant", "content": answer}] if turns is None else turns
        return _of_messages([*_listed(asked, prompt), *said], rest)
    if turns is not None and len(turns) > 1:
        return _holding(_of_messages(turns, rest), asked)
    return sample_of({"prompt": asked, "completion": _text_of(answer, turns), **rest}, form="prompt-completion")


def _of_messages(turns: Sequence[Any], rest: Mapping[str, Any]) -> Sample:
    system = rest.get("system")
    head = [{"role": "system", "content": system}] if system not in (None, "") else []
    return sample_of({**rest, "messages": [*head, *turns]}, form="messages")


def _turns(answer: Any) -> list[Any] | None:
    """The messages of an answer; None for a text."""
    if isinstance(answer, Mapping):
        return [answer]
    if not isinstance(answer, str | list):
        raise UsageError("an answer is a text, a message or a list of messages")
    return None if isinstance(answer, str) else answer


def _text_of(answer: Any, turns: list[Any] | None) -> Any:
    if turns is None:
        return answer
    if len(turns) != 1 or not isinstance(turns[0], Mapping):
        raise UsageError("expected a text or one message")
    return turns[0].get("content", turns[0].get("value"))


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{name} is not a list of messages")
    return value


def _holding(sample: Sample, asked: str) -> Sample:
    """A whole conversation whose prompt stands beside it again."""
    if all(message.content != asked for message in sample.messages):
        raise UsageError("the prompt is no message of the conversation")
    return sample
