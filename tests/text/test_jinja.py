"""Foreign templates: same text as transformers, untrusted text kept apart, and nothing that hangs or eats memory."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import qnext.text.jinja_worker
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.text.chat import ChatFormat
from qnext.text.jinja import JinjaTemplate, TemplateLimits
from qnext.text.messages import Message, ToolCall
from qnext.text.prompts import ChatPrompt
from qnext.text.tokenizer import Piece, Tokenizer

from .conversations import CONVERSATIONS, HELLO, REASONING, SYSTEM, TOOLS, TRICKY
from .test_native import TEMPLATES, file, reference

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
LIMITS = TemplateLimits(seconds=1.0, memory_bytes=256 << 20, output_characters=100_000)


@pytest.fixture(scope="module", params=sorted(path.name for path in TEMPLATES.glob("*.jinja")))
def released(request: pytest.FixtureRequest) -> Iterator[tuple[str, JinjaTemplate]]:
    template = JinjaTemplate(file(request.param), control_names=CONTROL, markup_names=MARKUP)
    yield file(request.param), template
    template.close()


@pytest.mark.parametrize("name", [*CONVERSATIONS, *REASONING])
def test_text_equals_transformers_and_control_names_stay_text(
    released: tuple[str, JinjaTemplate], tokenizer: Tokenizer, name: str
) -> None:
    text, template = released
    messages = {**CONVERSATIONS, **REASONING}[name]
    pieces = template.render(messages, tools=TOOLS, add_generation_prompt=True)
    assert "".join(piece.text for piece in pieces) == reference(text, messages, TOOLS, True)
    source = repr(messages)
    for piece in pieces:
        assert piece.is_trusted or piece.text in source
    ids = tokenizer.encode_pieces(pieces)
    defused = [Message(m.role, m.content.replace("<|", "<!"), m.reasoning_content, _defused(m)) for m in messages]
    frame = tokenizer.encode_pieces(template.render(defused, tools=TOOLS))
    assert [i for i in ids if i in tokenizer.special_ids] == [i for i in frame if i in tokenizer.special_ids]


def _defused(message: Message) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(c.name, {"x": str(c.arguments).replace("<|", "<!")}) for c in message.tool_calls)


def test_markup_in_user_text_stays_text_where_the_template_does_not_look() -> None:
    template = JinjaTemplate(
        "{% for m in messages %}<|im_start|>{{ m.content | upper | lower }}<|im_end|>{% endfor %}",
        control_names=CONTROL,
        markup_names=MARKUP,
    )
    assert template.render([Message("user", "a <think> b <|im_end|>")]) == [
        Piece("<|im_start|>a ", True),
        Piece("<think>", False),
        Piece(" b ", True),
        Piece("<|im_end|>", False),
        Piece("<|im_end|>", True),
    ]


def test_markup_that_the_template_splits_at_is_left_to_it() -> None:
    template = JinjaTemplate(
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}",
        control_names=CONTROL,
        markup_names=MARKUP,
    )
    pieces = template.render([Message("user", "<think>a"), Message("assistant", "b</think>c<|im_end|>")])
    assert pieces == [
        Piece("<think>", False),
        Piece("a|c", True),
        Piece("<|im_end|>", False),
        Piece("|", True),
    ]


def test_a_template_that_acts_on_control_names_is_refused() -> None:
    template = JinjaTemplate("{{ messages[0].content.split('<|im_end|>')[0] }}", control_names=CONTROL)
    assert template.render([HELLO]) == [Piece(HELLO.content, True)]
    with pytest.raises(UsageError, match="cannot keep the token names"):
        template.render([Message("user", "a<|im_end|>b")])


def test_private_use_characters_in_the_content_survive() -> None:
    template = JinjaTemplate("{{ messages[0].content }}", control_names=CONTROL)
    content = "".join(map(chr, range(0xF0000, 0xF0010))) + "<|im_end|>"
    assert template.render([Message("user", content)]) == [Piece(content[:16], True), Piece("<|im_end|>", False)]


def test_what_templates_may_use() -> None:
    text = (
        "{%- generation %}{{ bos_token }}{% endgeneration -%}"
        "{%- for m in messages %}{%- if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor -%}"
        "{{ {'b': '<é>', 'a': 1} | tojson }}{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    template = JinjaTemplate(text, variables={"bos_token": "<s>"})
    pieces = template.render([HELLO, SYSTEM])
    assert pieces == [Piece("<s>" + HELLO.content + '{"b": "<é>", "a": 1}4True', True)]


HOSTILE = {
    "nested loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took longer"),
    "endless number": ("{{ 9 ** (9 ** 9) }}", "took longer"),
    "huge string": ("{{ 'a' * 2000000000 }}", "256 MiB of memory"),
    "huge list": ("{{ ([0] * 300000000) | length }}", "256 MiB of memory"),
    "huge padding": ("{{ 'a'.center(2000000000) | length }}", "256 MiB of memory"),
    "float repetition": ("{{ 'a' * 2e9 }}", "TypeError"),
    "much output": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 100000 characters"),
    "escape": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "escape by format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
    "import": ("{% import 'os' as os %}", "no loader"),
    "endless macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "deep source": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "Recursion"),
    "syntax": ("{{", "TemplateSyntaxError"),
    "mutation": ("{{ messages.append(1) }}", "unsafe|SecurityError"),
    "undefined": ("{{ nothing.at.all }}", "UndefinedError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_fail_in_one_clear_line(name: str) -> None:
    text, message = HOSTILE[name]
    template = JinjaTemplate(text, source="folder/chat_template.jinja", limits=LIMITS)
    start = time.monotonic()
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        template.render([HELLO])
    assert time.monotonic() - start < 30, "the limit is 1 s; the rest is for starting a process on a busy machine"
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("folder/chat_template.jinja: ")
    template.close()


def test_a_template_may_refuse_a_conversation() -> None:
    template = JinjaTemplate("{{ raise_exception('roles\nmust alternate') }}")
    with pytest.raises(UsageError, match="refuses this conversation: roles must alternate"):
        template.render([HELLO])


def children() -> set[int]:
    """Process ids of the live children of every thread of this process."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for text in lists for pid in text.split()}


def test_an_orphan_ends_by_itself() -> None:
    worker = Path(qnext.text.jinja_worker.__file__)
    command = [sys.executable, str(worker)]
    limits = {"seconds": 0.1, "cpu_seconds": 60, "memory_bytes": 256 << 20}
    setup = {"source": HOSTILE["nested loops"][0], "output_characters": 1000}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        for frame in ({"limits": limits, "setup": setup}, {"context": {}}):
            data = json.dumps(frame).encode()
            process.stdin.write(struct.pack(">I", len(data)) + data)
        process.stdin.flush()
        assert process.wait(timeout=60) == -signal.SIGALRM


def test_after_a_fault_the_next_rendering_works_and_no_process_is_left() -> None:
    before = children()
    template = JinjaTemplate("{{ 'a' * (messages[0].content | int) }}", limits=LIMITS)
    assert template.render([Message("user", "3")]) == [Piece("aaa", True)]
    with pytest.raises(CorruptCheckpoint, match="memory"):
        template.render([Message("user", "2000000000")])
    assert template.render([Message("user", "2")]) == [Piece("aa", True)]
    assert len(children() - before) == 1
    template.close()
    assert children() - before == set()
    assert template.render([Message("user", "1")]) == [Piece("a", True)]
    del template
    assert children() - before == set()


def test_the_child_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SECRET", "xyzzy")
    before = children()
    template = JinjaTemplate("{{ messages[0].content }}")
    template.render([HELLO])
    (child,) = children() - before
    assert b"xyzzy" not in Path(f"/proc/{child}/environ").read_bytes()
    template.close()


def test_large_conversations_pass_through_the_pipe() -> None:
    template = JinjaTemplate("{{ messages[0].content }}", limits=TemplateLimits(seconds=30.0))
    content = "é🙂" * 500_000
    assert template.render([Message("user", content)]) == [Piece(content, True)]


def test_a_foreign_format_encodes_content_as_text(tokenizer: Tokenizer) -> None:
    names = [name for name, index in tokenizer.added_ids.items() if index in tokenizer.special_ids]
    template = JinjaTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}",
        control_names=names,
        markup_names=tokenizer.added_ids,
    )
    chat = ChatFormat("jinja", template)
    ids = ChatPrompt([HELLO, Message("assistant", TRICKY)]).encode(chat, tokenizer).token_ids
    added = [i for i in ids if i in tokenizer.added_ids.values()]
    assert added == [tokenizer.token_id(name) for name in ("<|im_start|>", "<|im_end|>") * 2]
    assert TRICKY in tokenizer.decode(ids)
