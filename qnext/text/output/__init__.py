"""The text of an answer to content, reasoning and tool calls, and the grammar that makes an answer call a tool.

`OutputParser` (parser) reads text in pieces and gives `events`. `xml_calls` and `json_calls` read the two forms of
calls, `values` their arguments. May import `errors` alone. A new form of calls is a file beside these two, named in
`calls`.
"""

from __future__ import annotations

from qnext.text.output.events import (
    AnswerPart,
    Call,
    CallArguments,
    CallCut,
    CallEnd,
    CallStart,
    Content,
    CutCall,
    OutputEvent,
    Reasoning,
    joined,
)
from qnext.text.output.grammar import tool_call_grammar
from qnext.text.output.json_values import whole_members
from qnext.text.output.parser import OutputParser

__all__ = [
    "AnswerPart",
    "Call",
    "CallArguments",
    "CallCut",
    "CallEnd",
    "CallStart",
    "Content",
    "CutCall",
    "OutputEvent",
    "OutputParser",
    "Reasoning",
    "joined",
    "tool_call_grammar",
    "whole_members",
]
