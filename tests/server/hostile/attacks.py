"""Requests that cost much, and a process of a server whose pauses are measured while they come."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from tests.forked import Program
from tests.server.hostile.monitored import KEYS
from tests.server.process import ROOT

CONTEXT = 262_144
_MOST = 8 << 20  # bytes of a body


class Attack(NamedTuple):
    """A body, made when it is needed, that `times` clients send at once."""

    path: str
    body: Callable[[], bytes]
    times: int = 4
    in_short: bool = False


def _of(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(fields).encode()


def _text(unit: str, length: int = 2_000_000) -> Callable[[], bytes]:
    return lambda: json.dumps({"prompt": unit * (length // len(unit))}, ensure_ascii=False).encode()


def _numbers(field: str, count: int) -> Callable[[], bytes]:
    return lambda: b'{"%s":[%s]}' % (field.encode(), b",".join(b"%d" % (i % 250) for i in range(count)))


def _repeated(head: bytes, one: bytes, tail: bytes, count: int) -> Callable[[], bytes]:
    return lambda: head + b",".join([one] * count) + tail


def _members(whole: bytes, one: bytes) -> Callable[[], bytes]:
    return lambda: whole % b",".join(one % number for number in range(64_000))


def _turns(one: bytes, count: int, more: bytes = b"") -> Callable[[], bytes]:
    return _repeated(b'{"model":"claude-3",' + more + b'"max_tokens":1,"messages":[', one, b"]}", count)


_SAID = b'{"role":"user","content":"%s"}'
_PARTS = b'{"role":"user","content":[' + b",".join([b'{"type":"text","text":"a"}'] * 1_000) + b"]}"
_TOOL = b'{"type":"function","function":{"name":"t","parameters":{"type":"object","properties":{%s}}}}' % b",".join(
    b'"p%d":{"type":"string"}' % i for i in range(700)
)
_TOOLS = b'"tools":[' + b",".join([_TOOL] * 128) + b"],"
_UNKNOWN = b'{"prompt":"a","max_tokens":1,"x":['
_CODE = "def f(x):\n    return x ** 2  # caf\u00e9\n"

ATTACKS: dict[str, Attack] = {
    # texts
    "2 MB of code to tokenize": Attack("/tokenize", _text(_CODE), 24, True),
    "2 MB of one letter": Attack("/tokenize", _text("a"), 4, True),
    "2 MB of spaces": Attack("/tokenize", _text(" ")),
    "2 MB of digits": Attack("/tokenize", _text("1")),
    "2 MB of marks to combine": Attack("/tokenize", _text("\u0301\u0323", 600_000)),
    "100k marks on a letter": Attack("/tokenize", lambda: json.dumps({"prompt": "a" + "\u0301" * 100_000}).encode()),
    "joiners": Attack("/tokenize", _text("\U0001f469\u200d", 600_000)),
    "parts of syllables": Attack("/tokenize", _text("\u1100\u1161\u11a8", 600_000)),
    "names of tokens": Attack("/tokenize", _text("<|im_start|>")),
    "names of tokens with letters between": Attack("/tokenize", _text("a<|im_end|>")),
    "beginnings of names": Attack("/tokenize", _text("<|")),
    "texts of tokens": Attack("/tokenize", _of(prompt=_CODE * 50_000, return_token_strs=True)),
    "2 MB to count": Attack("/v1/messages/count_tokens", lambda: _turns(_SAID % (b"word " * 400_000), 1)(), 24, True),
    "4,096 turns to count": Attack("/v1/messages/count_tokens", _turns(_SAID % (b"a" * 1_900), 4_096), 4, True),
    "8 MB of text": Attack("/v1/completions", _text("a", _MOST - 100), 8),
    "8 MB of marks of JSON": Attack("/v1/completions", _text("[{:,", _MOST - 100), 4, True),
    "8 MB of quotes": Attack("/v1/completions", lambda: b'{"prompt":"' + b'\\"' * (_MOST // 2 - 50) + b'"}'),
    # JSON
    "1M ids to detokenize": Attack("/detokenize", _numbers("tokens", 1_000_000), 8, True),
    "290k ids to detokenize": Attack("/detokenize", _numbers("tokens", 290_000), 8, True),
    "1M ids as prompt": Attack("/v1/completions", _numbers("prompt", 1_000_000)),
    "290k ids as prompt": Attack("/v1/completions", _numbers("prompt", 290_000)),
    "99k parts": Attack("/v1/chat/completions", _turns(_PARTS, 99)),
    "30k parts": Attack("/v1/messages/count_tokens", _turns(_PARTS, 30), 4, True),
    "99k turns": Attack("/v1/chat/completions", _turns(_SAID % b"a", 99_000)),
    "4,096 turns": Attack("/v1/chat/completions", _turns(_SAID % (b"a" * 1_900), 4_096)),
    "64k members": Attack("/v1/completions", _members(b'{"prompt":"a","max_tokens":1,%s}', b'"k%d":1'), 4, True),
    "99k lists": Attack("/v1/completions", _repeated(_UNKNOWN, b"[1]", b"]}", 99_000), 4, True),
    "deep lists": Attack("/v1/completions", _repeated(_UNKNOWN, b"[" * 60 + b"]" * 60, b"]}", 1_600)),
    "290k numbers": Attack("/v1/completions", _repeated(_UNKNOWN, b"1.5", b"]}", 290_000)),
    "128 large tools": Attack("/v1/chat/completions", _turns(_SAID % b"a", 1, _TOOLS)),
    "bias of 64k": Attack("/v1/completions", _members(b'{"prompt":"a","logit_bias":{%s}}', b'"%d":1')),
    "faulty JSON of 8 MB": Attack("/v1/completions", lambda: b'{"prompt":[' + b'"aaaaaaaaaaaaaa",' * 480_000),
    "2 MB of instructions": Attack(
        "/v1/responses", _of(input="a", instructions="a " * 900_000, stream=True, max_output_tokens=1)
    ),
    # answers
    "log-probabilities of a prompt": Attack(
        "/v1/completions", _of(prompt="word " * 6_500, max_tokens=1, prompt_logprobs=20), 1
    ),
    "log-probabilities of a conversation": Attack(
        "/v1/chat/completions",
        _of(messages=[{"role": "user", "content": "word " * 6_400}], max_tokens=1, prompt_logprobs=20),
        1,
    ),
    "echo with log-probabilities": Attack(
        "/v1/completions", _of(prompt="word " * 6_500, max_tokens=1, echo=True, logprobs=20, n=4), 1
    ),
    "streamed echo with log-probabilities": Attack(
        "/v1/completions", _of(prompt="word " * 6_500, max_tokens=1, echo=True, logprobs=20, n=4, stream=True), 1
    ),
    "a long echo": Attack(
        "/v1/completions", _of(prompt="word " * 9_000, max_tokens=1, echo=True, n=8, return_token_ids=True), 2
    ),
}


@dataclass
class Monitored:
    """A running server process."""

    url: str
    popen: Program

    def read(self) -> dict[str, Any]:
        """The longest pause since the last call, in seconds, and what was seen then; memory in bytes."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        return dict(json.loads(self.popen.stdout.readline()))

    def send(self, attack: Attack) -> list[int]:
        """The statuses of an attack's answers."""
        body = attack.body()
        statuses: list[int] = []

        def one() -> None:
            headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
            with httpx2.Client(base_url=self.url, headers=headers, timeout=300.0) as client:
                with client.stream("POST", attack.path, content=body) as answer:
                    for _ in answer.iter_raw():
                        pass
                statuses.append(answer.status_code)

        threads = [threading.Thread(target=one) for _ in range(attack.times)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(statuses) == attack.times, "an answer broke off"
        return statuses


@contextmanager
def monitored(folder: Path) -> Iterator[Monitored]:
    words = ["-m", "tests.server.hostile.monitored", folder]
    popen = Program(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert popen.stdout is not None
        yield Monitored(json.loads(popen.stdout.readline())["url"], popen)
    finally:
        popen.kill()
        popen.wait()
