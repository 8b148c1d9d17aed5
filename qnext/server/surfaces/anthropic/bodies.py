"""Bodies of Anthropic's messages API. Its cache marks are accepted and not read, because prefixes are always cached."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from qnext.engine.policy.params import MAX_TOP_K
from qnext.server.body.strict import (
    KEEPS_UNKNOWN,
    Body,
    Effort,
    MaxTokens,
    Name,
    Options,
    Stops,
    TemplateBody,
    ThoughtBody,
    TopP,
)
from qnext.server.limits import MAX_CONTENT_PARTS, MAX_MESSAGES, MAX_TOOLS
from qnext.server.surfaces.tools import ToolName


class TextBlock(Body):
    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None  # not checked: thoughts are not signed here


class RedactedThinkingBlock(Body):
    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Name
    name: Name
    input: Any = None  # of the past: whatever it is


class OtherBlock(Body):
    """Images, documents, and results of tools that a server ran. Only their text is read."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(max_length=64)]


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if kind in ("text", "thinking", "redacted_thinking", "tool_use", "tool_result") else "other"


def _result_kind(value: Any) -> str:
    return "text" if isinstance(value, dict) and value.get("type") == "text" else "other"


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Text = Annotated[TextBlock, Tag("text")]
Other = Annotated[OtherBlock, Tag("other")]
ResultBlock = Annotated[Text | Other, Discriminator(_result_kind)]
_ResultBlocks = Annotated[list[ResultBlock], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]
ResultBlocks = Annotated[_ResultBlocks, BeforeValidator(_as_blocks, json_schema_input_type=str | _ResultBlocks)]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Name
    content: ResultBlocks | None = None
    is_error: bool | None = None


Block = Annotated[
    Text
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Other,
    Discriminator(_kind),
]
_Blocks = Annotated[list[Block], Field(max_length=MAX_CONTENT_PARTS, fail_fast=True)]
Blocks = Annotated[_Blocks, BeforeValidator(_as_blocks, json_schema_input_type=str | _Blocks)]


class TurnBody(Body):
    role: Literal["user", "assistant", "system"]
    content: Blocks | None = None


class SchemaTool(Body):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ServerTool(Body):
    """A tool that Anthropic's servers run, or a tool whose type defines its parameters."""

    type: Annotated[str, Field(max_length=64)]
    name: ToolName | None = None


def _tool_kind(value: Any) -> str:
    # "function" is OpenAI's word: a tool in its form is a mistake, and not one of a server.
    kinds = (None, "custom", "function")
    return "custom" if not isinstance(value, dict) or value.get("type") in kinds else "server"


Tool = Annotated[Annotated[SchemaTool, Tag("custom")] | Annotated[ServerTool, Tag("server")], Discriminator(_tool_kind)]


class ToolChoice(Options):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Options):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Options):
    format: OutputFormat | None = None
    effort: Effort | None = None


class CountBody(TemplateBody):
    """A conversation whose tokens are to be counted."""

    model_config = KEEPS_UNKNOWN

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[TurnBody], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: ResultBlocks | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThoughtBody | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its older name
    mcp_servers: Annotated[list[Any], Field(max_length=MAX_TOOLS)] | None = None  # passed over


class MessagesBody(CountBody):
    """A conversation to answer."""

    max_tokens: MaxTokens
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
