"""Anthropic's turns of blocks as the messages that chat formats write."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import groupby

from qnext.server.anthropic.bodies import (
    CountBody,
    CustomTool,
    OtherBlock,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    TurnBody,
)
from qnext.server.errors import ApiError
from qnext.server.tools import Offer, function_tool, offered
from qnext.text.messages import Message, ToolCall

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def conversation(body: CountBody) -> list[Message]:
    """System prompt and turns. Neighbouring turns of one role are one. Raises ApiError 400."""
    messages: list[Message] = []
    called: set[str | None] = set()  # what the assistant's turns just before called
    if body.system is not None:
        messages.append(Message("system", _text(body.system, "system")))
    for index, turn in enumerate(body.messages):
        param = f"messages.{index}.content"
        if turn.role == "assistant":
            messages.append(_assistant(turn, param))
            called.update(call.id for call in messages[-1].tool_calls)
        else:
            messages += _other_roles(turn, called, param)
            called.clear()
    return [
        message
        for role, group in groupby(messages, key=lambda message: message.role)
        for message in ([_joined(list(group))] if role in ("user", "assistant") else group)
    ]


def offer(body: CountBody) -> Offer:
    """The tools, and how they are to be used. Raises ApiError 400."""
    tools = []
    for index, tool in enumerate(body.tools or ()):
        if not isinstance(tool, CustomTool):
            raise ApiError.bad(
                "only tools of type custom are served: this server runs none itself", param=f"tools.{index}.type"
            )
        tools.append(function_tool(tool.name, tool.description, tool.input_schema))
    choice = body.tool_choice
    if choice is None:
        return offered(tools, None)
    if choice.type != "tool":
        return offered(tools, _CHOICES[choice.type])
    if choice.name is None:
        raise ApiError.bad("a choice of type tool needs a name", param="tool_choice.name")
    return offered(tools, {"type": "function", "name": choice.name})


def _assistant(turn: TurnBody, param: str) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(ToolCall(block.name, block.input, block.id))
        elif not isinstance(block, RedactedThinkingBlock):
            raise _misplaced(block, f"{param}.{index}")
    return Message("assistant", "".join(texts), "\n".join(thoughts) if thoughts else None, tuple(calls))


def _other_roles(turn: TurnBody, called: Collection[str | None], param: str) -> list[Message]:
    """The results of tools, each a message, and then the text."""
    texts: list[TextBlock] = []
    results: list[Message] = []
    for index, block in enumerate(turn.content):
        place = f"{param}.{index}"
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolResultBlock) and turn.role == "user":
            if block.tool_use_id not in called:
                raise ApiError.bad("no tool_use of the turn before has this id", param=f"{place}.tool_use_id")
            results.append(Message("tool", _result(block, place), tool_call_id=block.tool_use_id))
        else:
            raise _misplaced(block, place)
    if texts or not results:
        results.append(Message(turn.role, _text(texts, param)))
    return results


def _result(block: ToolResultBlock, param: str) -> str:
    text = _text(block.content or (), f"{param}.content")
    return f"Error: {text}" if block.is_error else text  # chat formats have no other mark


def _text(blocks: Sequence[TextBlock | OtherBlock], param: str) -> str:
    """Blocks are texts of their own, so that each begins on a line of its own."""
    for index, block in enumerate(blocks):
        if not isinstance(block, TextBlock):
            raise _misplaced(block, f"{param}.{index}")
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def _misplaced(block: object, param: str) -> ApiError:
    if isinstance(block, OtherBlock):
        return ApiError.bad("this model reads text only", param=param, code="unsupported_content")
    return ApiError.bad("a turn of this role has no blocks of this type", param=param)


def _joined(turns: Sequence[Message]) -> Message:
    """Neighbouring turns of one role as one."""
    thoughts = [turn.reasoning_content for turn in turns if turn.reasoning_content is not None]
    return replace(
        turns[0],
        content=("\n" if turns[0].role == "user" else "").join(turn.content for turn in turns),
        reasoning_content="\n".join(thoughts) if thoughts else None,
        tool_calls=tuple(call for turn in turns for call in turn.tool_calls),
    )
