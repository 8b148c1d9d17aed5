"""What all request bodies share: strict values, and the parameters of sampling. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from qnext.engine.policy.params import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TOKENS,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from qnext.server.errors import ApiError
from qnext.server.limits import (
    MAX_BAD_WORDS,
    MAX_LISTED_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TEMPLATE_ARGUMENTS,
)
from qnext.text.thinking import TemplateRequest


class Body(BaseModel):
    """Strict: no text for a number, and no infinite number. Unknown keys are ignored, because clients send many.

    Lists whose length a client chooses fail at their first fault. Otherwise a million faults would all be recorded.
    """

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True, protected_namespaces=()
    )


# Of the body itself: what nobody knows is kept, so that the client can be told of it.
KEEPS_UNKNOWN = ConfigDict(extra="allow")
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_LISTED_TOKENS, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)]
# Numbers that reach arithmetic. The engine's own bounds, but for temperatures: OpenAI's, and Anthropic's in its bodies.
MAX_TEMPERATURE = 2.0
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=MAX_TOP_K)]
RepetitionPenalty = Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
TokenCount = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Name = Annotated[str, Field(max_length=256)]
Texts = Annotated[list[str], Field(fail_fast=True)]


def at_most(length: int) -> BeforeValidator:
    """A bound on the size of a dict. It is counted before it is validated, because a dict cannot fail at its first
    fault."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > length:
            raise ValueError(f"more than {length} entries")
        return value

    return BeforeValidator(check)


class Options(Body):
    """An object inside a body, with fields of its own. Its unknown fields are named to the client as well."""

    model_config = KEEPS_UNKNOWN


class StreamOptions(Options):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage so far in every chunk
    include_obfuscation: bool | None = None

    @property
    def is_continuous(self) -> bool:
        return bool(self.include_usage and self.continuous_usage_stats)


class StructuredOutputs(Options):
    """The constraint of an answer, at most one."""

    json_: Any = Field(default=None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ThoughtBody(Options):
    """Anthropic's switch for thoughts, which other APIs adopted."""

    type: Literal["enabled", "disabled", "adaptive", "auto", "between_tools"]
    budget_tokens: TokenCount | None = None
    display: Annotated[str, Field(max_length=64)] | None = None

    @property
    def is_wanted(self) -> bool | None:
        return {"enabled": True, "disabled": False}.get(self.type)


class TemplateBody(Body):
    """The fields for the chat template, which all surfaces have."""

    chat_template_kwargs: Annotated[dict[str, Any], at_most(MAX_TEMPLATE_ARGUMENTS)] | None = None
    enable_thinking: bool | None = None
    chat_template: Any = None  # refused: a template is code

    def asked(
        self, *, thinks: bool | None = None, effort: str | None = None, budget: int | None = None
    ) -> TemplateRequest:
        """What the request asks of the template. `thinks`, `effort` and `budget` come from the surface's own fields.

        Raises ApiError 400 for a template in the request.
        """
        if self.chat_template is not None:
            raise ApiError.bad("a chat template in a request is not accepted: it is code", param="chat_template")
        thinks = self.enable_thinking if self.enable_thinking is not None else thinks
        return TemplateRequest(self.chat_template_kwargs or {}, thinks, effort, budget)


class SamplingBody(Body):
    """Parameters of sampling under the names that clients use. None means the model's default."""

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    repeat_penalty: RepetitionPenalty | None = None  # llama.cpp's name
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Int64 | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    stop: StopText | Stops | None = None
    stop_in_reasoning: bool | None = None  # true: stop strings end the thought of a chat answer too
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: TokenCount | None = None
    logit_bias: Annotated[dict[str, Bias], at_most(MAX_LISTED_TOKENS)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Annotated[list[StopText], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Logprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: Any = None  # llama.cpp's and SGLang's
    regex: str | None = None  # SGLang's
    cache_salt: Name | None = None
    watermark: bool | None = None  # whether the answer is marked; see docs/guide/watermark.md
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    timings: bool | None = None  # how long queue, prompt and answer took, with the answer
    chat_template: Any = None  # refused: a template is code
    prompt_embeds: Any = None  # refused
