"""Routing without Ray: beginnings of requests, who holds them, and whom a request goes to."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qnext.replicas.prefixes import MAX_CHUNKS, PrefixIndex, chain_of, ranked


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **more}


def common(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_next_turn_begins_with_all_of_the_one_before() -> None:
    first, second = chat("x" * 700), chat("x" * 700, "an answer", "and now?")
    one, two = chain_of("", first), chain_of("", second)
    assert len(one) == 3 and len(two) == 5  # 700 bytes and the role: three chunks; then one for each short message
    assert two[: len(one)] == one


@pytest.mark.parametrize(
    "other",
    [
        chat("hello", cache_salt="mine"),
        chat("hello", model="adapter"),
        chat("Hello"),
        chat("hello", tools=[{"type": "function"}]),
        {"prompt": "hello"},
        {"messages": [{"role": "system", "content": "hello"}]},
    ],
)
def test_another_beginning_has_nothing_in_common(other: dict[str, Any]) -> None:
    assert common(chain_of("", chat("hello")), chain_of("", other)) == 0


def test_owners_have_nothing_in_common() -> None:
    assert common(chain_of("a", chat("hello")), chain_of("b", chat("hello"))) == 0


def test_a_change_in_the_middle_ends_what_is_common() -> None:
    texts = ["one", "two", "three", "four"]
    for place in range(4):
        changed = [*texts[:place], "other", *texts[place + 1 :]]
        assert common(chain_of("", chat(*texts)), chain_of("", chat(*changed))) == place


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Both forms of a text; marks that agents move from message to message; thoughts that no template writes again.
        ({"content": "hi"}, {"content": [{"type": "text", "text": "hi"}]}),
        ({"content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}, {"content": "hi"}),
        ({"content": "hi", "reasoning_content": "hm"}, {"content": "hi"}),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hi"}]}, {"content": "hi"}),
        ({"content": "hi", "tool_calls": None}, {"content": "hi"}),
    ],
)
def test_forms_of_the_same_message_are_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    def chain(message: dict[str, Any]) -> tuple[bytes, ...]:
        return chain_of("", {"messages": [{"role": "assistant", **message}]})

    assert chain(one) == chain(other) != ()


def test_tool_calls_are_part_of_a_message() -> None:
    def chain(arguments: str) -> tuple[bytes, ...]:
        call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
        return chain_of("", {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]})

    assert chain("{}") != chain("[]")


def test_every_form_of_a_prompt_has_a_chain() -> None:
    text, ids = "x" * 1000, list(range(200))
    assert chain_of("", {"prompt": text}) == chain_of("", {"prompt": [text, "other"]})
    assert chain_of("", {"prompt": ids}) == chain_of("", {"prompt": [ids, [1]]}) != ()
    assert (
        common(chain_of("", {"prompt": ids}), chain_of("", {"prompt": [*ids, 7]})) == 6
    )  # 1,600 bytes: 6 whole chunks
    assert chain_of("", {"input": "hello"}) == chain_of("", {"input": [{"role": "user", "content": "hello"}]}) != ()
    assert chain_of("", {"system": "s", **chat("a")}) == chain_of(
        "", {"system": [{"type": "text", "text": "s"}], **chat("a")}
    )


@pytest.mark.parametrize(
    "body",
    [None, 3, [], "text", {}, {"messages": 3}, {"messages": [3, None]}, {"prompt": {"a": 1}}, {"prompt": [1 << 70]}],
)
def test_no_body_is_too_strange(body: Any) -> None:
    assert isinstance(chain_of("", body), tuple)


def test_a_chain_has_a_bound() -> None:
    assert len(chain_of("", {"prompt": "x" * (256 * MAX_CHUNKS + 5)})) == MAX_CHUNKS


def test_a_conversation_goes_back_to_who_holds_it() -> None:
    """Whatever the others are busy with, as long as its replica is not overloaded."""
    draw = random.Random(1)
    index: PrefixIndex[str] = PrefixIndex()
    names = ["a", "b", "c"]
    turns: list[list[str]] = [[f"conversation {number}"] for number in range(40)]
    home: dict[int, str] = {}
    for _ in range(240):
        number = draw.randrange(40)
        chain = chain_of("", chat(*turns[number]))
        best = ranked(index, chain, {name: draw.randrange(9) for name in names}, spread=8)[0]
        assert best == home.setdefault(number, best)
        index.learn(best, chain)
        turns[number] += ["an answer", f"question {draw.random()}"]
    assert set(home.values()) == set(names)


def test_the_longest_beginning_wins_over_load() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.learn("a", chain_of("", chat("one")))
    index.learn("b", chain_of("", chat("one", "two", "three")))
    longer = chain_of("", chat("one", "two", "three", "four"))
    assert ranked(index, longer, {"a": 0, "b": 5, "c": 0}, spread=5) == ["b", "a", "c"]


def test_an_overloaded_replica_is_passed_over() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    chain = chain_of("", chat("one"))
    index.learn("a", chain)
    assert ranked(index, chain, {"a": 8, "b": 0}, spread=8)[0] == "a"
    assert ranked(index, chain, {"a": 9, "b": 0}, spread=8) == ["b", "a"]
    index.learn("b", chain)  # it answers now, so both hold it: the less busy one is better
    assert ranked(index, chain, {"a": 3, "b": 2}, spread=8)[0] == "b"


def test_a_new_conversation_goes_to_the_least_busy() -> None:
    chain = chain_of("", chat("new"))
    assert ranked(PrefixIndex(), chain, {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]


def test_routers_agree_on_new_conversations_and_share_them_out() -> None:
    names = {"a": 0, "b": 0, "c": 0}
    firsts = []
    for number in range(300):
        chain = chain_of("", chat(f"new {number}"))
        order = ranked(PrefixIndex(), chain, names)
        assert order == ranked(PrefixIndex(), chain, dict(reversed(names.items())))
        firsts.append(order[0])
    assert all(60 < firsts.count(name) < 140 for name in names)  # 100 each; 5 standard deviations are 41


def test_memory_is_bounded_and_beginnings_outlive_ends() -> None:
    index: PrefixIndex[str] = PrefixIndex(max_chunks=10)
    old = chain_of("", chat(*(f"{i}" for i in range(8))))
    index.learn("a", old)
    index.learn("a", chain_of("", chat(*(f"new {i}" for i in range(5)))))
    assert index.num_chunks == 10
    assert index.match("a", old) == 5
    index.learn("a", chain_of("", chat(*(f"long {i}" for i in range(30)))))
    assert index.num_chunks == 10 and index.match("a", old) == 0


def test_replicas_that_ended_are_forgotten() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    chain = chain_of("", chat("one"))
    for name in "abc":
        index.learn(name, chain)
    index.forget("a")
    index.forget("a")
    index.keep(["b"])
    assert [index.match(name, chain) for name in "abc"] == [0, 1, 0]
    assert index.num_chunks == 1
