"""Flags about sampling, the chat template and the weights, which several verbs share."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.flags.values import human_int, option
from qnext.session.placement import AUTO

if TYPE_CHECKING:
    from qnext.engine.policy.watermark_key import WatermarkKey
    from qnext.text.thinking import TemplateRequest

_DEFAULT = "default: generation_config.json of the model, else"

_TEMPLATE_HELP = 'Arguments of the chat template, such as {"enable_thinking": false}.'


def json_object(text: str) -> dict[str, Any]:
    """An object from its JSON text, for `typer.Option(parser=json_object)`. Raises ValueError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text[:40]!r} must be a JSON object")
    return value


TemplateArguments = Annotated[
    dict | None,
    typer.Option("--chat-template-kwargs", metavar="JSON", parser=json_object, help=_TEMPLATE_HELP),
]
TemplateDefaults = Annotated[
    dict | None,
    typer.Option(
        "--chat-template-kwargs",
        "--default-chat-template-kwargs",
        metavar="JSON",
        parser=json_object,
        help=f"{_TEMPLATE_HELP} Those of a request count first.",
        rich_help_panel="Model",
    ),
]
Yarn = Annotated[
    float | None,
    typer.Option("--yarn", metavar="FACTOR", help="Stretch the context by static YaRN; may cost short texts a little."),
]
ExpertMemory = Annotated[
    int | None,
    option(
        "Memory for experts, the others stay on disk, or in host memory with a GPU; default: all where they fit.",
        "--expert-memory",
        parser=human_int,
        metavar="SIZE",
    ),
]
Speculation = Annotated[
    bool | None,
    typer.Option("--speculation/--no-speculation", help="Drafts by the MTP layer; default: where the model has one."),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="auto|cpu|cuda|cuda:N", help="auto: a GPU where there is one and the weights fit, else cpu."
    ),
]
DType = Annotated[
    str | None, typer.Option("--dtype", metavar="float32|bfloat16", help="Of the weights; default: as stored.")
]


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen. None: generation_config.json of the model says it, else the field's own default."""

    max_tokens: Annotated[int | None, option("Most tokens of an answer.", metavar="N")] = None
    temperature: Annotated[float | None, option(f"0 is greedy; {_DEFAULT} greedy.", metavar="X")] = None
    top_k: Annotated[int | None, option(f"Keep the N likeliest; {_DEFAULT} all.", metavar="N")] = None
    top_p: Annotated[float | None, option(f"Keep the likeliest mass; {_DEFAULT} 1.", metavar="X")] = None
    min_p: Annotated[float | None, option(f"Drop below X times the best; {_DEFAULT} 0.", metavar="X")] = None
    repetition_penalty: Annotated[float | None, option(f"Over prompt and answer; {_DEFAULT} 1.", metavar="X")] = None
    presence_penalty: Annotated[float | None, option("Over the answer.", metavar="X")] = None
    frequency_penalty: Annotated[float | None, option("Over the answer.", metavar="X")] = None
    seed: Annotated[int | None, option("Makes sampling repeatable.", metavar="N")] = None
    stop: Annotated[list[str] | None, option("End before this text; repeatable.", metavar="TEXT")] = None

    @property
    def given(self) -> dict[str, Any]:
        """What was said, under the names of SamplingParams; `stop` is no field of these."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "stop"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class LoadingFlags:
    """How MODEL is loaded and run."""

    yarn: Yarn = None
    expert_memory: ExpertMemory = None
    speculation: Speculation = None
    dtype: DType = None
    device: Device = AUTO
    watermark: Annotated[
        Path | None, option("Mark the answer by this key: `qnext watermark create`.", metavar="KEYFILE")
    ] = None

    @property
    def watermark_key(self) -> WatermarkKey | None:
        from qnext.session.watermark import read_key

        return None if self.watermark is None else read_key(self.watermark)


@dataclass(frozen=True)
class TemplateFlags:
    """What the chat template is told."""

    think: Annotated[
        bool | None, option("Whether answers begin with a thought; default: as the model does.", "--think/--no-think")
    ] = None
    chat_template_kwargs: TemplateArguments = None

    @property
    def is_given(self) -> bool:
        return self.think is not None or self.chat_template_kwargs is not None

    def request(self) -> TemplateRequest:
        """The same, as a conversation has it."""
        from qnext.text.thinking import TemplateRequest

        return TemplateRequest(self.chat_template_kwargs or {}, self.think)
