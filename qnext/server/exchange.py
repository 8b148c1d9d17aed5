"""One request on its way through the server: who asks, what was asked, what became of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from qnext.server.generation import Generation
from qnext.server.lanes import LARGE, Asker
from qnext.server.rates import network_of

if TYPE_CHECKING:
    from qnext.engine import SamplingParams
    from qnext.engine.request import Guide
    from qnext.server.app import Server
    from qnext.server.keys import Key
    from qnext.server.routes import Route

Result = TypeVar("Result")
IGNORED_HEADER = "X-Qnext-Ignored"
_HEADER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_NO_NAME = "a-field-of-another-name"  # stands for all that a header cannot hold
_MANY_TOKENS = 1_024
_MAX_IGNORED = 24  # names in one answer


@dataclass(eq=False)
class Outcome:
    """What the audit log says of a request beside who and when; no content."""

    model: str | None = None
    params_hash: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    abort_phase: str | None = None
    error_code: str | None = None
    stream: bool = False
    status: int = 0


@dataclass(eq=False)
class Exchange:
    """A request and its outcome. `key` is None where the server has no keys, and on public routes."""

    server: Server
    route: Route
    request_id: str
    headers: Mapping[str, str]  # lower case; of several with one name the first
    path_params: Mapping[str, str]
    client: str
    key: Key | None = None
    claimed: Key | None = None  # an expired or revoked one that it came with
    body: Any = None
    outcome: Outcome = field(default_factory=Outcome)
    reply_headers: dict[str, str] = field(default_factory=dict)
    generations: list[Generation] = field(default_factory=list)  # that it has begun
    is_replying: bool = False
    write_began: float | None = None  # on the event loop's clock, while a write waits for the client
    is_parked: bool = False  # its generations rest until that write is over
    num_held: int = 0  # bytes of its body, as far as it is read
    is_small: bool = True  # whether nothing takes long that is done once for each part of the body

    @property
    def owner(self) -> str:
        """Whose share of queue and rates it takes."""
        return "" if self.key is None else self.key.id

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and answer that its key may use, where that is bounded."""
        return None if self.key is None else self.key.max_context

    def rest(self, *, is_parked: bool) -> None:
        """Have what this request generates give up its seats while its client does not read, or go on."""
        if is_parked != self.is_parked:
            self.is_parked = is_parked
            for generation in self.generations:
                generation.rest(is_parked=is_parked)

    @property
    def payer(self) -> str:
        """Who waits for others of his own: the key, or the address where there are no keys."""
        return f"key {self.key.id}" if self.key is not None else network_of(self.client)

    @property
    def asker(self) -> Asker:
        return Asker(self.payer, self.num_held)

    async def aside(self, function: Callable[[], Result]) -> Result:
        """`function` here where the body is small, in a thread where its time could grow with the body."""
        if self.is_small:
            return function()
        return await self.server.parsing.run(self.payer, function)

    @property
    def is_long(self) -> bool:
        """Whether what repeats the request, or its whole answer, takes long to write."""
        return self.num_held > LARGE or sum(each.num_tokens for each in self.generations) > _MANY_TOKENS

    async def written(self, make: Callable[[], Result]) -> Result:
        """What `make` gives: here, or in a thread where the request or its answer is long."""
        return await self.server.writing.run(self.payer, make) if self.is_long else make()

    def ignore(self, name: str) -> None:
        """Tell the client, in a header, of something that it sent and that has no effect; the log once."""
        if not _HEADER_NAME.fullmatch(name):
            name = _NO_NAME
        names = [known for known in self.reply_headers.get(IGNORED_HEADER, "").split(", ") if known]
        if name not in names and len(names) < _MAX_IGNORED:
            self.reply_headers[IGNORED_HEADER] = ", ".join([*names, name])
        self.server.note_ignored(self.route.path, name)

    def salt(self, wanted: str | None = None) -> str:
        """Only requests of one salt share cached prefixes: each key has its own, and may divide it further."""
        own = "" if self.key is None else self.server.keys.cache_salt(self.key)
        if wanted is None:
            return own
        return hashlib.sha256(f"{own}:{wanted}".encode("utf-8", "surrogatepass")).hexdigest()

    @asynccontextmanager
    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        guide: Guide | None = None,
        salt: str | None = None,
        index: int = 0,
    ) -> AsyncIterator[Generation]:
        """A generation in the engine's queue, within the key's limits; leaving the context ends it.

        Raises ApiError where it is refused.
        """
        outcome = self.outcome
        outcome.prompt_tokens = (outcome.prompt_tokens or 0) + len(prompt_ids)
        outcome.params_hash = params_hash(params)
        generation = Generation(
            self.server.worker, prompt_ids, params, owner=self.owner, salt=self.salt(salt), guide=guide,
            request_id=f"{self.request_id}-{index}",
        )  # fmt: skip
        self.generations.append(generation)
        with self.server.admission(self, len(prompt_ids)) as admitted:
            try:
                async with generation:
                    yield generation
            finally:
                tokens = sum(len(request.output_ids) for request in generation.requests)
                outcome.completion_tokens = (outcome.completion_tokens or 0) + tokens
                admitted.num_output = tokens
                if not generation.has_ended:
                    outcome.abort_phase = generation.phase
                    self.server.counters.count_abort(generation.phase)


def params_hash(params: SamplingParams) -> str:
    """A short name of sampling parameters, equal for equal ones."""
    values = asdict(params)
    values["logit_bias"] = sorted(params.logit_bias.items())
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_NON_STR_KEYS)).hexdigest()[:16]
