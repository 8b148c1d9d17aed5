"""Turns of Anthropic's content blocks as the messages that chat formats write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from qnext.server.errors import ApiError
from qnext.server.surfaces.anthropic.bodies import (
    CountBody,
    OtherBlock,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    TurnBody,
)
from qnext.server.surfaces.history import Note, part_text, without_attribution
from qnext.text.messages import Message, ToolCall


def conversation(body: CountBody, note: Note) -> list[Message]:
    """System prompt and turns. Consecutive turns of one role become one. Raises ApiError 400.

    `note` is told of content that the model cannot read.
    """
    messages: list[Message] = []
    system = without_attribution(_text(body.system or (), "system", note, is_past=False))
    if system:
        messages.append(Message("system", system))
    for index, turn in enumerate(body.messages):
        param = f"messages.{index}.content"
        if turn.role == "assistant":
            messages.append(_assistant(turn, param, note))
        else:
            messages += _other_roles(turn, param, note, is_past=index < len(body.messages) - 1)
    return [
        message
        for role, group in groupby(messages, key=lambda message: message.role)
        for message in ([_joined(list(group))] if role in ("user", "assistant") else group)
    ]


def _assistant(turn: TurnBody, param: str, note: Note) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(turn.content or ()):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(ToolCall(block.name, block.input, block.id))
        elif isinstance(block, OtherBlock):
            texts.append(_other(block, f"{param}.{index}", note, is_past=True))
        elif not isinstance(block, RedactedThinkingBlock):
            raise _misplaced(f"{param}.{index}")
    return Message("assistant", "".join(texts), "\n".join(thoughts) if thoughts else None, tuple(calls))


def _other_roles(turn: TurnBody, param: str, note: Note, *, is_past: bool) -> list[Message]:
    """The results of tools, each a message, and then the text."""
    texts: list[TextBlock | OtherBlock] = []
    results: list[Message] = []
    for index, block in enumerate(turn.content or ()):
        if isinstance(block, (TextBlock, OtherBlock)):
            texts.append(block)
        elif isinstance(block, ToolResultBlock) and turn.role == "user":
            place = f"{param}.{index}"
            results.append(Message("tool", _result(block, place, note), tool_call_id=block.tool_use_id))
        else:
            raise _misplaced(f"{param}.{index}")
    text = _text(texts, param, note, is_past=is_past)
    if turn.role == "system":
        text = without_attribution(text)
        return [Message("system", text)] if text else []
    if texts or not results:
        results.append(Message(turn.role, text))
    return results


def _result(block: ToolResultBlock, param: str, note: Note) -> str:
    text = _text(block.content or (), f"{param}.content", note)
    return f"Error: {text}" if block.is_error else text  # chat formats have no other mark


def _text(blocks: Sequence[TextBlock | OtherBlock], param: str, note: Note, *, is_past: bool = True) -> str:
    """The text of blocks, each on a line of its own."""
    return "\n".join(
        block.text if isinstance(block, TextBlock) else _other(block, f"{param}.{index}", note, is_past=is_past)
        for index, block in enumerate(blocks)
    )


def _other(block: OtherBlock, param: str, note: Note, *, is_past: bool) -> str:
    return part_text(block.type, block.model_extra or {}, is_past=is_past, param=param, note=note)


def _misplaced(param: str) -> ApiError:
    return ApiError.bad("a turn of this role has no blocks of this type", param=param)


def _joined(turns: Sequence[Message]) -> Message:
    """Turns of one role that follow each other, as one."""
    thoughts = [turn.reasoning_content for turn in turns if turn.reasoning_content is not None]
    return replace(
        turns[0],
        content=("\n" if turns[0].role == "user" else "").join(turn.content for turn in turns),
        reasoning_content="\n".join(thoughts) if thoughts else None,
        tool_calls=tuple(call for turn in turns for call in turn.tool_calls),
    )
