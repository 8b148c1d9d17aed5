"""Rollouts: answers that the model in training draws by an engine of its own, rewarded by a function.

The engine runs on the very parameters that are trained. It is made anew for each draw, so nothing that it cached before
an update is used after it.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from qnext.engine import Completion, Engine, EngineConfig, SamplingParams
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.model import CausalLM
from qnext.training.policy import PolicyBatch, Rollout, group_advantages, pack_rollouts, token_scores

_MAX_SEQUENCES = 256  # that are drawn side by side
_SHARED_TOKENS = 64  # of prompts that are worth looking for


class Problem(NamedTuple):
    """A prompt, and the answer that the reward compares with."""

    prompt_ids: tuple[int, ...]
    answer: str


class Answer(NamedTuple):
    """The tokens of an answer, the one that ends it left out."""

    token_ids: tuple[int, ...]
    has_ended: bool


Reward = Callable[[Problem, Answer], float]
Draw = Callable[..., list[Completion]]  # as draw_answers, by a model that it knows


def answer_of(completion: Completion) -> Answer:
    has_ended = completion.finish_reason == "stop"
    return Answer(completion.output_ids[: len(completion.output_ids) - has_ended], has_ended)


@dataclass(frozen=True)
class RolloutConfig:
    """How much is drawn and learnt at a time. Raises UsageError naming what is impossible."""

    prompts: int = 16  # of a draw
    group_size: int = 8  # answers to each
    minibatches: int = 1  # updates by the answers of a draw
    max_tokens: int = 256  # of an answer

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("group_size", 2), ("minibatches", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")


def draw_answers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    end_ids: frozenset[int],
    keep_routing: bool = False,
) -> list[Completion]:
    """Answers to each prompt one after another, by an engine on the model as it is now; `keep_routing` as in
    EngineConfig."""
    longest = max(len(each) + (own.max_tokens or 0) for each, own in zip(prompts, params, strict=True))
    num_answers = sum(each.n for each in params)
    config = EngineConfig(
        max_num_seqs=min(num_answers, _MAX_SEQUENCES),
        max_model_len=longest,
        speculation=False,  # its layer does not learn here
        keep_routing=keep_routing,
        prefix_cache=max(map(len, prompts)) >= _SHARED_TOKENS,
        count_experts=False,
        eos_token_ids=end_ids,
    )
    with Engine.of(model, config) as engine:
        return engine.generate(prompts, params)


def keeps_routing(model: CausalLM) -> bool:
    """Whether an engine can keep the experts of the tokens: see EngineConfig."""
    config = model.config
    return bool(sparse_layers(model)) and config.num_linear_layers < config.num_hidden_layers


def sparse_layers(model: CausalLM) -> list[int]:
    return [index for index in range(model.config.num_hidden_layers) if model.config.is_moe_layer(index)]


class _Portion(NamedTuple):
    """A micro batch that is still to be learnt."""

    rollouts: list[Rollout]
    is_first: bool
    facts: dict[str, float]


class RolloutSource:
    """A TrainSource of rollouts. A draw is made when the answers of the last one are used up.

    Every answer is drawn at temperature 1, by numbers that depend on seed, draw and place alone. Groups without spread
    teach nothing and are dropped; where a micro batch would be left without an answer, dropped ones fill it with the
    advantage zero. `reference` is the model that the objective's KL is about. `draw` draws in another way than
    draw_answers by `model`.
    """

    def __init__(
        self,
        model: CausalLM,
        problems: Sequence[Problem],
        reward: Reward,
        config: RolloutConfig,
        *,
        end_ids: frozenset[int],
        accumulation: int,
        seed: int,
        reference: CausalLM | None = None,
        draw: Draw | None = None,
    ) -> None:
        if config.minibatches * accumulation > config.prompts * config.group_size:
            raise UsageError("minibatches times accumulation must be at most the answers of a draw")
        self._model, self._problems, self._reward, self._config = model, problems, reward, config
        self._end_ids, self._accumulation, self._seed, self._reference = end_ids, accumulation, seed, reference
        self._draw_answers = draw or partial(draw_answers, model)
        self._num_draws = 0
        self._planned: list[_Portion] = []
        self._orders: dict[int, list[int]] = {}
        facts = "\n".join(map(repr, (seed, accumulation, config, sorted(end_ids), *problems)))
        self._fingerprint = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    @property
    def epoch(self) -> int:
        return self._num_draws * self._config.prompts // len(self._problems)

    @property
    def num_tokens(self) -> int:
        """The rows of one epoch at most."""
        longest = sum(len(each.prompt_ids) + self._config.max_tokens - 1 for each in self._problems)
        return self._config.group_size * longest

    @property
    def position(self) -> dict[str, Any]:
        planned = [[[_to_json(rollout) for rollout in each.rollouts], *each[1:]] for each in self._planned]
        return {"num_draws": self._num_draws, "planned": planned, "fingerprint": self._fingerprint}

    def seek(self, position: Mapping[str, Any]) -> None:
        if position["fingerprint"] != self._fingerprint:
            raise CorruptCheckpoint("the snapshot was taken with other problems, settings or seed")
        self._num_draws = position["num_draws"]
        self._planned = [
            _Portion([_from_json(rollout) for rollout in rollouts], is_first, facts)
            for rollouts, is_first, facts in position["planned"]
        ]

    def next_batch(self) -> PolicyBatch:
        if not self._planned:
            self._planned = self._draw()
        rollouts, is_first, facts = self._planned.pop(0)
        return pack_rollouts(rollouts, sparse_layers(self._model), is_first=is_first, facts=facts)

    def _draw(self) -> list[_Portion]:
        config, size = self._config, self._config.group_size
        first = self._num_draws * config.prompts
        problems = [self._problem(first + place) for place in range(config.prompts)]
        params = [
            SamplingParams(temperature=1.0, n=size, max_tokens=config.max_tokens, seed=self._number(place), logprobs=0)
            for place in range(config.prompts)
        ]
        answers = self._draw_answers(
            [each.prompt_ids for each in problems],
            params,
            end_ids=self._end_ids,
            keep_routing=keeps_routing(self._model),
        )
        kept: list[tuple[Completion, float]] = []
        dropped: list[tuple[Completion, float]] = []
        rewards: list[float] = []
        for n, problem in enumerate(problems):
            group = answers[n * size : (n + 1) * size]
            own = [self._reward(problem, answer_of(each)) for each in group]
            advantages = group_advantages(own)
            if advantages is None:
                dropped += [(answer, 0.0) for answer in group]
            else:
                kept += zip(group, advantages, strict=True)
            rewards += own
        facts = {
            "reward": sum(rewards) / len(rewards),
            "length": sum(len(each.output_ids) for each in answers) / len(answers),
            "dropped": float(len(dropped) // size),
        }
        planned = self._plan(kept, dropped, facts)
        self._num_draws += 1
        return planned

    def _plan(
        self, kept: list[tuple[Completion, float]], dropped: list[tuple[Completion, float]], facts: dict[str, float]
    ) -> list[_Portion]:
        count = self._config.minibatches * self._accumulation
        chosen = kept + dropped[: max(0, count - len(kept))]
        random.Random(self._number(-1)).shuffle(chosen)
        rollouts = [rollout_of(answer, advantage) for answer, advantage in chosen]
        if self._reference is not None:
            rollouts = with_reference(self._reference, rollouts)
        return [
            _Portion(rollouts[number::count], number < self._accumulation, {} if number else facts)
            for number in range(count)
        ]

    def _problem(self, number: int) -> Problem:
        epoch, place = divmod(number, len(self._problems))
        if epoch not in self._orders:
            order = list(range(len(self._problems)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._orders = {**{e: o for e, o in self._orders.items() if e == epoch - 1}, epoch: order}
        return self._problems[self._orders[epoch][place]]

    def _number(self, place: int) -> int:
        """A seed for a place of the next draw."""
        key = f"{self._seed}/{self._num_draws}/{place}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")


def rollout_of(answer: Completion, advantage: float) -> Rollout:
    ids = np.array([*(~token for token in answer.prompt_ids), *answer.output_ids], dtype=np.int32)
    log_probs = np.array([token.logprob for token in answer.sampled], dtype=np.float64)
    return Rollout(ids, log_probs, advantage, answer.routing)


@torch.no_grad()
def with_reference(model: CausalLM, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts with the log-probabilities of their tokens under `model`."""
    found = []
    for rollout in rollouts:
        rows = pack_rollouts([rollout]).to(model.device).rows
        scores = token_scores(model, model(rows.batch).hidden_TD, rows.labels_T)
        found.append(rollout._replace(reference=scores.log_probs_R.numpy(force=True)))
    return found


def _to_json(rollout: Rollout) -> dict[str, Any]:
    return {
        "document": rollout.document.tolist(),
        "log_probs": rollout.log_probs.tolist(),
        "advantage": rollout.advantage,
        "routing": None
        if rollout.routing is None
        else [list(rollout.routing.shape), base64.b64encode(rollout.routing.astype("<u2").tobytes()).decode()],
        "reference": None if rollout.reference is None else rollout.reference.tolist(),
    }


def _from_json(value: Mapping[str, Any]) -> Rollout:
    routing = reference = None
    if value["routing"] is not None:
        shape, text = value["routing"]
        routing = np.frombuffer(base64.b64decode(text), dtype="<u2").astype(np.int64).reshape(shape)
    if value["reference"] is not None:
        reference = np.array(value["reference"], dtype=np.float64)
    return Rollout(
        np.array(value["document"], dtype=np.int32),
        np.array(value["log_probs"], dtype=np.float64),
        value["advantage"],
        routing,
        reference,
    )
