"""Random requests that come, go, fail, rest and return on engines that are far too small for them."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from same_bits.digests import digest, plain
from same_bits.house import Clock, DraftPins, find, make_engine, rest

import numpy as np

NUM_SCHEDULES = 200
MAX_LEN = 256


class Broken(RuntimeError):
    """What a step fails with."""


@dataclass
class Every:
    """Only tokens of one remainder may follow, another one at each place."""

    vocab_size: int
    num_accepted: int = 0

    def allowed(self) -> Any:
        bits = np.zeros(-(-self.vocab_size // 32), dtype=np.uint32)
        for token in range(self.vocab_size):
            if token % 3 != self.num_accepted % 3 or token == 3:
                bits[token // 32] |= np.uint32(1 << token % 32)
        return bits.view(np.int32)

    def accept(self, token_id: int) -> None:
        self.num_accepted += 1

    def copy(self) -> Every:
        return Every(self.vocab_size, self.num_accepted)


@dataclass
class Traffic:
    """What is asked of an engine. Prompts share beginnings: system prompts, turns of one conversation, repetitions."""

    rng: random.Random
    vocab_size: int
    systems: list[list[int]] = field(default_factory=list)
    history: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.systems = [self.tokens(length) for length in (130, 75, 33)]

    def tokens(self, length: int) -> list[int]:
        return [self.rng.randrange(self.vocab_size) for _ in range(length)]

    def prompt(self) -> list[int]:
        rng, kind = self.rng, self.rng.random()
        if self.history and kind < 0.4:
            base = rng.choice(self.history)
            prompt = base[: rng.randint(1, len(base))] if rng.random() < 0.3 else base + self.tokens(rng.randint(1, 25))
        elif kind < 0.8:
            prompt = rng.choice(self.systems) + self.tokens(rng.randint(1, 40))
        else:
            prompt = self.tokens(rng.randint(1, 120))
        prompt = prompt[: MAX_LEN - 40]
        self.history.append(prompt)
        return prompt

    def params(self) -> dict[str, Any]:
        """Fields of SamplingParams, seldom ones that are refused."""
        rng = self.rng
        params: dict[str, Any] = {
            "max_tokens": rng.randint(1, 30),
            "ignore_eos": rng.random() < 0.6,
            "seed": rng.randrange(1000),
            "temperature": rng.choice((0.0, 0.0, 0.7, 1.0, 1.5)),
            "logprobs": rng.choice((self.vocab_size, self.vocab_size, 0, 3, None)),
            "n": rng.choice((1, 1, 1, 1, 2, 3)),
        }
        seldom: dict[str, Any] = {
            "prompt_logprobs": rng.choice((0, 5)),
            "top_k": rng.choice((1, 5, 40)),
            "top_p": rng.choice((0.5, 0.9)),
            "min_p": rng.choice((0.01, 0.1)),
            "repetition_penalty": rng.choice((0.7, 1.3)),
            "presence_penalty": rng.choice((-0.5, 1.0)),
            "frequency_penalty": rng.choice((-0.5, 1.0)),
            "min_tokens": rng.randint(1, 5),
            "stop_token_ids": (rng.randrange(self.vocab_size), rng.randrange(self.vocab_size)),
            "logit_bias": {rng.randrange(self.vocab_size): rng.choice((-100.0, 2.5)) for _ in range(2)},
            "allowed_token_ids": tuple(sorted(rng.sample(range(self.vocab_size), 4))),
            "banned_token_ids": tuple(rng.sample(range(self.vocab_size), 3)),
        }
        return params | {key: value for key, value in seldom.items() if rng.random() < 0.12}


def options_of(rng: random.Random, config: Any) -> dict[str, Any]:
    """Of an engine with little room. Sizes are all given: none is to depend on the memory of the machine."""
    import torch

    has_layer = config.num_nextn_predict_layers > 0
    speculates = has_layer and rng.random() < 0.8
    options: dict[str, Any] = {
        "max_num_seqs": rng.randint(1, 5),
        "max_model_len": MAX_LEN,
        "num_blocks": rng.randint(17, 40),
        "max_num_batched_tokens": rng.choice((70, 100, 300)),
        "num_checkpoints": rng.randint(1, 8),
        "checkpoint_interval": rng.choice((0, 50)),
        "speculation": speculates,
        "max_draft_tokens": rng.randint(1, 4) if speculates else 0,
        "count_experts": rng.random() < 0.7,
        "prefix_cache": rng.random() < 0.85,
        "poison": True,
    }
    if rng.random() < 0.2:
        options["kv_dtype"] = torch.int8
    if rng.random() < 0.2:
        options["state_dtype"] = torch.bfloat16
    if options["prefix_cache"] and rng.random() < 0.3:
        options["host_cache_bytes"] = rng.choice((1 << 17, 1 << 20))
    return options


@contextlib.contextmanager
def failing(model: Any) -> Iterator[None]:
    """The last layer raises, where the step is not a recorded one."""

    def fail(*_: object) -> None:
        raise Broken("a step that is to fail")

    hook = model.model.layers[-1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


class Run:
    """One schedule on one model: as many engines, one after another, as it has lives."""

    def __init__(self, index: int, model: Any, clock: Clock, pins: DraftPins) -> None:
        self.index, self.model, self.clock, self.pins = index, model, clock, pins
        self.rng = random.Random(f"schedule {index}")
        self.traffic = Traffic(self.rng, model.config.vocab_size)
        self.options = options_of(self.rng, model.config)
        self.has_disk = self.options["prefix_cache"] and self.rng.random() < 0.25
        self.has_failures = self.rng.random() < 0.15
        self.rests = self.rng.random() < 0.3
        self.num_owners = self.rng.choice((1, 1, 3))
        pins.rng = random.Random(index) if self.rng.random() < 0.7 else None
        self.requests: list[Any] = []
        self.parked: list[Any] = []
        self.steps: list[str] = []

    def digests(self, work: Path, *, keep: Path | None, take: Path | None) -> dict[str, Any]:
        """`answers`: what every request got. `course`: in which steps, from which caches.

        The disk cache that the first life leaves is copied to `keep`; the second life finds that of `take`.
        """
        if not self.has_disk:
            return self._life(self.options, "first")
        folder = work / f"cache-{self.index}"
        lives = {"first": self._life(self._with_disk(folder), "first")}
        if keep is not None:
            shutil.copytree(folder, keep / folder.name)
        if take is not None:
            shutil.rmtree(folder)
            shutil.copytree(take / folder.name, folder)
        self.options |= {"num_blocks": self.rng.randint(17, 40), "num_checkpoints": self.rng.randint(1, 8)}
        lives["second"] = self._life(self._with_disk(folder), "second")
        shutil.rmtree(folder)
        return lives

    def _with_disk(self, folder: Path) -> dict[str, Any]:
        cache = find("DiskCache", "qnext.engine")(
            folder, self.rng.choice((1 << 19, 1 << 24)), at_once=self.rng.random() < 0.3, min_tokens=8, chunk_tokens=32
        )
        return self.options | {"disk_cache": cache}

    def _life(self, options: dict[str, Any], life: str) -> dict[str, Any]:
        self.requests, self.parked, self.steps = [], [], []
        num_wanted = self.rng.randint(6, 14)
        engine = make_engine(self.model, options)
        try:
            num_asked = 0
            while num_asked < num_wanted or engine.has_unfinished or self.parked:
                self.clock.now += 0.25
                for _ in range(self.rng.randint(0, 3) if num_asked < num_wanted else 0):
                    self._ask(engine, f"{life}-{num_asked}")
                    num_asked += 1
                self._disturb(engine)
                self._step(engine)
            completions = self._generate(engine)
            load = engine.expert_load(3)
            course = {
                "steps": self.steps,
                "cached": {request.id: request.num_cached_tokens for request in self.requests},
                "metrics": plain(engine.metrics.as_dict()),
                "experts": None
                if load is None
                else [[each.tokens, each.recent, each.num_dead] for each in load.layers],
            }
        finally:
            engine.close()
        answers = {request.id: _answer(request) for request in self.requests}
        return {"answers": answers, "completions": completions, "course": plain(course)}

    def _ask(self, engine: Any, name: str) -> None:
        rng, params = self.rng, self.traffic.params()
        prompt = self.traffic.prompt()
        owner = rng.randrange(self.num_owners)
        how: dict[str, Any] = {"owner": f"owner {owner}", "salt": f"salt {owner} {rng.choice((0, 0, 1))}"}
        if rng.random() < 0.1 and not params["ignore_eos"]:
            how["guide"] = Every(self.model.config.vocab_size)
        if rng.random() < 0.08:
            how["timeout"] = rng.choice((0.5, 2.0, 5.0))
        if rng.random() < 0.04:
            prompt = rng.choice(([], [10**6], prompt + self.traffic.tokens(MAX_LEN)))
        try:
            made = find("SamplingParams", "qnext.engine")(**params)
            self.requests += engine.add_requests(prompt, made, request_id=name, **how)
        except find("QnextError", "qnext.errors") as error:
            self.steps.append(f"{name} refused: {type(error).__name__}: {error}")

    def _disturb(self, engine: Any) -> None:
        """Some requests are aborted, some rest for a while."""
        rng = self.rng
        open_ones = [request for request in self.requests if request.finish_reason is None]
        self.parked = [request for request in self.parked if request.finish_reason is None]
        if open_ones and rng.random() < 0.02:
            request = rng.choice(open_ones)
            engine.abort(request.id)
            self.steps.append(f"{request.id} aborted")
        elif self.rests and open_ones and rng.random() < 0.2:
            request = rng.choice(open_ones)
            if request not in self.parked:
                rest(engine, request, is_parked=True)
                self.parked.append(request)
                self.steps.append(f"{request.id} rests")
        self.parked = [request for request in self.parked if request.finish_reason is None]
        if self.parked and (rng.random() < 0.15 or not engine.has_unfinished):
            request = self.parked.pop(rng.randrange(len(self.parked)))
            rest(engine, request, is_parked=False)
            self.steps.append(f"{request.id} goes on")

    def _step(self, engine: Any) -> None:
        fails = self.has_failures and self.rng.random() < 0.04
        try:
            with failing(self.model) if fails else contextlib.nullcontext():
                events = engine.step()
        except Broken as error:
            self.steps.append(f"raised {error}")
            return
        self.steps.append(" ".join(_event(event) for event in events))

    def _generate(self, engine: Any) -> list[Any]:
        """Two prompts at once by the short way; what is refused alone ends nothing."""
        made = find("SamplingParams", "qnext.engine")
        params = [made(max_tokens=5, seed=1, n=2, logprobs=2), made(max_tokens=4, temperature=1.0, seed=2)]
        return plain(engine.generate([self.traffic.prompt(), self.traffic.prompt()], params))


def _event(event: Any) -> str:
    token = getattr(event, "token", None)
    text = event.request_id if token is None else f"{event.request_id}:{token.token_id}"
    return text if event.finish_reason is None else f"{text}({event.finish_reason})"


def _answer(request: Any) -> dict[str, Any]:
    failure = request.failure
    return {
        "tokens": list(request.output_ids),
        "log-probabilities": digest(request.sampled),
        "of the prompt": digest(request.prompt_sampled),
        "ended by": request.finish_reason,
        "failure": None if failure is None else f"{type(failure).__name__}: {failure}",
    }
