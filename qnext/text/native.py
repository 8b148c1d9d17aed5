"""The three chat formats of the family, written out as functions that yield pieces: `instruct`, `thinking`, `coder`.

Frame and markup are trusted. What a caller supplied (content, reasoning, schemas, names, arguments) is not.
References, character by character: for `coder` the template of Qwen3-Coder; for `instruct` that of Qwen2.5-7B-Instruct
with a system message (later ones have no default system prompt) and that of Qwen3-0.6B without; for `thinking` that of
Qwen3-0.6B, with the generation prompt of QwQ-32B. The files of Qwen3-Next were not at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qnext.text.messages import Message, ToolCall
from qnext.text.tokenizer import Piece

TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
CODER_SYSTEM = "You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks."
CODER_TOOLS_HEAD = "\n\n# Tools\n\nYou have access to the following tools:\n\n<tools>"
CODER_TOOLS_TAIL = (
    "\n</tools>\n\nIf you choose to call a tool ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nvalue_2\n</parameter>\n</function>\n</tool_call>\n\n"
    "<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: the tool calling block MUST begin with an opening "
    "<tool_call> tag and end with a closing </tool_call> tag.\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the function call, "
    "but NOT after\n"
    "- If there is no function call available, answer the question like normal with your current knowledge and "
    "do not tell the user about function calls\n</IMPORTANT>"
)

Renderer = Callable[[Sequence[Message], Sequence[Mapping[str, Any]], bool], list[Piece]]


class _PieceWriter:
    """Collects pieces and joins neighbours of equal trust."""

    def __init__(self) -> None:
        self._runs: list[tuple[bool, list[str]]] = []

    def trusted(self, text: str) -> None:
        self._add(text, True)

    def untrusted(self, text: str) -> None:
        self._add(text, False)

    def pieces(self) -> list[Piece]:
        return [Piece("".join(texts), is_trusted) for is_trusted, texts in self._runs]

    def _add(self, text: str, is_trusted: bool) -> None:
        if not text:
            return
        if self._runs and self._runs[-1][0] == is_trusted:
            self._runs[-1][1].append(text)
        else:
            self._runs.append((is_trusted, [text]))


def render_instruct(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> list[Piece]:
    """ChatML with JSON tool calls; reasoning is not part of the format and is left out."""
    writer = _PieceWriter()
    _system_and_json_tools(writer, messages, tools)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            writer.trusted("<|im_start|>assistant\n")
            writer.untrusted(message.content)
            _json_tool_calls(writer, message.tool_calls, follows_content=bool(message.content))
            writer.trusted("<|im_end|>\n")
        else:
            _plain_turn(writer, messages, index)
    if add_generation_prompt:
        writer.trusted("<|im_start|>assistant\n")
    return writer.pieces()


def render_thinking(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> list[Piece]:
    """ChatML with JSON tool calls; the answer begins inside a think block.

    Reasoning is kept for the turns after the last question of the user (a tool loop in progress) and dropped before.
    """
    writer = _PieceWriter()
    _system_and_json_tools(writer, messages, tools)
    last_query = _last_query_index(messages)
    for index, message in enumerate(messages):
        if message.role != "assistant":
            _plain_turn(writer, messages, index)
            continue
        reasoning, content = split_reasoning(message)
        writer.trusted("<|im_start|>assistant\n")
        if index > last_query and (index == len(messages) - 1 or reasoning):
            writer.trusted("<think>\n")
            writer.untrusted(reasoning.strip("\n"))
            writer.trusted("\n</think>\n\n")
            writer.untrusted(content.lstrip("\n"))
        else:
            writer.untrusted(content)
        _json_tool_calls(writer, message.tool_calls, follows_content=bool(content))
        writer.trusted("<|im_end|>\n")
    if add_generation_prompt:
        writer.trusted("<|im_start|>assistant\n<think>\n")
    return writer.pieces()


def render_coder(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> list[Piece]:
    """ChatML with XML tool schemas and calls; values are bare text, typed by the schema. No reasoning."""
    writer = _PieceWriter()
    has_system = messages[0].role == "system"
    if has_system or tools:
        writer.trusted("<|im_start|>system\n")
        if has_system:
            writer.untrusted(messages[0].content)
        else:
            writer.trusted(CODER_SYSTEM)
        if tools:
            _coder_tools(writer, tools)
        writer.trusted("<|im_end|>\n")
    turns = messages[1:] if has_system else messages
    for index, message in enumerate(turns):
        if message.role == "assistant" and message.tool_calls:
            _coder_calls(writer, message)
        elif message.role == "tool":
            if index == 0 or turns[index - 1].role != "tool":
                writer.trusted("<|im_start|>user\n")
            writer.trusted("<tool_response>\n")
            writer.untrusted(message.content)
            writer.trusted("\n</tool_response>\n")
            if index + 1 == len(turns) or turns[index + 1].role != "tool":
                writer.trusted("<|im_end|>\n")
        else:
            _turn(writer, message)
    if add_generation_prompt:
        writer.trusted("<|im_start|>assistant\n")
    return writer.pieces()


NATIVE_FORMATS: dict[str, Renderer] = {
    "instruct": render_instruct,
    "thinking": render_thinking,
    "coder": render_coder,
}


def split_reasoning(message: Message) -> tuple[str, str]:
    """(reasoning, content) of an assistant turn. It is split at `</think>` where the reasoning is not given
    separately."""
    if message.reasoning_content is not None:
        return message.reasoning_content, message.content
    if "</think>" not in message.content:
        return "", message.content
    parts = message.content.split("</think>")
    reasoning = parts[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return reasoning, parts[-1].lstrip("\n")


def _last_query_index(messages: Sequence[Message]) -> int:
    """Index of the last user turn that is no hand-made tool result; the last message where there is none."""
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        is_result = message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")
        if message.role == "user" and not is_result:
            return index
    return len(messages) - 1


def _system_and_json_tools(
    writer: _PieceWriter, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> None:
    has_system = messages[0].role == "system"
    if not has_system and not tools:
        return
    writer.trusted("<|im_start|>system\n")
    if has_system:
        writer.untrusted(messages[0].content)
    if tools:
        writer.trusted(("\n\n" if has_system else "") + TOOLS_HEAD)
        for tool in tools:
            writer.trusted("\n")
            writer.untrusted(_json(tool))
        writer.trusted(TOOLS_TAIL)
    writer.trusted("<|im_end|>\n")


def _plain_turn(writer: _PieceWriter, messages: Sequence[Message], index: int) -> None:
    """A user, later system or tool turn; neighbouring tool results share one user turn."""
    message = messages[index]
    if message.role == "tool":
        if index == 0 or messages[index - 1].role != "tool":
            writer.trusted("<|im_start|>user")
        writer.trusted("\n<tool_response>\n")
        writer.untrusted(message.content)
        writer.trusted("\n</tool_response>")
        if index + 1 == len(messages) or messages[index + 1].role != "tool":
            writer.trusted("<|im_end|>\n")
    elif message.role == "user" or index > 0:
        _turn(writer, message)


def _turn(writer: _PieceWriter, message: Message) -> None:
    writer.trusted(f"<|im_start|>{message.role}\n")
    writer.untrusted(message.content)
    writer.trusted("<|im_end|>\n")


def _json_tool_calls(writer: _PieceWriter, calls: Sequence[ToolCall], *, follows_content: bool) -> None:
    for index, call in enumerate(calls):
        writer.trusted("\n" if follows_content or index > 0 else "")
        writer.trusted('<tool_call>\n{"name": "')
        writer.untrusted(call.name)
        writer.trusted('", "arguments": ')
        writer.untrusted(call.arguments if isinstance(call.arguments, str) else _json(call.arguments))
        writer.trusted("}\n</tool_call>")


def _coder_calls(writer: _PieceWriter, message: Message) -> None:
    writer.trusted("<|im_start|>assistant")
    if content := message.content.strip():
        writer.trusted("\n")
        writer.untrusted(content)
        writer.trusted("\n")
    for call in message.tool_calls:
        writer.trusted("\n<tool_call>\n<function=")
        writer.untrusted(call.name)
        writer.trusted(">\n")
        for name, value in call.arguments_object().items():
            writer.trusted("<parameter=")
            writer.untrusted(name)
            writer.trusted(">\n")
            writer.untrusted(_coder_value(value))
            writer.trusted("\n</parameter>\n")
        writer.trusted("</function>\n</tool_call>")
    writer.trusted("<|im_end|>\n")


def _coder_tools(writer: _PieceWriter, tools: Sequence[Mapping[str, Any]]) -> None:
    writer.trusted(CODER_TOOLS_HEAD)
    for tool in tools:
        function: Mapping[str, Any] = tool.get("function", tool)
        writer.trusted("\n<function>")
        _element(writer, "name", function["name"])
        if "description" in function:
            _element(writer, "description", str(function["description"]).strip())
        writer.trusted("\n<parameters>")
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        for name, fields in properties.items() if isinstance(properties, Mapping) else ():
            writer.trusted("\n<parameter>")
            _element(writer, "name", name)
            if isinstance(fields, Mapping):
                if "type" in fields:
                    _element(writer, "type", str(fields["type"]))
                if "description" in fields:
                    _element(writer, "description", str(fields["description"]).strip())
            _extra_elements(writer, fields, handled=("name", "type", "description"))
            writer.trusted("\n</parameter>")
        _extra_elements(writer, parameters, handled=("type", "properties"))
        writer.trusted("\n</parameters>")
        _extra_elements(writer, function, handled=("type", "name", "description", "parameters"))
        writer.trusted("\n</function>")
    writer.trusted(CODER_TOOLS_TAIL)


def _extra_elements(writer: _PieceWriter, fields: Any, *, handled: tuple[str, ...]) -> None:
    for name, value in fields.items() if isinstance(fields, Mapping) else ():
        if name not in handled:
            _element(writer, name, _coder_value(value))


def _element(writer: _PieceWriter, name: str, text: str) -> None:
    writer.trusted("\n")
    writer.untrusted(f"<{name}>{text}</{name}>")


def _coder_value(value: Any) -> str:
    """Objects and lists as JSON; everything else as Python writes it (`True`, `None`), as the template does."""
    return _json(value) if isinstance(value, (Mapping, list, tuple)) else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
