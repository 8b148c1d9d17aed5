"""Fields of requests that other servers know and this one does not: refused, or without effect and named to the client.

docs/guide/fields.md is made from these tables. A field that neither a body's model nor a table has is passed over
and named likewise. Values that ask for nothing (`neutral`) are passed over without a word, as null is everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from pydantic import BaseModel

from qnext.server.errors import ApiError


class Foreign(NamedTuple):
    """A field. `why` ends the sentence "without effect: ..." or "refused: ..."."""

    why: str
    neutral: tuple[Any, ...] = ()


_MAX_LOOKED_AT = 256  # unknown fields of one body
_KEPT = Foreign("nothing is kept", (False,))
_NAMES = Foreign("nobody is told apart by it")
_TIER = Foreign("there is one tier", ("auto", "default", "standard_only", "standard"))
_CACHED = Foreign("prefixes are cached anyway")
_HARMLESS = Foreign("nothing here depends on it")
_OBFUSCATION = Foreign("nothing is added to a stream", (False,))

_OPENAI: dict[str, Foreign] = {
    "user": _NAMES,
    "safety_identifier": _NAMES,
    "service_tier": _TIER,
    "prompt_cache_key": _CACHED,
    "prompt_cache_retention": _CACHED,
    "prompt_cache_options": _CACHED,
    "moderation": Foreign("nothing is judged"),
    "store": _KEPT,
}
# Parameters of vLLM and llama.cpp.
_SAMPLERS: dict[str, Foreign] = {
    "length_penalty": Foreign("for beams alone", (1, 1.0)),
    "skip_special_tokens": Foreign("always so", (True,)),
    "spaces_between_special_tokens": Foreign("the text is as it is", (True, False)),
    "include_reasoning": Foreign("thoughts are always apart", (True,)),
    "separate_reasoning": Foreign("thoughts are always apart", (True,)),
    "priority": Foreign("first come, first served", (0,)),
    "request_id": Foreign("X-Request-Id is read"),
    "mm_processor_kwargs": _HARMLESS,
    "kv_transfer_params": _HARMLESS,
    "vllm_xargs": _HARMLESS,
    "guided_decoding_backend": Foreign("there is one"),
    "guided_whitespace_pattern": Foreign("the usual one holds"),
    "add_special_tokens": Foreign("the family has none to add", (True, False)),
    "typical_p": Foreign("not among the samplers", (1, 1.0)),
    "tfs_z": Foreign("not among the samplers", (1, 1.0)),
    "mirostat": Foreign("not among the samplers", (0,)),
    "mirostat_tau": Foreign("not among the samplers"),
    "mirostat_eta": Foreign("not among the samplers"),
    "dynatemp_range": Foreign("not among the samplers", (0, 0.0)),
    "dynatemp_exponent": Foreign("not among the samplers", (1, 1.0)),
    "xtc_probability": Foreign("not among the samplers", (0, 0.0)),
    "xtc_threshold": Foreign("not among the samplers"),
    "top_n_sigma": Foreign("not among the samplers", (-1, -1.0, 0)),
    "dry_base": Foreign("not among the samplers"),
    "dry_multiplier": Foreign("not among the samplers", (0, 0.0)),
    "dry_allowed_length": Foreign("not among the samplers"),
    "dry_penalty_last_n": Foreign("not among the samplers"),
    "dry_sequence_breakers": Foreign("not among the samplers"),
    "samplers": Foreign("their order is fixed"),
    "repeat_last_n": Foreign("penalties look at the whole answer"),
    "penalize_nl": Foreign("as any token", (True,)),
    "cache_prompt": Foreign("prefixes are cached anyway", (True,)),
    "id_slot": Foreign("slots are not chosen", (-1,)),
    "n_keep": Foreign("nothing is shifted out", (0, -1)),
    "n_probs": Foreign("logprobs does this", (0,)),
    "post_sampling_probs": Foreign("of raw logits alone", (False,)),
    "timings_per_token": Foreign("timings stand at the end", (False,)),
    "reasoning_format": Foreign("thoughts are always apart", ("auto", "deepseek")),
    "parse_tool_calls": Foreign("always so", (True,)),
    "return_progress": _HARMLESS,
}
_ANTHROPIC: dict[str, Foreign] = {
    "metadata": _NAMES,
    "cache_control": _CACHED,
    "service_tier": _TIER,
    "container": Foreign("nothing is run here"),
    "speed": Foreign("there is one speed", ("standard",)),
    "inference_geo": Foreign("it runs where it runs"),
    "context_management": Foreign("nothing is cut: what is too long is refused"),
    "diagnostics": _HARMLESS,
    "betas": _HARMLESS,
    "anthropic_version": _HARMLESS,
    "anthropic_beta": _HARMLESS,
    "user_profile_id": _NAMES,
    "workspace_id": _NAMES,
    "thinking.display": Foreign("thoughts are shown as they are", ("summarized",)),
}

WITHOUT_EFFECT: Mapping[str, Mapping[str, Foreign]] = {
    "/v1/chat/completions": {
        **_OPENAI,
        **_SAMPLERS,
        "metadata": _NAMES,
        "prediction": Foreign("drafts are the model's own"),
        "verbosity": Foreign("ask for it in words", ("medium",)),
        "web_search_options": Foreign("nothing is searched"),
        "modalities": Foreign("text alone", (["text"],)),
        "stream_options.include_obfuscation": _OBFUSCATION,
    },
    "/v1/completions": {**_OPENAI, **_SAMPLERS, "metadata": _NAMES},
    "/v1/responses": {
        **_OPENAI,
        "priority": _SAMPLERS["priority"],
        "text.verbosity": Foreign("ask for it in words", ("medium",)),
        "truncation": Foreign("nothing is cut: what is too long is refused", ("disabled",)),
        "max_tool_calls": Foreign("no tool is run here"),
        "client_metadata": _NAMES,
        "context_management": Foreign("nothing is cut: what is too long is refused"),
        "include": Foreign("of a response, log-probabilities alone", ([], ["message.output_text.logprobs"])),
        "stream_options": Foreign("usage is always there", ({}, {"include_obfuscation": False})),
        "reasoning.summary": Foreign("thoughts are shown as they are", ("auto",)),
    },
    "/v1/messages": {**_ANTHROPIC, "priority": _SAMPLERS["priority"]},
    "/v1/messages/count_tokens": _ANTHROPIC,
}
_FOR_SAMPLING: dict[str, Foreign] = {
    "use_beam_search": Foreign("answers are sampled", (False,)),
    "include_stop_str_in_output": Foreign("an answer ends before its stop string", (False,)),
    "truncate_prompt_tokens": Foreign("a prompt is never cut"),
    "logits_processors": Foreign("they are code"),
    "n_predict": Foreign("the field is max_tokens"),
    "max_new_tokens": Foreign("the field is max_tokens"),
    "max_length": Foreign("the field is max_tokens"),
    "num_predict": Foreign("the field is max_tokens"),
    "ebnf": Foreign("the field is grammar"),
    "structural_tag": Foreign("only whole answers have a form"),
    "structured_outputs.structural_tag": Foreign("only whole answers have a form"),
}
# Of vLLM's on surfaces that are not OpenAI's older ones: what would be read in another way than the client means.
_ELSEWHERE: dict[str, Foreign] = {
    name: _FOR_SAMPLING[name] for name in ("truncate_prompt_tokens", "logits_processors", "use_beam_search")
}
REFUSED: Mapping[str, Mapping[str, Foreign]] = {
    "/v1/chat/completions": {
        **_FOR_SAMPLING,
        "audio": Foreign("this model writes text only"),
        "echo": Foreign("of completions", (False,)),
    },
    "/v1/completions": _FOR_SAMPLING,
    "/v1/responses": _ELSEWHERE,
    "/v1/messages": _ELSEWHERE,
    "/v1/messages/count_tokens": {"truncate_prompt_tokens": _FOR_SAMPLING["truncate_prompt_tokens"]},
    "/tokenize": {"truncate_prompt_tokens": _FOR_SAMPLING["truncate_prompt_tokens"]},
}


def review(path: str, body: BaseModel, note: Callable[[str], None]) -> None:
    """Tell `note` of each field without effect. Raises ApiError 400 for one that is refused."""
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
    """Fields that no model has, of the body and of its objects of options, these with a dot in their names."""
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
