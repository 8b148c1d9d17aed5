"""The text of an answer, in whatever pieces it comes, to content, reasoning and tool calls.

What comes out is a function of the whole text: every cutting of it gives the same events, but for where neighbouring
texts of a kind are cut. All work is linear in the text, and only a call that is not yet complete is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qnext.text.output.events import Content, OutputEvent, Reasoning, joined
from qnext.text.output.json_calls import JsonCallReader
from qnext.text.output.scan import TOOL_CALL, TOOL_CALL_END, WHITE_SPACE, open_tag, skip_space, tag_at
from qnext.text.output.values import ArgumentTypes
from qnext.text.output.xml_calls import FUNCTION, XmlCallReader

ToolStyle = Literal["json", "xml"]

THINK, THINK_END = "<think>", "</think>"
MAX_CALL_LENGTH = 1 << 20  # characters; a longer call is content
SHORT = 64  # characters of a call: fewer are not worth reading where no tag can end in them
MAX_SPACE_LENGTH = 1024  # characters of white space that are held back until what follows is known

_TAGS: dict[ToolStyle, tuple[str, ...]] = {
    "json": (TOOL_CALL,),
    "xml": (TOOL_CALL, FUNCTION, TOOL_CALL_END),
}
_PATTERNS = {style: re.compile("|".join(tags)) for style, tags in _TAGS.items()}


class OutputParser:
    """Reads one answer.

    `tool_style` None means that no tools were offered, and tags of calls stay content. `starts_in_reasoning` is for
    prompts that end in `<think>`; else `reads_reasoning` lets the answer open a thought itself, at its beginning. A
    call that is malformed, cut off or too long comes out as content, as it is.

    >>> parser = OutputParser(tool_style="json", tools=tools)
    >>> parser.push('Wait.\\n<tool_call>\\n{"name": "time", "argum'), parser.push('ents": {}}\\n</tool_call>')
    ([Content(text='Wait.')], [Call(name='time', arguments='{}')])
    """

    def __init__(
        self,
        *,
        tool_style: ToolStyle | None,
        tools: Sequence[Mapping[str, Any]] = (),
        starts_in_reasoning: bool = False,
        reads_reasoning: bool = True,
    ) -> None:
        self._style = tool_style
        self._types = ArgumentTypes(tools)
        self._tags = _TAGS[tool_style] if tool_style is not None else ()
        self._tag_pattern = _PATTERNS[tool_style] if tool_style is not None else None
        self._step = self._read_content
        if starts_in_reasoning:
            self._step = self._read_reasoning
        elif reads_reasoning:
            self._step = self._read_start
        self._events: list[OutputEvent] = []
        self._rest = ""  # text not read yet: it may begin a tag
        self._space = ""  # white space at the end of the content or newlines at that of the thought, held back
        self._skips_newlines = starts_in_reasoning  # behind a tag of the thought
        self._follows_call = False  # nothing but white space since the last call
        self._follows_bare_call = False  # and it had no <tool_call>, but may have its end
        self._reader: JsonCallReader | XmlCallReader | None = None
        self._held: list[str] = []  # the text of the call that is being read
        self._num_held = 0
        self._num_calls = 0

    @property
    def num_calls(self) -> int:
        """How many calls have come out so far."""
        return self._num_calls

    def push(self, text: str) -> list[OutputEvent]:
        """What is certain now that `text` has come too."""
        text = self._rest + text
        if self._reader is not None and len(text) < SHORT and ">" not in text:
            self._rest = text
            return []
        start = 0
        while start < len(text):
            step = self._step
            place = step(text, start)
            if place == start and self._step == step:
                break
            start = place
        self._rest = text[start:]
        return self._take()

    def finish(self) -> list[OutputEvent]:
        """What was held back, when the answer ends, however it ends."""
        rest, self._rest = self._rest, ""
        if self._step == self._read_reasoning:
            self._emit_text(Reasoning, self._space + rest)
        else:
            self._add_text(Content, "".join(self._held) + rest)
            if not self._follows_call:
                self._emit_text(Content, self._space)
        self._held, self._num_held, self._space = [], 0, ""
        return self._take()

    def _read_start(self, text: str, start: int) -> int:
        """White space and `<think>`, or an answer without a thought."""
        place = skip_space(text, start, len(text))
        tag = tag_at(text, place, len(text), (THINK,)) if place - start <= MAX_SPACE_LENGTH else ""
        if tag is None:
            return start
        if not tag:
            self._step = self._read_content
            return start
        self._step = self._read_reasoning
        self._skips_newlines = True
        return place + len(tag)

    def _read_reasoning(self, text: str, start: int) -> int:
        start = self._behind_newlines(text, start)
        place = text.find(THINK_END, start)
        end = place if place >= 0 else open_tag(text, start, len(text), (THINK_END,))
        self._add_text(Reasoning, text[start:end])
        if place < 0:
            return end
        self._space = ""
        self._skips_newlines = True
        self._step = self._read_content
        return end + len(THINK_END)

    def _read_content(self, text: str, start: int) -> int:
        start = self._behind_newlines(text, start)
        if self._tag_pattern is None:
            self._emit_text(Content, text[start:])
            return len(text)
        found = self._tag_pattern.search(text, start)
        end = found.start() if found else open_tag(text, start, len(text), self._tags)
        self._add_text(Content, text[start:end])
        if not found:
            return end
        tag = found.group()
        if tag != TOOL_CALL_END:
            self._open_call(tag)
        elif self._follows_bare_call:
            self._space = ""
            self._follows_bare_call = False
        else:
            self._add_text(Content, tag)
        return found.end()

    def _open_call(self, tag: str) -> None:
        self._reader = XmlCallReader(self._types, opened_by=tag) if self._style == "xml" else JsonCallReader()
        self._held = [tag]
        self._num_held = len(tag)
        self._step = self._read_call

    def _read_call(self, text: str, start: int) -> int:
        reader = self._reader
        assert reader is not None
        end = min(len(text), start + MAX_CALL_LENGTH - self._num_held)
        place = reader.feed(text, start, end)
        self._held.append(text[start:place])
        self._num_held += place - start
        is_too_long = self._num_held + end - place == MAX_CALL_LENGTH
        if not (reader.is_done or reader.has_failed or is_too_long):
            return place
        whole = "".join(self._held)
        call = reader.call(whole) if reader.is_done else None
        self._reader, self._held, self._num_held = None, [], 0
        self._step = self._read_content
        if call is None:
            self._add_text(Content, whole)
        else:
            self._events.append(call)
            self._num_calls += 1
            self._space = ""
            self._follows_call = True
            self._follows_bare_call = reader.is_bare
        return place

    def _behind_newlines(self, text: str, start: int) -> int:
        """Where to read on: behind the newlines that follow a tag of the thought."""
        while self._skips_newlines and start < len(text):
            self._skips_newlines = text[start] == "\n"
            start += self._skips_newlines
        return start

    def _add_text(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        """White space at the end is held back: it is dropped where a call or the end of the thought follows."""
        solid = text.rstrip(WHITE_SPACE if kind is Content else "\n")
        if solid:
            self._emit_text(kind, self._space + solid)
            self._space = ""
        self._space += text[len(solid) :]
        if len(self._space) > MAX_SPACE_LENGTH:
            num_kept = (len(self._space) - 1) % MAX_SPACE_LENGTH + 1
            self._emit_text(kind, self._space[:-num_kept])
            self._space = self._space[-num_kept:]

    def _emit_text(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        if text:
            self._events.append(kind(text))
            self._follows_call = self._follows_bare_call = False

    def _take(self) -> list[OutputEvent]:
        events, self._events = self._events, []
        return joined(events)
