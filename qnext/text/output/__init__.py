"""Text of an answer to content, reasoning and tool calls, and the grammar that makes an answer call a tool."""

from __future__ import annotations

from qnext.text.output.events import Call, Content, OutputEvent, Reasoning
from qnext.text.output.grammar import tool_call_grammar
from qnext.text.output.parser import OutputParser

__all__ = ["Call", "Content", "OutputEvent", "OutputParser", "Reasoning", "tool_call_grammar"]
