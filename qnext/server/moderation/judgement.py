"""What a hook is asked, and what its reply means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

JudgedStage = Literal["prompt", "answer"]
Action = Literal["allow", "flag", "redact", "block"]
ACTIONS: tuple[Action, ...] = get_args(Action)
_CATEGORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,63}")
_MAX_CATEGORIES = 16


class BadReply(ValueError):
    """The hook has answered, but not in a form that is known here."""


@dataclass(frozen=True)
class ModerationQuestion:
    """Texts to be judged together: all messages of a prompt, or the next piece of an answer.

    `kinds` has one word for each text: the role of a message ("prompt" for a bare prompt), and "content", "reasoning"
    or "tool_call". `previous` is the end of what the answer has sent so far. `is_last` says that the text ends here.
    """

    stage: JudgedStage
    texts: tuple[str, ...]
    kinds: tuple[str, ...]
    request_id: str
    model: str
    key_id: str | None = None
    previous: str = ""
    is_last: bool = True

    def document(self) -> dict[str, Any]:
        """The JSON body: that of OpenAI's moderation API, with more fields."""
        return {
            "model": self.model,
            "input": list(self.texts),
            "stage": self.stage,
            "kinds": list(self.kinds),
            "request_id": self.request_id,
            "key_id": self.key_id,
            "previous": self.previous,
            "is_last": self.is_last,
        }


@dataclass(frozen=True)
class TextJudgement:
    """`texts` replace those that were asked about where they are redacted. `needs_review`: people should look at it,
    whatever becomes of it. `categories` are the hook's words for the reasons."""

    action: Action
    texts: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    needs_review: bool = False

    @classmethod
    def of_reply(cls, reply: Any, question: ModerationQuestion) -> TextJudgement:
        """From the name of an action, or from an object with `action`, `texts`, `categories` and `review`, or from one
        of OpenAI's form, where a flagged result blocks. Raises BadReply."""
        if isinstance(reply, str):
            reply = {"action": reply}
        if not isinstance(reply, Mapping):
            raise BadReply("neither the name of an action nor an object")
        results = reply.get("results")
        action = reply.get("action")
        if action is None and isinstance(results, Sequence) and results:
            is_flagged = any(isinstance(each, Mapping) and each.get("flagged") is True for each in results)
            action = "block" if is_flagged else "allow"
        if action not in ACTIONS:
            raise BadReply(f"no action; it must be {', '.join(ACTIONS)}")
        texts = _texts(reply.get("texts"), question) if action == "redact" else ()
        needs_review = action == "flag" or reply.get("review") is True
        return cls(action, texts, _categories(reply.get("categories"), results), needs_review)


def _texts(given: Any, question: ModerationQuestion) -> tuple[str, ...]:
    """One for each text of the question; null keeps it."""
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(question.texts):
        raise BadReply("redact needs texts: one for each text of the question")
    if not all(each is None or isinstance(each, str) for each in given):
        raise BadReply("redact needs texts: strings or null")
    return tuple(old if new is None else new for old, new in zip(question.texts, given, strict=True))


def _categories(given: Any, results: Any) -> tuple[str, ...]:
    """Names that are short and plain: they stand in the audit log, which holds no content."""
    names: list[Any] = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    for each in results if isinstance(results, Sequence) else ():
        found = each.get("categories") if isinstance(each, Mapping) else None
        names += [name for name, is_so in found.items() if is_so is True] if isinstance(found, Mapping) else []
    plain = [name for name in names if isinstance(name, str) and _CATEGORY.fullmatch(name)]
    return tuple(dict.fromkeys(plain))[:_MAX_CATEGORIES]
