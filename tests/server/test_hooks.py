"""Hooks of moderation by their names, and what they may reply."""

from __future__ import annotations

from typing import Any

import pytest

from qnext.errors import UsageError
from qnext.server.moderation.hooks import CallableHook, HttpHook, hook_of
from qnext.server.moderation.judgement import BadReply, ModerationQuestion, TextJudgement

NO_HOOK = 1


def question(*texts: str) -> ModerationQuestion:
    return ModerationQuestion("prompt", texts, ("user",) * len(texts), "id", "m")


@pytest.mark.parametrize(
    "reply", [None, 1, [], {}, "no", {"action": "redact"}, {"action": "redact", "texts": ["a"]}, {"results": []}]
)
def test_replies_that_are_none(reply: Any) -> None:
    with pytest.raises(BadReply):
        TextJudgement.of_reply(reply, question("a", "b"))


def test_replies() -> None:
    assert TextJudgement.of_reply("flag", question("a")).needs_review
    assert TextJudgement.of_reply({"action": "redact", "texts": [None, "x"]}, question("a", "b")).texts == ("a", "x")
    many = TextJudgement.of_reply({"action": "allow", "categories": [f"c{i}" for i in range(99)]}, question("a"))
    assert len(many.categories) == 16


def judge(question: ModerationQuestion) -> str:
    return "allow"


def test_names_of_hooks() -> None:
    assert isinstance(hook_of("https://a.example/v1/moderations", api_key="k"), HttpHook)
    assert isinstance(hook_of("tests.server.test_hooks:judge"), CallableHook)
    wrong: list[tuple[str, str | None, str]] = [
        ("judge", None, "URL or module:function"),
        ("tests.server.nothing:judge", None, "nothing"),
        ("tests.server.test_hooks:nothing", None, "nothing"),
        ("tests.server.test_hooks:NO_HOOK", None, "no function"),
        ("tests.server.test_hooks:judge", "k", "for a URL"),
    ]
    for name, key, message in wrong:
        with pytest.raises(UsageError, match=message):
            hook_of(name, api_key=key)
