"""The text of an answer, in whatever pieces it comes, to content, reasoning and tool calls.

Every cutting of a text gives the same events, but for where neighbouring texts of a kind are cut. Work is linear, and
only what is not yet certain is kept. Calls are read liberally where their meaning is certain (`xml_calls`,
`json_calls`), and come out strict, piece by piece once it is certain that each is one. A call that then breaks off ends
in a CallCut. What never became certain, and a mention between backticks, is content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qnext.text.output.calls import CallReader, ThoughtCalls
from qnext.text.output.events import CallCut, CallEnd, Content, OutputEvent, Reasoning, merged
from qnext.text.output.scan import CALL_KINDS, MAX_TAG_LENGTH, WHITE_SPACE, Tag, TagKind, skip_space, tag_at
from qnext.text.output.values import ToolTable

ToolStyle = Literal["json", "xml"]

MAX_SPACE_LENGTH = 1024  # characters of white space that are held back until what follows is known
MAX_TRIALS = 16  # times that text is read again because a call in it was none


class OutputParser:
    """Reads one answer. With `tool_style` None no tools were offered, and tags of calls stay content.

    `starts_in_reasoning` is for prompts that end in `<think>`; else `reads_reasoning` lets the answer open a thought at
    its beginning. Further thoughts begin right behind a thought or a call, or with `<think>` alone in a line outside of
    code. A call inside a thought that is not closed, or closed with nothing behind it, ends the thought and is made.
    `push` takes text in any pieces and gives events; `finish` gives the rest.
    """

    def __init__(
        self,
        *,
        tool_style: ToolStyle | None,
        tools: Sequence[Mapping[str, Any]] = (),
        starts_in_reasoning: bool = False,
        reads_reasoning: bool = True,
    ) -> None:
        self._tools = ToolTable(tools)
        self._reads_calls = tool_style is not None
        self._kinds: tuple[TagKind, ...] = CALL_KINDS if tool_style is not None else ()
        self._kinds += ("think",) if starts_in_reasoning or reads_reasoning else ()
        self._step = self._read_content
        if starts_in_reasoning:
            self._step = self._read_reasoning
        elif reads_reasoning:
            self._step = self._read_start
        self._events: list[OutputEvent] = []
        self._rest = ""  # text not read yet: it may begin a tag
        self._again = ""  # text that is to be read again, before what follows
        self._space = ""  # white space at the end of the content or newlines at that of the thought, held back
        self._skips_newlines = starts_in_reasoning  # behind a tag of the thought
        self._is_thought_empty = starts_in_reasoning  # so far
        self._follows_call = False  # nothing but white space since the last call
        self._follows_thought = False
        self._is_line_blank = True  # so far
        self._is_mention = False  # the last tag stood behind a backtick
        self._ticks = _Backticks()
        self._call: CallReader | None = None
        self._thought_calls: ThoughtCalls | None = None
        self._num_trials = 0
        self._num_calls = 0
        self._has_cut_call = False

    @property
    def num_calls(self) -> int:
        """How many complete calls there are so far."""
        return self._num_calls

    @property
    def has_cut_call(self) -> bool:
        """Whether a call broke off."""
        return self._has_cut_call

    @property
    def is_in_thought(self) -> bool:
        """Whether the next text is read as a thought, or as the end of one."""
        return self._step in (self._read_reasoning, self._read_thought_calls)

    def push(self, text: str) -> list[OutputEvent]:
        """The events that are certain now that `text` has come too."""
        self._run(self._rest + text)
        return self._take()

    def finish(self, *, has_ended: bool = False) -> list[OutputEvent]:
        """The events that were held back, when the answer is over. `has_ended`: the model ended it, and nothing cut
        it."""
        while self._call is not None or self._thought_calls is not None:
            rest, self._rest = self._rest, ""
            if self._call is not None:
                self._finish_call(self._call, rest, has_ended=has_ended)
            elif self._thought_calls is not None:
                self._finish_thought_calls(self._thought_calls, rest, has_ended=has_ended)
            again, self._again = self._again, ""
            self._run(again)
        if self._step == self._read_reasoning:
            self._emit_text(Reasoning, self._space + self._rest)
        else:
            self._add_text(Content, self._rest)
            if not self._follows_call:
                self._emit_text(Content, self._space)
        self._rest = self._space = ""
        return self._take()

    def _run(self, text: str) -> None:
        start = 0
        while start < len(text) or self._again:
            step = self._step
            place = step(text, start)
            if self._again:
                again, self._again = self._again, ""
                if text.startswith(again, place - len(again)) and len(again) <= place:
                    start = place - len(again)
                else:
                    text, start = again + text[place:], 0
                continue
            if place == start and self._step == step:
                break
            start = place
        self._rest = text[start:]

    # Text

    def _read_start(self, text: str, start: int) -> int:
        """White space and `<think>`, or an answer without a thought."""
        place = skip_space(text, start, len(text))
        if place == len(text) and place - start <= MAX_SPACE_LENGTH:
            return start
        tag = tag_at(text, place, len(text), ("think",)) if text.startswith("<", place) else False
        if tag is None and place - start <= MAX_SPACE_LENGTH:
            return start
        if not tag or tag.closes or place - start > MAX_SPACE_LENGTH:
            self._step = self._read_content
            return start
        return self._open_thought(place + tag.length)

    def _open_thought(self, place: int) -> int:
        self._step = self._read_reasoning
        self._skips_newlines = self._is_thought_empty = True
        self._is_line_blank = True
        self._space = ""
        return place

    def _read_reasoning(self, text: str, start: int) -> int:
        start = self._behind_newlines(text, start)
        place = text.find("<", start)
        end = place if place >= 0 else len(text)
        self._add_text(Reasoning, text[start:end])
        if place < 0:
            return end
        tag = tag_at(text, place, len(text), self._kinds)
        if tag is None:
            return place
        if tag and tag.kind == "think" and tag.closes:
            self._space = ""
            self._skips_newlines = True
            self._follows_thought = True
            self._is_line_blank = True
            self._step = self._read_content
        elif tag and tag.kind == "think" and self._is_thought_empty:
            self._skips_newlines, self._is_thought_empty = True, False  # an opening tag too many
        elif tag and self._is_line_blank and self._num_trials < MAX_TRIALS and self._may_open(tag):
            self._thought_calls = ThoughtCalls(self._tools, text[place : place + tag.length], tag)
            self._step = self._read_thought_calls
        else:
            self._add_text(Reasoning, text[place : place + (tag.length if tag else 1)])
        return place + (tag.length if tag else 1)

    def _read_content(self, text: str, start: int) -> int:
        start = self._behind_newlines(text, start)
        place = text.find("<", start) if self._kinds else -1
        end = place if place >= 0 else len(text)
        self._add_text(Content, text[start:end])
        if place < 0:
            return end
        tag = tag_at(text, place, len(text), self._kinds)
        if tag and tag.kind == "think" and not tag.closes and not self._follows_text:
            return self._open_thought(place + tag.length)
        if tag and self._is_line_of_thought(tag):
            if place + tag.length == len(text):
                return place  # what follows decides
            if text[place + tag.length] == "\n":
                return self._open_thought(place + tag.length)
        if tag is None:
            return place
        end = place + (tag.length if tag else 1)
        if tag and self._may_open(tag):
            self._call = CallReader(self._tools, text[place:end], tag)
            self._step = self._read_call
        elif tag and tag.closes and tag.kind != "think" and self._follows_call:
            self._space = ""  # a closing tag too many
        elif tag and tag.closes and tag.kind == "think" and self._follows_thought:
            self._space = ""  # likewise
            self._skips_newlines = True
        else:
            is_mention = bool(tag) and (self._is_mention or self._ticks.num_last > 0)
            self._add_text(Content, text[place:end])
            self._is_mention = is_mention
        return end

    @property
    def _follows_text(self) -> bool:
        return not (self._follows_call or self._follows_thought)

    def _is_line_of_thought(self, tag: Tag) -> bool:
        return tag.kind == "think" and not tag.closes and self._is_line_blank and not self._ticks.is_in_block

    def _may_open(self, tag: Tag) -> bool:
        """Whether a call may begin with the tag: not in a mention of it, and without `<tool_call>` only of a tool."""
        is_known = tag.kind == "tool_call" or tag.name in self._tools
        is_mention = self._step == self._read_content and (self._is_mention or self._ticks.num_last > 0)
        return tag.opens_call and is_known and not is_mention

    # Calls

    def _read_call(self, text: str, start: int) -> int:
        call = self._call
        assert call is not None
        place = call.feed(text, start)
        while self._take_call(call) and not call.is_done:
            place = call.feed(text, place)  # it pauses behind each call
        if call.is_done:
            self._end_call(call)
        elif call.has_failed:
            self._fail_call(call)
        return place

    def _take_call(self, call: CallReader) -> bool:
        """Whether a call ended."""
        events = call.take()
        num_ended = sum(isinstance(event, CallEnd) for event in events)
        if events:
            self._space = ""
            self._events += events
            self._num_calls += num_ended
        return num_ended > 0

    def _end_call(self, call: CallReader) -> None:
        self._call = None
        self._again = call.leftover
        self._step = self._read_content
        self._follows_call, self._follows_thought = True, False
        self._is_line_blank, self._is_mention = True, False

    def _fail_call(self, call: CallReader, rest: str = "") -> None:
        """What was held is no call, or the call is cut. `rest` follows it at the answer's end."""
        self._call = None
        self._step = self._read_content
        if call.has_started:
            self._events.append(CallCut(call.held if call.leftover else call.held + rest))
            self._has_cut_call = True
            self._follows_call = self._follows_thought = False
            self._is_line_blank = True
        else:
            self._add_text(Content, call.held if call.leftover else call.held + rest)
        again = call.leftover + rest if call.leftover else ""
        self._num_trials += len(again) > MAX_TAG_LENGTH
        if self._num_trials <= MAX_TRIALS:
            self._again = again
        else:
            self._add_text(Content, again)

    def _finish_call(self, call: CallReader, rest: str, *, has_ended: bool) -> None:
        call.finish(has_ended=has_ended)
        self._take_call(call)
        if not call.is_done:
            self._fail_call(call, rest)
            return
        self._end_call(call)
        if rest[:2] not in ("<", "</"):  # else it begins a tag that closes the call
            self._again += rest

    def _read_thought_calls(self, text: str, start: int) -> int:
        calls = self._thought_calls
        assert calls is not None
        place = calls.feed(text, start)
        if calls.has_failed:
            self._fail_thought_calls(calls)
        return place

    def _finish_thought_calls(self, calls: ThoughtCalls, rest: str, *, has_ended: bool) -> None:
        events = calls.finish(rest, has_ended=has_ended)
        if calls.has_failed:
            self._fail_thought_calls(calls, rest)
            return
        self._thought_calls = None
        self._step = self._read_content
        self._space = ""
        self._follows_call = True
        self._events += events
        self._num_calls += sum(isinstance(event, CallEnd) for event in events)

    def _fail_thought_calls(self, calls: ThoughtCalls, rest: str = "") -> None:
        """The calls are only spoken of: the first tag is text, and what follows is read again."""
        self._thought_calls = None
        self._num_trials += 1
        self._step = self._read_reasoning
        self._add_text(Reasoning, calls.opening)
        self._again = calls.held + rest

    # Events

    def _behind_newlines(self, text: str, start: int) -> int:
        """Where to read on: behind the newlines that follow a tag of the thought."""
        while self._skips_newlines and start < len(text):
            self._skips_newlines = text[start] == "\n"
            start += self._skips_newlines
        return start

    def _add_text(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        """White space at the end is held back: it is dropped where a call or the end of the thought follows."""
        if not text:
            return
        self._is_thought_empty = False
        line = text.rpartition("\n")
        self._is_line_blank = (bool(line[1]) or self._is_line_blank) and not line[2].strip(WHITE_SPACE)
        solid = text.rstrip(WHITE_SPACE if kind is Content else "\n")
        if kind is Content and not self._reads_calls:
            solid = text  # no call follows
        if kind is Content:
            self._ticks.add(text)
            self._is_mention = self._is_mention and not solid
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
            self._follows_call = self._follows_thought = False

    def _take(self) -> list[OutputEvent]:
        events, self._events = self._events, []
        return merged(events) if len(events) > 1 else events


class _Backticks:
    """Backticks of the content: how many stand at its end, and whether an odd number of ``` opened a block."""

    def __init__(self) -> None:
        self.num_last = 0
        self.is_in_block = False

    def add(self, text: str) -> None:
        text = "`" * (self.num_last % 3) + text
        self.is_in_block ^= text.count("```") % 2 == 1
        self.num_last = len(text) - len(text.rstrip("`"))
