"""What conversations become, on the surface of chat completions; the others share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from qnext.server.inference.generation import Generation, Update
from qnext.server.surfaces.dialogue import in_order_of_calls
from qnext.text.messages import Message, ToolCall
from tests.server.scripts import recorded_prompts, scripted
from tests.server.serving import Running

HELLO = {"role": "user", "content": "Say something."}
CALLS = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]


def ask(running: Running, **more: Any) -> Any:
    with running.client() as client:
        return client.post("/v1/chat/completions", json={"max_tokens": 2, **more}, timeout=60.0)


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
def test_what_is_continued_stands_in_the_assistants_turn(server: Running, more: dict[str, Any]) -> None:
    messages = [HELLO, {"role": "assistant", "content": "Well, "}]
    with recorded_prompts(server) as prompts:
        assert ask(server, messages=messages, continue_final_message=True, **more).status_code == 200
    assert prompts[0].endswith("Say something.<|im_end|>\n<|im_start|>assistant\nWell, ")


def test_a_turn_with_calls_is_not_continued(server: Running) -> None:
    messages = [HELLO, {"role": "assistant", "content": "Well, ", "tool_calls": CALLS}]
    answer = ask(server, messages=messages, continue_final_message=True)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"


def test_results_stand_in_the_order_of_their_calls(server: Running) -> None:
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("b", "a")]
    messages = [HELLO, {"role": "assistant", "content": None, "tool_calls": CALLS}, *results]
    with recorded_prompts(server) as prompts:
        assert ask(server, messages=messages).status_code == 200
    assert prompts[0].index("of a") < prompts[0].index("of b")


def test_results_whose_calls_are_not_known_stay_as_they_are() -> None:
    turn = Message("assistant", "", tool_calls=(ToolCall("f", {}, "x"), ToolCall("g", {}, "y")))
    unknown = [Message("tool", "1", tool_call_id="y"), Message("tool", "2", tool_call_id="z")]
    nameless = [Message("tool", "1"), Message("tool", "2", tool_call_id="x")]
    for results in (unknown, nameless):
        messages = [Message("user", "?"), turn, *results, Message("user", "!")]
        assert in_order_of_calls(messages) == messages


ONE = Message("assistant", "", tool_calls=(ToolCall("f", {}, "x"),))
BOTH = Message("assistant", "", tool_calls=(ToolCall("f", {}, "x"), ToolCall("g", {}, "y")))
X, Y = Message("tool", "1", tool_call_id="x"), Message("tool", "2", tool_call_id="y")
USER, RULE = Message("user", "?"), Message("system", "!")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ([USER, ONE, RULE, X], [USER, ONE, X, RULE]),
        ([USER, BOTH, Y, USER, X], [USER, BOTH, X, Y, USER]),
        ([USER, BOTH, Y, RULE, X, USER], [USER, BOTH, X, Y, RULE, USER]),
        ([USER, ONE, X, USER, ONE, X], [USER, ONE, X, USER, ONE, X]),
        ([USER, ONE, USER, BOTH, X, Y], [USER, ONE, USER, BOTH, X, Y]),
        ([USER, ONE, RULE, Message("tool", "3")], [USER, ONE, Message("tool", "3"), RULE]),
    ],
)
def test_results_stand_right_behind_their_calls(sent: list[Message], read: list[Message]) -> None:
    assert in_order_of_calls(sent) == read


@pytest.mark.parametrize("before", [[], [USER], [RULE], [ONE, USER], [Message("assistant", "Hm.")]], ids=str)
def test_a_result_whose_call_is_gone_is_text_of_the_user(before: list[Message]) -> None:
    *rest, last = in_order_of_calls([*before, Y])
    assert rest == before and last.role == "user" and last.content.endswith("\n2")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_though_its_last_tokens_come_together(
    server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    deliver = Generation.deliver
    held: list[Update] = []

    def deliver_at_once(self: Generation, updates: Sequence[Update], failure: Any = None) -> None:
        held.extend(updates)
        if failure is not None or any(update.finish_reason is not None for update in updates):
            deliver(self, list(held), failure)
            held.clear()

    monkeypatch.setattr(Generation, "deliver", deliver_at_once)
    with scripted(server, "one STOP two"):
        answer = ask(server, messages=[HELLO], max_tokens=99, stop=["STOP"], stream=stream)
    assert answer.status_code == 200 and "STOP" not in answer.text
