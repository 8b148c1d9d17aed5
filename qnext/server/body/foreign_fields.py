"""Fields that other servers have and this one does not: refused, or without effect and then named to the client.

docs/guide/fields.md is made from these tables. A field that is neither in a body's model nor in a table has no effect
either. A `neutral` value asks for nothing: it is ignored silently, as null is everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from pydantic import BaseModel

from qnext.server.errors import ApiError


class Foreign(NamedTuple):
    """A field. `why` is the reason in docs/guide/fields.md, and in the error "NAME is not served: ..."."""

    why: str
    neutral: tuple[Any, ...] = ()


_MAX_LOOKED_AT = 256  # unknown fields of one body
_KEPT = Foreign("the server stores nothing", (False,))
_NAMES = Foreign("the server distinguishes clients only by their key")
_TIER = Foreign("there is only one service tier", ("auto", "default", "standard_only", "standard"))
_CACHED = Foreign("prefixes are always cached")
_HARMLESS = Foreign("nothing in this server depends on it")
_OBFUSCATION = Foreign("the server adds nothing to a stream", (False,))

_OPENAI: dict[str, Foreign] = {
    "user": _NAMES,
    "safety_identifier": _NAMES,
    "service_tier": _TIER,
    "prompt_cache_key": _CACHED,
    "prompt_cache_retention": _CACHED,
    "prompt_cache_options": _CACHED,
    "moderation": Foreign("the server does not moderate"),
    "store": _KEPT,
}
# Parameters of vLLM and llama.cpp.
_SAMPLERS: dict[str, Foreign] = {
    "length_penalty": Foreign("it concerns only beam search", (1, 1.0)),
    "skip_special_tokens": Foreign("the server always does this", (True,)),
    "spaces_between_special_tokens": Foreign("the text is returned as the model wrote it", (True, False)),
    "include_reasoning": Foreign("thoughts are always returned separately", (True,)),
    "separate_reasoning": Foreign("thoughts are always returned separately", (True,)),
    "priority": Foreign("requests are served in the order of arrival", (0,)),
    "request_id": Foreign("the header X-Request-Id sets the id"),
    "mm_processor_kwargs": _HARMLESS,
    "kv_transfer_params": _HARMLESS,
    "vllm_xargs": _HARMLESS,
    "guided_decoding_backend": Foreign("there is only one backend"),
    "guided_whitespace_pattern": Foreign("the usual pattern applies"),
    "add_special_tokens": Foreign("these models add no special tokens", (True, False)),
    "typical_p": Foreign("this sampler does not exist here", (1, 1.0)),
    "tfs_z": Foreign("this sampler does not exist here", (1, 1.0)),
    "mirostat": Foreign("this sampler does not exist here", (0,)),
    "mirostat_tau": Foreign("this sampler does not exist here"),
    "mirostat_eta": Foreign("this sampler does not exist here"),
    "dynatemp_range": Foreign("this sampler does not exist here", (0, 0.0)),
    "dynatemp_exponent": Foreign("this sampler does not exist here", (1, 1.0)),
    "xtc_probability": Foreign("this sampler does not exist here", (0, 0.0)),
    "xtc_threshold": Foreign("this sampler does not exist here"),
    "top_n_sigma": Foreign("this sampler does not exist here", (-1, -1.0, 0)),
    "dry_base": Foreign("this sampler does not exist here"),
    "dry_multiplier": Foreign("this sampler does not exist here", (0, 0.0)),
    "dry_allowed_length": Foreign("this sampler does not exist here"),
    "dry_penalty_last_n": Foreign("this sampler does not exist here"),
    "dry_sequence_breakers": Foreign("this sampler does not exist here"),
    "samplers": Foreign("the order of the samplers is fixed"),
    "repeat_last_n": Foreign("penalties count all tokens"),
    "penalize_nl": Foreign("newlines are penalised like other tokens", (True,)),
    "cache_prompt": Foreign("prefixes are always cached", (True,)),
    "id_slot": Foreign("clients cannot choose a slot", (-1,)),
    "n_keep": Foreign("no tokens are shifted out of the context", (0, -1)),
    "n_probs": Foreign("use logprobs instead", (0,)),
    "post_sampling_probs": Foreign("log-probabilities are those of the raw logits", (False,)),
    "timings_per_token": Foreign("timings come at the end of the answer", (False,)),
    "reasoning_format": Foreign("thoughts are always returned separately", ("auto", "deepseek")),
    "parse_tool_calls": Foreign("the server always does this", (True,)),
    "return_progress": _HARMLESS,
}
_ANTHROPIC: dict[str, Foreign] = {
    "metadata": _NAMES,
    "cache_control": _CACHED,
    "service_tier": _TIER,
    "container": Foreign("the server runs no code"),
    "speed": Foreign("there is only one speed", ("standard",)),
    "inference_geo": Foreign("the location of the server is fixed"),
    "context_management": Foreign("no prompt is cut; one that is too long is refused"),
    "diagnostics": _HARMLESS,
    "betas": _HARMLESS,
    "anthropic_version": _HARMLESS,
    "anthropic_beta": _HARMLESS,
    "user_profile_id": _NAMES,
    "workspace_id": _NAMES,
    "thinking.display": Foreign("thoughts are returned as the model wrote them", ("summarized",)),
}

WITHOUT_EFFECT: Mapping[str, Mapping[str, Foreign]] = {
    "/v1/chat/completions": {
        **_OPENAI,
        **_SAMPLERS,
        "metadata": _NAMES,
        "prediction": Foreign("the model makes its own drafts"),
        "verbosity": Foreign("ask for it in the prompt", ("medium",)),
        "web_search_options": Foreign("the server does not search"),
        "modalities": Foreign("answers are text only", (["text"],)),
        "stream_options.include_obfuscation": _OBFUSCATION,
    },
    "/v1/completions": {**_OPENAI, **_SAMPLERS, "metadata": _NAMES},
    "/v1/responses": {
        **_OPENAI,
        "priority": _SAMPLERS["priority"],
        "text.verbosity": Foreign("ask for it in the prompt", ("medium",)),
        "truncation": Foreign("no prompt is cut; one that is too long is refused", ("disabled",)),
        "max_tool_calls": Foreign("the server runs no tools"),
        "client_metadata": _NAMES,
        "context_management": Foreign("no prompt is cut; one that is too long is refused"),
        "include": Foreign("only log-probabilities can be included", ([], ["message.output_text.logprobs"])),
        "stream_options": Foreign("usage is always included", ({}, {"include_obfuscation": False})),
        "reasoning.summary": Foreign("thoughts are returned as the model wrote them", ("auto",)),
    },
    "/v1/messages": {**_ANTHROPIC, "priority": _SAMPLERS["priority"]},
    "/v1/messages/count_tokens": _ANTHROPIC,
}
_FOR_SAMPLING: dict[str, Foreign] = {
    "use_beam_search": Foreign("answers are sampled", (False,)),
    "include_stop_str_in_output": Foreign("an answer ends before its stop string", (False,)),
    "truncate_prompt_tokens": Foreign("a prompt is never cut"),
    "logits_processors": Foreign("they are code, which requests may not carry"),
    "n_predict": Foreign("use max_tokens instead"),
    "max_new_tokens": Foreign("use max_tokens instead"),
    "max_length": Foreign("use max_tokens instead"),
    "num_predict": Foreign("use max_tokens instead"),
    "ebnf": Foreign("use grammar instead"),
    "structural_tag": Foreign("a constraint applies only to the whole answer"),
    "structured_outputs.structural_tag": Foreign("a constraint applies only to the whole answer"),
}
# Of vLLM's on surfaces that are not OpenAI's older ones: what would be read in another way than the client means.
_ELSEWHERE: dict[str, Foreign] = {
    name: _FOR_SAMPLING[name] for name in ("truncate_prompt_tokens", "logits_processors", "use_beam_search")
}
REFUSED: Mapping[str, Mapping[str, Foreign]] = {
    "/v1/chat/completions": {
        **_FOR_SAMPLING,
        "audio": Foreign("this model writes text only"),
        "echo": Foreign("only /v1/completions has it", (False,)),
    },
    "/v1/completions": _FOR_SAMPLING,
    "/v1/responses": _ELSEWHERE,
    "/v1/messages": _ELSEWHERE,
    "/v1/messages/count_tokens": {"truncate_prompt_tokens": _FOR_SAMPLING["truncate_prompt_tokens"]},
    "/tokenize": {"truncate_prompt_tokens": _FOR_SAMPLING["truncate_prompt_tokens"]},
}


def review(path: str, body: BaseModel, note: Callable[[str], None]) -> None:
    """Tell `note` of each field without effect. Raises ApiError 400 for a field that is refused."""
    refused, known = REFUSED.get(path, {}), WITHOUT_EFFECT.get(path, {})
    extra = dict(islice(_unknown(body), _MAX_LOOKED_AT))
    for name in refused.keys() & extra.keys():
        if _asks(extra[name], refused[name]):
            raise ApiError.bad(f"{name} is not served: {refused[name].why}", param=name, code="unsupported_parameter")
    for name, value in extra.items():
        if name not in refused and _asks(value, known.get(name, _HARMLESS)):
            note(name)
    for name, value in _declared(body, known):
        if _asks(value, known[name]):
            note(name)


def _unknown(body: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields that no model has, of the body and of its objects of options; names of the latter have a dot."""
    for name, value in (body.model_extra or {}).items():
        yield prefix + name, value
    for name in type(body).model_fields if not prefix else ():
        if isinstance(inner := getattr(body, name), BaseModel):
            yield from _unknown(inner, f"{name}.")


def _declared(body: BaseModel, known: Mapping[str, Foreign]) -> Iterator[tuple[str, Any]]:
    """Fields of the table that the body's model has, and those of its objects, written with a dot."""
    for name in known:
        value: Any = body
        for part in name.split("."):
            if not isinstance(value, BaseModel):
                value = None
            else:
                value = getattr(value, part, None) if part in type(value).model_fields else None
        if value is not None:
            yield name, value


def _asks(value: Any, field: Foreign) -> bool:
    return value is not None and not any(value == neutral and type(value) is type(neutral) for neutral in field.neutral)
