"""The sampling parameters of a body as those of the engine, checked against the served model."""

from __future__ import annotations

from typing import Any, NamedTuple

from qnext.engine.policy.params import SamplingParams
from qnext.engine.sampling.constraint import Constraint
from qnext.errors import QnextError
from qnext.server.body.strict import SamplingBody
from qnext.server.errors import ApiError, from_user_error
from qnext.server.exchange import Exchange
from qnext.server.inference.served import ServedModel
from qnext.server.limits import MAX_PROMPT_LOGPROB_TOKENS, Limits

_GUIDED = {"json_schema": "guided_json", "regex": "guided_regex", "choice": "guided_choice", "lark": "guided_grammar"}
_PLAIN = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "min_tokens")


class AnswerOptions(NamedTuple):
    """Options of an answer that each surface has under its own names. Log-probabilities are as in `SamplingParams`.

    `default_max_tokens` applies where there is no `max_tokens`. `param` is the field of the prompt, for errors.
    """

    max_tokens: int | None = None
    default_max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    param: str = "messages"


def sampling_params(exchange: Exchange, body: SamplingBody, num_prompt: int, options: AnswerOptions) -> SamplingParams:
    """The values of the request, then the model's defaults, then OpenAI's. Raises ApiError 400, naming the field.

    A `max_tokens` beyond the context means as many tokens as fit, because clients send large values for every model. A
    prompt that leaves no room for one token is refused, with both numbers. A key may have less of the context, for
    prompt and answer together; a `max_tokens` beyond that is refused.
    """
    served = exchange.server.served
    _refuse_foreign(body)
    if exchange.server.moderator is not None:
        _refuse_tokens(body, options)
    room = _room(exchange, num_prompt, options)
    num_answers = _num_answers(body, exchange.server.limits)
    wanted = options.max_tokens if options.max_tokens is not None else options.default_max_tokens
    most = room if wanted is None else min(room, wanted)
    if (body.min_tokens or 0) > most:
        raise ApiError.bad(f"min_tokens must be at most max_tokens, here {most}", param="min_tokens")
    stop_ids = tuple(body.stop_token_ids or ())
    served.check_ids(stop_ids, param="stop_token_ids")
    allowed = body.allowed_token_ids
    served.check_ids(allowed or (), param="allowed_token_ids")
    try:
        params = SamplingParams(
            **_values(body, served),
            n=num_answers,
            max_tokens=most,
            stop_token_ids=stop_ids,
            ignore_eos=bool(body.ignore_eos),
            logit_bias=_bias(body, served),
            allowed_token_ids=None if allowed is None else tuple(allowed),
            banned_token_ids=_banned(body, served),
            logprobs=options.logprobs,
            prompt_logprobs=options.prompt_logprobs,
            watermark=served.marking.of(body.watermark),
        )
        ends = frozenset(stop_ids) | (frozenset() if params.ignore_eos else served.eos_ids)
        params.check_vocabulary(vocab_size=served.vocab_size, stop_ids=ends)
    except QnextError as error:
        raise from_user_error(error) from None
    return params


def _room(exchange: Exchange, num_prompt: int, options: AnswerOptions) -> int:
    """Tokens that are left for the answer, at least one. Raises ApiError 400 for prompts that are too long."""
    served = exchange.server.served
    room = served.max_model_len - num_prompt
    if room < 1:
        raise ApiError.too_long(num_prompt, served.max_model_len - 1, param=options.param)
    if exchange.max_context is not None:
        room = min(room, _room_of_key(exchange.max_context, num_prompt, options))
    if options.prompt_logprobs is not None and num_prompt > MAX_PROMPT_LOGPROB_TOKENS:
        raise ApiError.bad(
            f"log-probabilities are given for prompts of at most {MAX_PROMPT_LOGPROB_TOKENS} tokens", param="logprobs"
        )
    return room


def _num_answers(body: SamplingBody, limits: Limits) -> int:
    number = body.n or 1
    if number > limits.max_n:
        raise ApiError.bad(f"n must be at most {limits.max_n}", param="n")
    if body.best_of not in (None, number):
        raise ApiError.bad("best_of must equal n", param="best_of")
    return number


def _values(body: SamplingBody, served: ServedModel) -> dict[str, Any]:
    """Parameters that need no look at the vocabulary, by their names in SamplingParams."""
    values: dict[str, Any] = dict(served.defaults)
    values |= {name: value for name in _PLAIN if (value := getattr(body, name)) is not None}
    penalty = body.repetition_penalty if body.repetition_penalty is not None else body.repeat_penalty
    if penalty is not None:
        values["repetition_penalty"] = penalty
    return values


def _room_of_key(max_context: int, num_prompt: int, options: AnswerOptions) -> int:
    """Tokens that the key leaves for the answer. Raises ApiError 400 for none, or for fewer than asked for."""
    room = max_context - num_prompt
    if room < 1:
        raise ApiError.bad(
            f"prompt is too long: {num_prompt} tokens > {max_context - 1} maximum of this key",
            param=options.param,
            code="context_length_exceeded",
        )
    max_tokens = options.max_tokens
    if max_tokens is not None and max_tokens > room:
        raise ApiError.bad(
            f"this key may use {max_context} tokens for prompt and answer: max_tokens must be at most {room} here, not "
            f"{max_tokens}",
            param="max_tokens",
        )
    return room


def stop_strings(body: SamplingBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def structured_constraint(body: SamplingBody) -> tuple[Constraint, str] | None:
    """(constraint, its field) of vLLM's and llama.cpp's fields. Raises ApiError for more than one constraint."""
    found: list[tuple[Constraint, str]] = []
    inner = body.structured_outputs
    named = {
        "structured_outputs": (inner.json_, inner.regex, inner.choice, inner.grammar) if inner else (),
        "json_schema": (body.json_schema, body.regex),  # of llama.cpp and SGLang
        "guided_json": (body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar),
        "grammar": (None, None, None, body.grammar),  # llama.cpp's
    }
    for field, values in named.items():
        for kind, value in zip(("json_schema", "regex", "choice", "lark"), values, strict=False):
            if value is None:
                continue
            if kind == "json_schema" and not isinstance(value, (dict, bool, str)):
                raise ApiError.bad("the JSON schema must be an object", param=field)
            name = _GUIDED[kind] if field == "guided_json" else kind if field == "json_schema" else field
            found.append((Constraint(kind, tuple(value) if kind == "choice" else value), name))  # type: ignore[arg-type]
    if inner is not None and inner.json_object:
        found.append((Constraint("json_object"), "structured_outputs"))
    if len(found) > 1:
        raise ApiError.bad("an answer can follow one constraint only", param=found[1][1])
    return found[0] if found else None


def _refuse_foreign(body: SamplingBody) -> None:
    if body.chat_template is not None:
        raise ApiError.bad("a chat template in a request is not accepted", param="chat_template")
    if body.prompt_embeds is not None:
        raise ApiError.bad("prompts are text or token ids", param="prompt_embeds")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError.bad("log-probabilities of the prompt are not streamed", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError.bad("stream_options needs stream", param="stream_options")


def _refuse_tokens(body: SamplingBody, options: AnswerOptions) -> None:
    """Where answers are held back until they are judged, tokens would tell what they say."""
    for name, is_wanted in (("logprobs", options.logprobs is not None), ("return_token_ids", body.return_token_ids)):
        if is_wanted:
            raise ApiError.bad("this server moderates answers and does not tell their tokens", param=name)


def _bias(body: SamplingBody, served: ServedModel) -> dict[int, float]:
    bias: dict[int, float] = {}
    for name, value in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise ApiError.bad("the keys of logit_bias must be token ids", param="logit_bias")
        bias[int(name)] = value
    served.check_ids(list(bias), param="logit_bias")
    return bias


def _banned(body: SamplingBody, served: ServedModel) -> tuple[int, ...]:
    """The tokens of the bad words, alone and after a space. Raises ApiError 400 for a word of several tokens."""
    banned: set[int] = set()
    for word in body.bad_words or ():
        forms = [ids for text in (word, f" {word}") if len(ids := served.tokenizer.encode(text)) == 1]
        if not forms:
            raise ApiError.bad("a bad word must be one token of the vocabulary", param="bad_words")
        banned.update(ids[0] for ids in forms)
    return tuple(sorted(banned))
