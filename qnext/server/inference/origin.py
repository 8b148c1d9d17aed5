"""What an answer came from beside its prompt: enough to compute it again, and none of its content. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnext.engine import SamplingParams

# Numbers of sampling, as a body names them. What can repeat content is named alone, in `also_given`.
_NUMBERS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_tokens", "min_tokens", "n", "ignore_eos"),
)
_LISTS = {
    "stop_token_ids": "stop_token_ids",
    "logit_bias": "logit_bias",
    "allowed_token_ids": "allowed_token_ids",
    "banned_token_ids": "bad_words",
}


@dataclass(frozen=True)
class AnswerOrigin:
    """Short names of model, tokenizer and chat template; the version of qnext; what its bits depend on in the machine;
    options of the server that change answers; short names of adapters by the names that requests use."""

    model: str
    tokenizer: str | None
    template: str | None
    version: str
    arithmetic: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)

    def of(self, adapter: str | None) -> dict[str, Any]:
        """That of answers of one adapter, or of the model itself."""
        values = asdict(self)
        del values["adapters"]
        return {**values, "adapter": None if adapter is None else self.adapters[adapter]}

    @cached_property
    def fingerprints(self) -> dict[str | None, str]:
        """One short name for all of it, by adapter, which answers carry as `system_fingerprint`."""
        return {adapter: fingerprint_of(self.of(adapter)) for adapter in (None, *self.adapters)}


def fingerprint_of(origin: Mapping[str, Any]) -> str:
    values = {name: value for name, value in origin.items() if value}
    return f"fp_{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]}"


def replay_of(params: SamplingParams, seeds: Sequence[int]) -> dict[str, Any]:
    """Parameters of a body that repeat an answer, with the seeds that were drawn, one for each prompt.

    `also_given` names fields of the body that the caller has to repeat himself: they may hold content.
    """
    replay: dict[str, Any] = {name: getattr(params, name) for name in _NUMBERS}
    replay["watermark"] = None if params.watermark is None else params.watermark.name
    replay["seeds"] = list(seeds)
    replay["also_given"] = [field_name for name, field_name in _LISTS.items() if getattr(params, name)]
    return replay


def body_of(trace: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a request needs beside its own content, from what the audit log has of it."""
    body = {name: trace[name] for name in _NUMBERS if name in trace} | {"seed": trace["seeds"][0]}
    return body | ({"watermark": True} if trace.get("watermark") else {})
