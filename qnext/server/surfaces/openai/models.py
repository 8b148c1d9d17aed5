"""GET /v1/models, and the routes of the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import orjson
from pydantic import Field

from qnext.server.body.strict import KEEPS_UNKNOWN, Body
from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.limits import MAX_MESSAGES
from qnext.server.long_json import LongList
from qnext.server.routes import HttpResponse
from qnext.server.surfaces.dialogue import ChatInput, make_dialogue
from qnext.server.surfaces.openai.chat_bodies import ChatPromptBody, MessageBody, conversation, offer_of
from qnext.text.templates import INSTRUCT_TEMPLATE, THINKING_TEMPLATE
from qnext.text.thinking import KNOWN_ARGUMENTS
from qnext.version import __version__

_OF_CONVERSATIONS = (
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "chat_template",
    "chat_template_kwargs",
    "enable_thinking",
    "reasoning_effort",
    "reasoning",
    "thinking",
    "continue_final_message",
)
_TEMPLATES = {"instruct": INSTRUCT_TEMPLATE, "thinking": THINKING_TEMPLATE}


class TokenizeBody(ChatPromptBody):
    """A text, or a conversation in the model's chat format: its prompt is that of a chat completion."""

    model_config = KEEPS_UNKNOWN

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None  # without effect: the family has none to add
    parse_special: bool | None = None  # false: names of control tokens in the text are text
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model_config = KEEPS_UNKNOWN

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


async def list_models(exchange: Exchange) -> HttpResponse:
    key = exchange.key
    names = [name for name in exchange.server.served.all_names if key is None or key.allows_model(name)]
    return HttpResponse.of({"object": "list", "data": [_model(exchange, name) for name in names]})


async def get_model(exchange: Exchange) -> HttpResponse:
    name = exchange.path_params["model"]
    exchange.server.check_model(exchange, name)
    return HttpResponse.of(_model(exchange, name))


def _model(exchange: Exchange, name: str) -> dict[str, Any]:
    served = exchange.server.served
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "qnext",
        "root": served.name,
        "parent": served.name if name in served.adapters else None,
        "max_model_len": served.max_model_len,
        "chat_template_kwargs": sorted(served.template_arguments),
    }


async def tokenize(exchange: Exchange) -> HttpResponse:
    body: TokenizeBody = exchange.body
    served = exchange.server.served
    exchange.server.check_model(exchange, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError.bad("exactly one of prompt and messages is needed", param="prompt")
    asked = body.template_request()
    if body.messages is not None:
        given = body.messages
        messages, offer = await exchange.aside(
            lambda: (conversation(given, exchange.ignore), offer_of(body, exchange.ignore))
        )
        chat = ChatInput(
            messages,
            replace(offer, is_required=False),
            asked=asked,
            continues=bool(body.continue_final_message),
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        dialogue = await make_dialogue(exchange, chat, is_prompt=False)
        ids = dialogue.prompt_ids
    else:
        for name in _OF_CONVERSATIONS:
            if getattr(body, name) not in (None, False, []):
                raise ApiError.bad(f"{name} needs messages", param=name)
        ids = await served.encode(
            body.prompt or "", asker=exchange.asker, allow_special=body.parse_special is not False, is_prompt=False
        )
    document: dict[str, Any] = {
        "tokens": LongList.of_values(ids),
        "count": len(ids),
        "max_model_len": served.max_model_len,
    }
    if body.return_token_strs:
        document["token_strs"] = LongList(len(ids), lambda i, j: [served.token_text(token) for token in ids[i:j]])
    return HttpResponse.of(document)


async def detokenize(exchange: Exchange) -> HttpResponse:
    body: DetokenizeBody = exchange.body
    served = exchange.server.served
    exchange.server.check_model(exchange, body.model)
    if len(body.tokens) > 8 * served.max_model_len:
        raise ApiError.bad("more tokens than the context can hold", param="tokens", code="context_length_exceeded")

    def work() -> bytes:
        served.check_ids(body.tokens, param="tokens")
        return orjson.dumps({"prompt": served.tokenizer.decode(body.tokens)})

    return HttpResponse(await served.run(work, asker=exchange.asker))


async def tokenizer_info(exchange: Exchange) -> HttpResponse:
    """What evaluation tools need to know about a remote tokenizer."""
    served = exchange.server.served
    chat_format = served.chat_format
    template = None
    if chat_format is not None:
        # Where the format is built in, a template of ours that renders the same.
        template = _TEMPLATES.get(chat_format.name) if chat_format.template is None else chat_format.template.text
    pad = served.tokenizer.pad_id
    return HttpResponse.of(
        {
            "tokenizer_class": "qnext",
            "vocab_size": served.tokenizer.vocab_size,
            "max_model_len": served.max_model_len,
            "eos_token": served.eos_token,
            "bos_token": None,
            "pad_token": None if pad is None else served.token_text(pad),
            "chat_template": None if template is None else template.removesuffix("\n"),  # which some renderers keep
            "chat_format": None if chat_format is None else chat_format.name,
            "chat_template_kwargs": sorted({*served.template_arguments, *KNOWN_ARGUMENTS}) if chat_format else [],
            "thinking": {"by_default": served.is_thinking, "has_switch": served.is_hybrid},
        }
    )


async def version(exchange: Exchange) -> HttpResponse:
    return HttpResponse.of({"version": __version__})
