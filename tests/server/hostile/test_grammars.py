"""Constraints that are bombs: each is refused within its limits, and nobody else notices.

What compiles them are child processes of the server's, which the tests count, kill and measure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qnext.engine.sampling.constraint import GrammarLimits
from qnext.engine.sampling.grammar import GrammarCompiler
from qnext.server.access.keys import KeyRing
from qnext.server.inference.served import GRAMMAR_PROGRAM
from qnext.server.limits import Limits
from tests.pace import in_time, load_factor
from tests.server.hostile import wire
from tests.server.hostile.harness import Prober
from tests.server.serving import Running, running_server

SIMPLE = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
GROWTH = 200 << 20
_SETS = [f"/([ab]{{{count}}})*/" for count in (7, 11, 13, 17, 19, 23, 29, 31)]


def multiples(*steps: int) -> dict[str, Any]:
    """Each step is cheap; together they have as many remainders as their product is large."""
    return {"type": "object", "properties": {"n": {"allOf": [{"type": "integer", "multipleOf": s} for s in steps]}}}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}}


def tool(value: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": value}}], "tool_choice": "required"}


def tool_of_messages(value: Any) -> dict[str, Any]:
    return {"tools": [{"name": "f", "input_schema": value}], "tool_choice": {"type": "any"}}


def doubled(levels: int, line: str) -> str:
    return "".join(line.format(this=level, next=level + 1) for level in range(levels))


LARGE = {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 9_999_991}}}
PRIMES = (97, 89, 83, 79)
STEPS_IN_LARK = f"start: %json {json.dumps(multiples(*PRIMES))}"
INTERSECTIONS = "start: X\nX: " + " & ".join(_SETS)
TERMINALS = "start: T0\n" + doubled(40, "T{this}: T{next} T{next}\n") + 'T40: "a"'
RULES = "root ::= a0\n" + doubled(30, "a{this} ::= a{next} a{next}\n") + 'a30 ::= "x"\n'
BRANCHES = {"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {}}} for j in range(4)]} for i in range(16)]}
PATTERNS = {"allOf": [{"type": "string", "pattern": f"^.*{i}.*$"} for i in range(100)]}
# One place, written in a thousand ways, each of which is read for itself.
SPELLED = {
    "$defs": {"l": {"anyOf": [{"properties": {f"p{i}": {"type": "string"} for i in range(900)}}]}},
    "anyOf": [{"$ref": f"#/$defs/l/anyOf/{'0' * i}"} for i in range(1, 250)],
}
MULTIPLE, TIME, SIZE = "multipleOf", "processor time", "too (big|large|complex|long)|larger than"
# name -> (route, fields, what the line says)
BOMBS: dict[str, tuple[str, dict[str, Any], str]] = {
    "multipleOf": (CHAT, schema(LARGE), MULTIPLE),
    "multipleOf in a tool": (CHAT, tool(LARGE), MULTIPLE),
    "multipleOf of Responses": (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "s", "schema": LARGE}}},
        MULTIPLE,
    ),
    "multipleOf of Messages": (MESSAGES, {"output_format": {"type": "json_schema", "schema": LARGE}}, MULTIPLE),
    "multipleOf in a tool of Messages": (MESSAGES, tool_of_messages(LARGE), MULTIPLE),
    "multipleOf beside tools": (CHAT, {**tool(LARGE), "tool_choice": "auto", **schema({})}, MULTIPLE),
    "guided_json": (COMPLETIONS, {"guided_json": LARGE}, MULTIPLE),
    "structured_outputs": (COMPLETIONS, {"structured_outputs": {"json": LARGE}}, MULTIPLE),
    "%json in Lark": (COMPLETIONS, {"guided_grammar": f"start: %json {json.dumps(LARGE)}"}, MULTIPLE),
    "steps together": (CHAT, schema(multiples(*PRIMES)), TIME),
    "steps together in a tool": (CHAT, tool(multiples(*PRIMES)), TIME),
    "steps together in Lark": (COMPLETIONS, {"grammar": STEPS_IN_LARK}, TIME),
    "intersections": (COMPLETIONS, {"guided_grammar": INTERSECTIONS}, TIME),
    "all patterns": (CHAT, schema(PATTERNS), f"{TIME}|memory|cannot|Unable"),
    "doubled terminals": (COMPLETIONS, {"guided_grammar": TERMINALS}, f"{SIZE}|{TIME}"),
    "doubled rules of GBNF": (COMPLETIONS, {"grammar": RULES}, f"{SIZE}|{TIME}"),
    "branches of branches": (CHAT, schema(BRANCHES), SIZE),
    "one place in many spellings": (CHAT, schema(SPELLED), f"{SIZE}|{TIME}|memory"),
    "a hundred thousand values": (CHAT, schema({"enum": [f"v{i}" for i in range(100_000)]}), SIZE),
}


def bomb(number: int) -> dict[str, Any]:
    """Bombs of which no two are the same."""
    return schema({**multiples(*PRIMES), "title": f"bomb {number}", "minProperties": 0, "required": [f"n{number}"]})


def fields_of(route: str) -> dict[str, Any]:
    if route == COMPLETIONS:
        return {"prompt": "x", "max_tokens": 4}
    if route == RESPONSES:
        return {"input": "x", "max_output_tokens": 16}
    return {"model": "alias", "messages": [{"role": "user", "content": "x"}], "max_tokens": 16}


@pytest.fixture(scope="module")
def running(chat_model: Path) -> Iterator[Running]:
    """Two keys, and less of everything that constraints may use."""
    keys = KeyRing(plain=[wire.KEY, "other"])
    limits = GrammarLimits(compile_cpu_seconds=0.4, compile_seconds=60.0, max_waiting_per_owner=4, wait_seconds=90.0)
    with running_server(chat_model, limits=Limits(drain_seconds=0.2), keys=keys) as made:
        served = made.server.served
        usual = served.grammars
        served.__dict__["grammars"] = GrammarCompiler(usual.vocabulary, limits, program=GRAMMAR_PROGRAM)
        yield made


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children() -> set[int]:
    """Child processes that compile."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        try:
            is_ours = entry.name.isdigit() and f"PPid:\t{os.getpid()}\n" in (entry / "status").read_text()
            if is_ours and b"grammar_worker" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def prober(running: Running) -> Prober:
    return Prober(("127.0.0.1", int(running.url.rpartition(":")[2])))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_a_line_within_its_limits(running: Running, name: str) -> None:
    route, fields, line = BOMBS[name]
    before = resident_bytes()
    with running.client(wire.KEY) as client:

        def attempt() -> float:
            begin = time.monotonic()
            answer = client.post(route, json={**fields_of(route), **fields})
            seconds = time.monotonic() - begin
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert re.search(line, error["message"]) and "\n" not in error["message"]
            if route != MESSAGES:  # whose errors have no place for it
                assert error["param"].partition(".")[0] in fields, error
            return seconds

        attempt()
        in_time(0.3, attempt)  # it is known
    assert resident_bytes() - before < GROWTH
    assert len(children()) <= running.server.served.grammars.limits.compile_processes


def test_what_one_key_floods_keeps_no_other_key_waiting(running: Running) -> None:
    """Bombs fill the part of one key: the surplus is 429, all others 400. Another key's schemas compile meanwhile."""
    number = running.server.served.grammars.limits.max_waiting_per_owner + 8
    statuses: list[tuple[int, str | None]] = []

    def flood(which: int) -> None:
        with running.client(wire.KEY) as client:
            client.timeout = 120.0
            answer = client.post(CHAT, json={**fields_of(CHAT), **bomb(which)})
            statuses.append((answer.status_code, answer.headers.get("retry-after")))

    before = resident_bytes()
    threads = [threading.Thread(target=flood, args=(which,)) for which in range(number)]
    probing = prober(running)
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 20.0
        while not any(status == 429 for status, _ in statuses) and time.monotonic() < deadline:
            time.sleep(0.01)
        worst = []
        with running.client("other") as other:
            for turn in range(5):
                probing.mark()
                named = {**SIMPLE, "title": f"schema {turn}", "maxProperties": 3 + turn}
                answer = other.post(CHAT, json={**fields_of(CHAT), **schema(named)})
                assert answer.status_code == 200, answer.text
                worst.append(probing.worst())
        assert any(thread.is_alive() for thread in threads), "the others came before the last bomb"
    finally:
        for thread in threads:
            thread.join()
        probing.stop()
    assert min(worst) < 0.25 * load_factor()
    surplus = [retry for status, retry in statuses if status == 429]
    assert len(surplus) >= 4 and all(retry is not None and int(retry) >= 1 for retry in surplus)
    assert {status for status, _ in statuses} <= {400, 429, 503}
    assert resident_bytes() - before < GROWTH


def test_a_killed_child_is_replaced(running: Running) -> None:
    """In the middle of its work, and while it waits for some."""
    with running.client(wire.KEY) as client:
        answers: list[int] = []

        def ask() -> None:
            answers.append(client.post(CHAT, json={**fields_of(CHAT), **bomb(1_000)}).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        processes = running.server.served.grammars._processes
        deadline = time.monotonic() + 20.0
        while not processes._busy and time.monotonic() < deadline:
            time.sleep(0.005)
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        thread.join()
        assert answers == [400]  # it was asked again, and is as expensive as before
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        answer = client.post(CHAT, json={**fields_of(CHAT), **schema({**SIMPLE, "title": "after"})})
        assert answer.status_code == 200


def test_no_process_outlives_its_server(chat_model: Path) -> None:
    """Not even one that compiles when the server is told to stop."""
    before = children()
    with running_server(chat_model, limits=Limits(drain_seconds=0.1)) as running, running.client() as client:
        answer = client.post(CHAT, json={**fields_of(CHAT), **schema(SIMPLE)})
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"].startswith("{")
        assert children() > before

        def ask() -> None:
            with contextlib.suppress(httpx2.HTTPError):
                client.post(CHAT, json={**fields_of(CHAT), **bomb(2_000)})

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.1)
    deadline = time.monotonic() + 30.0
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children() - before
    thread.join(10.0)
