"""Sampling flags that `generate` and `chat` share, and the defaults of a model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.errors import CorruptCheckpoint, UsageError

if TYPE_CHECKING:
    from qnext.engine import SamplingParams
    from qnext.text.thinking import TemplateRequest

_DEFAULT = "default: generation_config.json of the model, else"

MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="Most tokens of an answer.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="X", help=f"0 is greedy; {_DEFAULT} greedy.")
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="N", help=f"Keep the N likeliest; {_DEFAULT} all.")]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="X", help=f"Keep the likeliest mass; {_DEFAULT} 1.")]
MinP = Annotated[float | None, typer.Option("--min-p", metavar="X", help=f"Drop below X times the best; {_DEFAULT} 0.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="X", help=f"Over prompt and answer; {_DEFAULT} 1.")
]
PresencePenalty = Annotated[float | None, typer.Option("--presence-penalty", metavar="X", help="Over the answer.")]
FrequencyPenalty = Annotated[float | None, typer.Option("--frequency-penalty", metavar="X", help="Over the answer.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; repeatable.")]
Think = Annotated[
    bool | None,
    typer.Option("--think/--no-think", help="Whether answers begin with a thought; default: as the model does."),
]
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
Speculation = Annotated[
    bool | None,
    typer.Option("--speculation/--no-speculation", help="Drafts by the MTP layer; default: where the model has one."),
]
DType = Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16; default: as stored.")]

# Keys of generation_config.json that carry over; each is named like the field of SamplingParams.
_CONFIG_KEYS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def template_request(arguments: Mapping[str, Any] | None, thinks: bool | None) -> TemplateRequest:
    """What the flags say to the chat template."""
    from qnext.text.thinking import TemplateRequest

    return TemplateRequest(arguments or {}, thinks)


def resolve_sampling(folder: Path, flags: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters: a flag that was given, else generation_config.json, else greedy.

    A file without temperature samples at 1 when it says do_sample true; do_sample false means greedy.
    """
    from qnext.engine import SamplingParams

    values = sampling_defaults(folder)
    return SamplingParams(**values | {key: value for key, value in flags.items() if value is not None})


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of sampling. Raises CorruptCheckpoint for values that cannot be."""
    from qnext.engine import SamplingParams
    from qnext.text.files import read_json_object

    path = folder / "generation_config.json"
    config = read_json_object(path)
    values = {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None}
    if config.get("do_sample") is True:
        values.setdefault("temperature", 1.0)
    elif config.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values)
    except UsageError as error:
        raise CorruptCheckpoint(f"{path}: {error}") from None
    return values
