"""The chat format of a folder: recognising it, and writing a conversation in it as pieces of text.

A folder's template is used natively when its hash is known, or when it renders a set of test conversations exactly as a
native format does. Otherwise it runs in the limited child process of `qnext.text.jinja`. The native path needs no
process and keeps every string of the caller untrusted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext.errors import QnextError, UsageError
from qnext.text.jinja import JinjaTemplate, TemplateLimits, TemplateRefusal
from qnext.text.messages import Message, ToolCall, alternating, checked_conversation, checked_tools, system_first
from qnext.text.native import NATIVE_FORMATS
from qnext.text.template_files import read_templates
from qnext.text.templates import KNOWN_TEMPLATES, template_hash
from qnext.text.tokenizer import Piece, Tokenizer
from qnext.text.tokenizer_files import named_tokens

_PLACES = "chat_template.jinja, or chat_template in tokenizer_config.json"


@dataclass(frozen=True)
class ChatFormat:
    """A way to write conversations. `name` is `instruct`, `thinking`, `coder` or, for a foreign template, `jinja`.

    `tool_template` replaces `template` where tools are given and the folder has a separate template for them.
    """

    name: str
    template: JinjaTemplate | None = None
    tool_template: JinjaTemplate | None = None

    @classmethod
    def native(cls, name: str) -> ChatFormat:
        """One of the family's formats by name. Raises UsageError for another name."""
        if name not in NATIVE_FORMATS:
            raise UsageError(f"unknown chat format {name!r}, expected one of {', '.join(NATIVE_FORMATS)}")
        return cls(name)

    @classmethod
    def for_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        limits: TemplateLimits | None = None,
    ) -> ChatFormat:
        """The format of a model folder, from chat_template.jinja or otherwise tokenizer_config.json.

        `tokenizer` saves loading the folder's own. Raises UsageError where the folder has no template (text completion
        does not need one), CorruptCheckpoint for a faulty template or missing turn tokens.
        """
        root = Path(folder)
        found = read_templates(root)
        if found is None:
            raise UsageError(f"{root}: no chat template ({_PLACES}); this folder can complete text but not chat")
        source, texts = found
        tokenizer = tokenizer or Tokenizer.from_folder(root)
        if "tool_use" not in texts and (known := KNOWN_TEMPLATES.get(template_hash(texts["default"]))):
            tokenizer.require_chat_tokens()
            return cls(known)
        variables = named_tokens(root)
        templates = {
            name: JinjaTemplate(
                text,
                source=source,
                control_names=[name for name, i in tokenizer.reserved_ids.items() if i in tokenizer.special_ids],
                markup_names=tokenizer.reserved_ids,
                variables=variables,
                limits=limits,
            )
            for name, text in texts.items()
        }
        if "tool_use" not in texts and (recognised := recognise(templates["default"])):
            templates["default"].close()
            tokenizer.require_chat_tokens()
            return cls(recognised)
        return cls("jinja", templates["default"], templates.get("tool_use"))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[Piece]:
        """The conversation as pieces, ending where the assistant is to write; `text.prompts` makes token ids of them.

        `arguments` are those of the template, of which `self.arguments` are the names. A conversation that the
        template refuses is tried again with one system message at the beginning, then with neighbours of one role as
        one. Raises UsageError for an empty conversation, an unknown role or a malformed tool, and with the template's
        own message where it refuses all of these.
        """
        conversation = checked_conversation(messages)
        checked = checked_tools(tools)
        if self.template is None:
            return NATIVE_FORMATS[self.name](conversation, checked, add_generation_prompt)
        template = self.tool_template if checked and self.tool_template is not None else self.template
        forms = [conversation]
        for changed in (system_first(conversation), alternating(system_first(conversation))):
            if changed not in forms:
                forms.append(changed)
        refusal: TemplateRefusal | None = None
        for form in forms:
            try:
                return template.render(
                    form, tools=checked, add_generation_prompt=add_generation_prompt, arguments=arguments
                )
            except TemplateRefusal as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def close(self) -> None:
        """End the child processes of foreign templates. A later render starts them again."""
        for template in (self.template, self.tool_template):
            if template is not None:
                template.close()

    @property
    def arguments(self) -> frozenset[str]:
        """Names that the templates read beside conversation and tools. Native formats read none."""
        found = [template.arguments for template in (self.template, self.tool_template) if template is not None]
        return frozenset().union(*found)


def recognise(template: JinjaTemplate) -> str | None:
    """Name of the native format that renders every probing conversation as `template` does, or None.

    A template that reads arguments of its own can do more than any native format.
    """
    if template.arguments:
        return None
    candidates = dict(NATIVE_FORMATS)
    for messages, tools, add_generation_prompt in _PROBES:
        try:
            pieces = template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        except QnextError:
            return None
        text = "".join(piece.text for piece in pieces)
        for name in list(candidates):
            rendered = candidates[name](messages, tools, add_generation_prompt)
            if "".join(piece.text for piece in rendered) != text:
                del candidates[name]
        if not candidates:
            return None
    assert len(candidates) == 1, "the probes tell the native formats apart"
    return next(iter(candidates))


_SYSTEM = Message("system", " Be brief.\n")
_ASK = Message("user", "  What is the weather in Zürich?\n")
_ANSWER = Message("assistant", " Sunny.\n")
_CALLS = Message(
    "assistant",
    "I will look.",
    tool_calls=(ToolCall("weather", {"city": "Zürich", "days": 3}), ToolCall("time", {"zones": ["CET"], "utc": True})),
)
_BARE_CALLS = Message("assistant", tool_calls=(ToolCall("time", {}), ToolCall("time", {"utc": True})))
_RESULTS = (Message("tool", '{"sky": "clear"}'), Message("tool", " 12:00\n"))
_THOUGHT = Message("assistant", "Sunny, noon.", reasoning_content="Both are known.")
_THOUGHT_CALL = Message("assistant", reasoning_content="Look it up.", tool_calls=(ToolCall("time", {"utc": False}),))
_TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecast <b>&</b> more",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Où?"},
                    "days": {"type": "integer", "enum": [1, 3], "default": 1},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
)

# What the native formats do differently from one another and from near relatives: the default system prompt, tools
# with and without a system message, calls with and without content, merged results, kept and dropped reasoning.
_PROBES: tuple[tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...], bool], ...] = (
    ((_ASK,), (), True),
    ((_ASK,), _TOOLS, True),
    ((_SYSTEM, _ASK), _TOOLS[:1], False),
    ((_SYSTEM, _ASK, _ANSWER, _SYSTEM, _ASK), (), True),
    ((_SYSTEM, _ASK, _ANSWER), (), False),
    ((_ASK, _CALLS, *_RESULTS), _TOOLS, True),
    ((_ASK, _BARE_CALLS, *_RESULTS, _ANSWER, _ASK), _TOOLS, True),
    ((_ASK, _THOUGHT, _ASK, _THOUGHT_CALL, _RESULTS[1], _THOUGHT), _TOOLS, False),
    ((_ASK, Message("assistant", "<think>\nHm.\n</think>\n\nYes."), _ASK), (), True),
)
