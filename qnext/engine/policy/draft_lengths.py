"""How many tokens to draft: what is likely to be accepted against what it costs. No torch.

A step that verifies drafts takes longer than one that does not, above all where each token wakes other experts, and
drafting takes time of its own. Both are measured while the engine runs; how likely a draft is right is measured for
each request and, for new ones, over all. Where drafting would lose, it stops, and a small share of the time goes into
finding out whether that has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_LEAST_GAIN = 1.1  # less is within the error of the estimates
_PRIOR_TRIALS = 8.0
_MEMORY_OF_REQUEST, _MEMORY_OF_ALL = 64.0, 400.0  # trials after which an old one counts for a third
_PROBE_SHARE = 0.006  # of the time, at most
_ENOUGH_SEEN, _FORGET_AFTER, _FAVOUR = 4, 4000, 0.85
_FIRST_GUESS = 0.5  # acceptance before anything was seen


class CostEstimate:
    """Seconds of something by its size: measured where it was seen, after `shape` elsewhere.

    What all sizes have in common, such as a machine that has become slow, is kept apart from what sets one size off
    from the shape, so that sizes that are not in use do not grow old.
    """

    def __init__(self, shape: Callable[[int], float]) -> None:
        self._shape = shape
        self._scale: float | None = None
        self._factors: dict[int, float] = {}
        self._num_seen: dict[int, int] = {}
        self._num_observed = 0

    @property
    def is_known(self) -> bool:
        return self._scale is not None

    def is_trusted(self, size: int) -> bool:
        """Whether it was seen often enough, and not too long ago."""
        return self._num_seen.get(size, 0) >= _ENOUGH_SEEN

    def largest_trusted(self, least: int) -> int:
        """Of the sizes from `least` on that are trusted without a gap of more than a half; `least` if none is."""
        largest = least
        for size in sorted(size for size in self._num_seen if size >= least and self.is_trusted(size)):
            if size > 1.5 * largest + 1:
                break
            largest = size
        return largest

    def seconds(self, size: int) -> float:
        """Needs `is_known`. Favours a size that is not trusted, so that it is looked at: what was seen of it may have
        taken long for another reason, and counts no more than what the nearest trusted size lets expect."""
        assert self._scale is not None
        unit = self._scale * self._shape(size)
        if self.is_trusted(size):
            return unit * self._factors[size]
        return _FAVOUR * unit * min(self._factor(size), self._factor_near(size))

    def _factor(self, size: int) -> float:
        return self._factors[size] if size in self._factors else self._factor_near(size)

    def _factor_near(self, size: int) -> float:
        """That of the nearest size that is trusted, or else of the nearest that was seen."""
        sizes = [seen for seen in self._factors if self.is_trusted(seen)] or list(self._factors)
        return self._factors[min(sizes, key=lambda seen: abs(seen - size))] if sizes else 1.0

    def observe(self, size: int, seconds: float) -> None:
        """It took so long. Of the first times the shortest counts: much can make a first time long."""
        self._num_observed += 1
        if self._num_observed % _FORGET_AFTER == 0:
            self._num_seen = {size: min(count, _ENOUGH_SEEN - 2) for size, count in self._num_seen.items()}
        seen = self._num_seen[size] = self._num_seen.get(size, 0) + 1
        if self._scale is None:
            self._scale, self._factors[size] = seconds / self._shape(size), 1.0
            return
        ratio = seconds / (self._scale * self._factor(size) * self._shape(size))
        if size not in self._factors:
            self._factors[size] = self._factor(size) * ratio
        elif seen < _ENOUGH_SEEN:
            self._factors[size] *= min(1.0, ratio)
        else:
            ratio = min(2.0, max(0.5, ratio))
            self._scale *= ratio**0.05
            self._factors[size] *= ratio**0.1


class Acceptance:
    """How often the draft at each depth was right, given that those before it were. Old trials fade."""

    def __init__(self, depth: int, *, memory: float, prior: Acceptance | None = None) -> None:
        self._prior = prior
        self._decay = 1.0 - 1.0 / memory
        self._right = [0.0] * depth
        self._trials = [0.0] * depth

    @property
    def num_trials(self) -> float:
        return self._trials[0]

    def observe(self, num_right: int, num_drafted: int) -> None:
        """Of so many drafts, one after another, so many were right before the first wrong one.

        What is known of every depth fades, so that one which did badly is tried again some time.
        """
        for depth in range(len(self._trials)):
            self._trials[depth] *= self._decay
            self._right[depth] *= self._decay
        for depth in range(min(num_drafted, num_right + 1)):
            self._trials[depth] += 1.0
            self._right[depth] += depth < num_right
        if self._prior is not None:
            self._prior.observe(num_right, num_drafted)

    def rate(self, depth: int) -> float:
        """Of the draft at this depth, from zero, given that those before it are right."""
        if self._prior is not None:
            prior = self._prior.rate(depth)
        else:
            # What is right once is likely to be right twice, if a little less so.
            prior = _FIRST_GUESS if depth == 0 else 0.9 * self.rate(depth - 1)
        return (self._right[depth] + _PRIOR_TRIALS * prior) / (self._trials[depth] + _PRIOR_TRIALS)


@dataclass
class Drafting:
    """A request as its drafter knows it.

    Keys and values of the MTP layer are there for positions `first_row` to `num_rows`, in this residence in the cache.
    """

    acceptance: Acceptance
    admission: int = -1
    first_row: int = 0
    num_rows: int = 0
    last_probe: int = -1


@dataclass
class DraftLengths:
    """Chooses draft lengths. `step_shape(T)` and `pass_shape(N)` say how the time of a step of T tokens, and of one
    pass of the MTP layer for N sequences, depends on their sizes, in one unit."""

    max_draft_tokens: int
    step_shape: Callable[[int], float]
    pass_shape: Callable[[int], float]
    steps: CostEstimate = field(init=False)
    passes: CostEstimate = field(init=False)
    overall: Acceptance = field(init=False)
    _seconds: float = field(default=0.0, init=False)
    _probe_seconds: float = field(default=0.0, init=False)
    _probe_cost: float = field(default=0.0, init=False)
    _num_probes: int = field(default=0, init=False)
    _num_observed: int = field(default=0, init=False)
    _last_size: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.steps = CostEstimate(self.step_shape)
        self.passes = CostEstimate(self.pass_shape)
        self.overall = Acceptance(self.max_draft_tokens, memory=_MEMORY_OF_ALL)

    def new_request(self) -> Drafting:
        return Drafting(Acceptance(self.max_draft_tokens, memory=_MEMORY_OF_REQUEST, prior=self.overall))

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """A step in which every sequence went on from its last token took so long."""
        self._seconds += seconds
        self._num_observed += 1
        if num_tokens != self._last_size or self._num_observed & 7 == 0:  # of equal steps every eighth is enough
            self._last_size = num_tokens
            self.steps.observe(num_tokens, seconds)

    def observe_probe(self, seconds: float) -> None:
        """Finding out what drafts would be worth took so long; 0 where the time is no measure for the next one."""
        self._num_probes += 1
        self._probe_seconds += seconds
        self._probe_cost = min(seconds, 1.5 * self._probe_cost) if self._probe_cost else seconds

    def may_probe(self, drafting: Drafting, *, num_left: int, num_sequences: int) -> bool:
        """Whether to ask what drafts of a request would be worth that may go on for `num_left` tokens.

        All probes together take no more than their share of the time. A request that was never asked may also spend
        that share of its own time to come.
        """
        if self._probe_seconds + self._probe_cost <= _PROBE_SHARE * self._seconds or not self._num_probes:
            return True
        if drafting.last_probe >= 0 or not self.steps.is_known:
            return False
        return self._probe_cost <= _PROBE_SHARE * num_left * self.steps.seconds(num_sequences) / num_sequences

    def choose(self, requests: Sequence[Drafting], most: Sequence[int]) -> list[int]:
        """Drafts for each request, at most `most` of them, that bring the most tokens a second; all 0 if none gain.

        Drafts are taken in the order of how likely they are to be accepted. Many sequences take them in rounds: each
        number of tokens is a size of its own, and few sizes are better known than many.
        """
        lengths = [0] * len(requests)
        if not self.steps.is_known:
            return lengths
        offers: list[tuple[float, int, int]] = []
        for n, (drafting, limit) in enumerate(zip(requests, most, strict=True)):
            chance = 1.0
            for depth in range(min(limit, self.max_draft_tokens)):
                chance *= drafting.acceptance.rate(depth)
                offers.append((-chance, depth, n))
        offers.sort()
        num_sequences = len(requests)
        round_size = max(1, num_sequences // 4)
        # What a size costs is known near those that were seen: go there in small strides.
        most_tokens = self.steps.largest_trusted(num_sequences) + 2 * round_size
        base = num_sequences / self.steps.seconds(num_sequences)
        best, num_taken = base * _LEAST_GAIN, 0
        tokens, num_passes = float(num_sequences), 0
        for count, (chance, depth, _) in enumerate(offers, start=1):
            tokens -= chance
            num_passes = max(num_passes, depth + 1)
            if num_sequences + count > most_tokens:
                break
            if count % round_size:
                continue
            seconds = self.steps.seconds(num_sequences + count) + num_passes * self._pass_seconds(num_sequences)
            if tokens / seconds > best:
                best, num_taken = tokens / seconds, count
        for _, depth, n in offers[:num_taken]:
            lengths[n] = depth + 1
        return lengths

    def _pass_seconds(self, num_sequences: int) -> float:
        expected = self.steps.seconds(1) / self.step_shape(1) * self.pass_shape(num_sequences)
        if not self.passes.is_known:
            return expected
        measured = self.passes.seconds(num_sequences)
        return measured if self.passes.is_trusted(num_sequences) else min(measured, expected)


class DraftCosts(NamedTuple):
    """Bytes of a model's weights, as they lie in memory: what a step reads beside experts, all experts, and what a pass
    of the MTP layer reads. `top_k` of `num_experts` are chosen for a token."""

    other_bytes: int
    expert_bytes: int
    num_experts: int
    top_k: int
    mtp_bytes: int


def step_shapes(costs: DraftCosts) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Bytes that a step of T tokens and a pass of the MTP layer for N of them move, as far as that makes their time.

    Experts are chosen as if at random: T tokens meet E (1 - (1 - A / E)^T) of E. What a token beyond the first costs in
    arithmetic is put at a seventh of reading the weights that it meets; measurements correct that.
    """
    other_bytes, expert_bytes, num_experts, top_k, mtp_bytes = costs
    share = top_k / num_experts if num_experts else 0.0

    def step(num_tokens: int) -> float:
        arithmetic = (num_tokens - 1) * (other_bytes + expert_bytes * share) / 7
        return other_bytes + expert_bytes * (1 - (1 - share) ** num_tokens) + arithmetic

    def draft_pass(num_sequences: int) -> float:
        return mtp_bytes * (1 + (num_sequences - 1) / 7)

    return step, draft_pass
