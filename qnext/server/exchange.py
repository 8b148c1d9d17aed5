"""The argument of a handler: one request, and the server that answers it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

import orjson

from qnext.server.errors import ApiError
from qnext.server.inference.generation import Generation, TokenPrompt
from qnext.server.inference.origin import replay_of
from qnext.server.lanes import LARGE
from qnext.server.moderation.judgement import JudgedStage, ModerationQuestion, TextJudgement
from qnext.server.requests import HttpRequest
from qnext.server.server import IGNORED_HEADER, Server

if TYPE_CHECKING:
    from qnext.engine import SamplingParams

Result = TypeVar("Result")
_HEADER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_NO_NAME = "a-field-of-another-name"  # stands for all that a header cannot hold
_MANY_TOKENS = 1_024
_MAX_IGNORED = 24  # names in one answer


@dataclass(eq=False, kw_only=True)
class Exchange(HttpRequest):
    """A request with the server that answers it. This is the argument of a handler."""

    server: Server

    async def aside(self, function: Callable[[], Result]) -> Result:
        """The result of `function`, computed here for a small body and in a thread for a large one."""
        if self.is_small:
            return function()
        return await self.server.parsing.run(self.payer, function)

    @property
    def is_long(self) -> bool:
        """Whether writing the request, or all its answers, as JSON takes long."""
        return self.num_held > LARGE or sum(each.num_tokens for each in self.generations) > _MANY_TOKENS

    async def written(self, make: Callable[[], Result]) -> Result:
        """The result of `make`, computed here, or in a thread where the request or its answer is long."""
        return await self.server.writing.run(self.payer, make) if self.is_long else make()

    def ignore(self, name: str) -> None:
        """Name a field without effect to the client in a header, and log it the first time."""
        if not _HEADER_NAME.fullmatch(name):
            name = _NO_NAME
        names = [known for known in self.reply_headers.get(IGNORED_HEADER, "").split(", ") if known]
        if name not in names and len(names) < _MAX_IGNORED:
            self.reply_headers[IGNORED_HEADER] = ", ".join([*names, name])
        self.server.note_ignored(self.route.path, name)

    @property
    def model_name(self) -> str:
        """The name of the model, or of the adapter, that answers."""
        return self.outcome.model or self.server.served.name

    @property
    def adapter(self) -> str | None:
        return self.model_name if self.model_name in self.server.served.adapters else None

    @property
    def system_fingerprint(self) -> str | None:
        """One name for all that the answer depends on beside the request; None where the model has no origin."""
        origin = self.server.served.origin
        return None if origin is None else origin.fingerprints[self.adapter]

    def _note_origin(self, generation: Generation) -> None:
        """What the audit log needs to trace the answers of a generation, if it has begun."""
        origin, requests = self.server.served.origin, generation.requests
        if origin is None or not requests:
            return
        trace = self.outcome.trace or {**origin.of(self.adapter), **replay_of(generation.params, [])}
        trace["seeds"].append(requests[0].seed)
        self.outcome.trace, self.outcome.system_fingerprint = trace, self.system_fingerprint

    async def judge(
        self,
        stage: JudgedStage,
        texts: Sequence[str],
        kinds: Sequence[str],
        *,
        previous: str = "",
        is_last: bool = True,
    ) -> TextJudgement | None:
        """What the operator's moderation says of texts; None where they pass unjudged. Raises ApiError 503."""
        moderator = self.server.moderator
        assert moderator is not None
        key_id = None if self.key is None else self.key.id
        about = (self.request_id, self.model_name, key_id, previous, is_last)
        try:
            judgement = await moderator.judge(ModerationQuestion(stage, tuple(texts), tuple(kinds), *about))
        except ApiError:
            self.outcome.moderation = "failed"
            raise
        self.outcome.note_judgement(judgement)
        return judgement

    def salt(self, wanted: str | None = None) -> str:
        """The salt of this request's cached prefixes. Each key has its own salt; `wanted` divides it further."""
        own = "" if self.key is None else self.server.keys.cache_salt(self.key)
        if wanted is None:
            return own
        return hashlib.sha256(f"{own}:{wanted}".encode("utf-8", "surrogatepass")).hexdigest()

    @asynccontextmanager
    async def generate(
        self, prompt: TokenPrompt, *, salt: str | None = None, index: int = 0
    ) -> AsyncIterator[Generation]:
        """A generation in the engine's queue, within the key's limits. Leaving the context ends it.

        Raises ApiError where the request is refused.
        """
        outcome = self.outcome
        outcome.prompt_tokens = (outcome.prompt_tokens or 0) + len(prompt.ids)
        outcome.params_hash = params_hash(prompt.params)
        name = f"{self.request_id}-{index}"
        salt = self.salt(salt)
        adapter = self.adapter
        if self.system_fingerprint is not None:
            self.reply_headers["X-System-Fingerprint"] = self.system_fingerprint
        generation = Generation(
            self.server.worker, prompt, owner=self.owner, salt=salt, request_id=name, adapter=adapter
        )
        self.generations.append(generation)
        with self.server.admission(self, len(prompt.ids)) as admitted:
            try:
                async with generation:
                    yield generation
            finally:
                tokens = sum(len(request.output_ids) for request in generation.requests)
                outcome.completion_tokens = (outcome.completion_tokens or 0) + tokens
                admitted.num_output = tokens
                self._note_origin(generation)
                if not generation.has_ended:
                    outcome.abort_phase = generation.phase
                    self.server.counters.count_abort(generation.phase)


def params_hash(params: SamplingParams) -> str:
    """A short name of sampling parameters. Equal parameters have equal names."""
    values = asdict(params)
    values["logit_bias"] = sorted(params.logit_bias.items())
    del values["watermark"]
    if params.watermark is not None:
        values["watermark"] = params.watermark.name
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_NON_STR_KEYS)).hexdigest()[:16]
