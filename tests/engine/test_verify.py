"""Windows of drafted tokens: whatever was drafted, the answer is that of decoding token by token."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from qnext.engine.policy.request import Request, SampledToken, SamplingParams
from qnext.engine.sampling.sampler import Verdict, Window, draft, verify
from qnext.errors import NotFinite, QnextError, RequestBroke, UsageError
from tests.engine.sampling import VOCAB_SIZE, logits, request, sample

SMALL = 50  # beside it a vocabulary that is read in groups
LARGE = 4500

EVERY: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 0.01, "top_k": 9, "top_p": 0.7},
    {"temperature": 1.0, "repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"temperature": 0.8, "frequency_penalty": 1.9},
    {"frequency_penalty": -2.0, "temperature": 1.5},
    {"logit_bias": {3: 9.0, 8: -100}},
    {"temperature": 1.0, "logit_bias": {4: 6.5}, "presence_penalty": 2.0},
    {"allowed_token_ids": (2, 9, 11, 30)},
    {"temperature": 2.0, "allowed_token_ids": (2, 9, 11, 30)},
    {"temperature": 1.0, "banned_token_ids": (0, 1, 2)},
    {"temperature": 1.5, "min_tokens": 9, "top_k": 8},
    {"temperature": 1.2, "logprobs": 4},
    {"logprobs": 0},
    {"temperature": 1.0, "min_tokens": 3, "logprobs": 2},
]


def all_params() -> list[SamplingParams]:
    return [SamplingParams(**changes, seed=100 + n) for n, changes in enumerate(EVERY)]


class Table:
    """A language model: the logits depend on the last two tokens."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def row(self, *tokens: int) -> torch.Tensor:
        last, before = tokens[-1], tokens[-2] if len(tokens) > 1 else 0
        return logits(1, seed=last * 10_007 + before, vocab_size=self.vocab_size)[0]

    def window(self, made: Request, draft_ids: tuple[int, ...]) -> torch.Tensor:
        known = [*made.prompt_ids, *made.output_ids]
        return torch.stack([self.row(*known, *draft_ids[:i]) for i in range(len(draft_ids) + 1)])


class Alternating:
    """Allows even tokens after odd ones and odd after even; counts what it is told."""

    def __init__(self, vocab_size: int) -> None:
        self.bits = np.zeros((2, -(-vocab_size // 32) * 32), dtype=np.uint8)
        self.bits[0, 0:vocab_size:2] = self.bits[1, 1:vocab_size:2] = 1
        self.told: list[int] = []

    def allowed(self) -> np.ndarray:
        odd = self.told[-1] % 2 == 0 if self.told else 0
        return np.packbits(self.bits[int(odd)], bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> None:
        self.told.append(token_id)


def book(made: Request, verdict: Verdict) -> str | None:
    assert verdict.failure is None and verdict.tokens
    reasons = [made.append(token) for token in verdict.tokens]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return reasons[-1]


def fresh(params: SamplingParams) -> Request:
    return request(params, prompt=(1, 5, 5, 7), stop=(13, *range(17, 4500, 60)), max_tokens=24)


def decoded(model: Table, params: SamplingParams, guide: Alternating | None = None) -> tuple[Request, str]:
    made, reason = fresh(params), None
    while reason is None:
        reason = book(made, *verify(model.window(made, ()), [Window(made, (), guide)]))
    return made, reason


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
@pytest.mark.parametrize("guided", [False, True])
def test_windows_are_decoding_step_by_step(vocab_size: int, guided: bool) -> None:
    """Drafts all right, all wrong and right up to somewhere, of every length, in one call with all the others."""
    model, rng = Table(vocab_size), random.Random(vocab_size)
    params = [p for p in all_params() if not (guided and p.allowed_token_ids)]
    expected = [decoded(model, p, Alternating(vocab_size) if guided else None) for p in params]
    assert {"stop", "length"} <= {reason for _, reason in expected}
    guides = [Alternating(vocab_size) if guided else None for _ in params]
    running = {n: fresh(p) for n, p in enumerate(params)}
    num_windows, num_right = 0, 0
    while running:
        windows = []
        for n, made in running.items():
            future = expected[n][0].output_ids[len(made.output_ids) :]
            length = rng.randint(0, 5)
            num_good = rng.choice([0, length, rng.randint(0, length)])
            drafted = [*future[:num_good], *(rng.randrange(vocab_size) for _ in range(length))][:length]
            windows.append(Window(made, tuple(drafted), guides[n]))
        rows = torch.cat([model.window(window.request, window.draft_ids) for window in windows])
        for n, window, verdict in zip(list(running), windows, verify(rows, windows), strict=True):
            num_windows += 1
            num_right += len(verdict.tokens) - 1
            reason = book(window.request, verdict)
            if reason is not None:
                whole, expected_reason = expected[n]
                made = running.pop(n)
                assert (made.output_ids, reason) == (whole.output_ids, expected_reason), params[n]
                assert made.sampled == whole.sampled
                if guided:
                    assert guides[n].told == made.output_ids  # type: ignore[union-attr]
    assert num_right > num_windows / 2  # drafts were right often enough to mean something


def test_what_comes_after_the_end_is_dropped() -> None:
    rows = torch.full((4, VOCAB_SIZE), -9.0)
    rows[range(4), [5, 6, 7, 8]] = 9.0
    for stop, most, expected in (((), 99, [5, 6, 7, 8]), ((6,), 99, [5, 6]), ((), 3, [5, 6, 7]), ((5,), 1, [5])):
        made = request(SamplingParams(), stop=stop, max_tokens=most)
        (verdict,) = verify(rows, [Window(made, (5, 6, 7))])
        assert [token.token_id for token in verdict.tokens] == expected
        assert made.output_ids == []
    (verdict,) = verify(rows, [Window(request(SamplingParams()), (5, 0, 7))])
    assert [token.token_id for token in verdict.tokens] == [5, 6]


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_every_parameter_alone_is_as_in_company(vocab_size: int) -> None:
    rows = logits(len(EVERY), seed=3, vocab_size=vocab_size)
    for num_output in range(6):
        made = [request(p, output=[7, 9, 7, 2, 9, 0][:num_output], stop=(4,)) for p in all_params()]
        together = sample(rows, made)
        assert sample(rows.flip(0), made[::-1])[::-1] == together
        for n, one in enumerate(made):
            assert sample(rows[n : n + 1].clone(), [one]) == [together[n]]


def test_min_tokens_bias_and_lists() -> None:
    rows = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])

    def chosen(params: SamplingParams, num_output: int = 0) -> int:
        return sample(rows, [request(params, output=[4] * num_output, stop=(0, 1, 77))])[0].token_id

    assert [chosen(SamplingParams(min_tokens=2), n) for n in range(4)] == [2, 2, 0, 0]
    assert chosen(SamplingParams(logit_bias={3: 2.9})) == 0 and chosen(SamplingParams(logit_bias={3: 3.5})) == 3
    assert chosen(SamplingParams(logit_bias={0: -100.0, 1: -1.5})) == 2
    assert chosen(SamplingParams(banned_token_ids=(0, 2))) == 1
    assert chosen(SamplingParams(allowed_token_ids=(2, 4), banned_token_ids=(2,))) == 4
    assert chosen(SamplingParams(allowed_token_ids=(3, 4), logit_bias={4: 1.5, 0: 100.0})) == 4
    # The bias comes before the penalties: (4 + 3.5) / 2 is below 5, while 4 / 2 + 3.5 would be above.
    assert chosen(SamplingParams(logit_bias={1: 3.5}, repetition_penalty=2.0)) == 0
    drawn = {
        sample(rows, [request(SamplingParams(temperature=3.0, min_tokens=99), output=[4] * n, stop=(0, 1))])[0].token_id
        for n in range(60)
    }
    assert drawn == {2, 3, 4}
    assert rows.tolist() == [[5.0, 4.0, 3.0, 2.0, 1.0]]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations above what chance explains."""
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    wanted, observed = wanted[wanted > 0], observed[wanted > 0]
    freedom = len(wanted) - 1
    return float((((observed - wanted) ** 2 / wanted).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 1500])
def test_draws_follow_the_distribution(vocab_size: int) -> None:
    """Chi square over whole vocabularies, so over several blocks of the cumulative sum."""
    row, num_draws, at_once = logits(1, seed=8, vocab_size=vocab_size) / 3, 30_000, 100
    params = SamplingParams(temperature=1.0, seed=4, logit_bias={2: 3.0}, banned_token_ids=(5,))
    made, rows = [request(params) for _ in range(at_once)], row.repeat(at_once, 1)
    counts = np.zeros(vocab_size)
    for begin in range(0, num_draws, at_once):
        for n, each in enumerate(made):
            each.output_ids = range(begin + n)  # type: ignore[assignment]
        for token in sample(rows, made):
            counts[token.token_id] += 1
    biased = row[0].double()
    biased[2] += 3.0
    biased[5] = -math.inf
    expected = biased.softmax(-1).numpy() * num_draws
    assert counts[5] == 0
    assert chi_square(counts, expected) < 4
    assert chi_square(counts, np.roll(expected, 1)) > 20  # another distribution is told apart


def test_a_draft_from_the_same_logits_is_always_right() -> None:
    made = [request(p, output=(3, 4), stop=(4,)) for p in all_params()]
    rows = logits(len(made), seed=6)
    assert draft(rows, made, [2] * len(made)) == [token.token_id for token in sample(rows, made)]
    sampled = [r for r in made if r.params.temperature == 1.0]
    same = rows[:1].expand(len(sampled), -1)
    other = [draft(same, sampled, [index] * len(sampled)) for index in range(2, 12)]
    assert len({tuple(guess) for guess in other}) > 5  # the number belongs to the index


def test_a_draft_from_similar_logits_is_often_right() -> None:
    rows = logits(400, seed=6)
    made = [request(SamplingParams(temperature=0.8, seed=n)) for n in range(400)]
    target = [token.token_id for token in sample(rows, made)]
    near = draft(rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)), made, [0] * 400)
    chance = draft(rows, made, [1] * 400)
    agreement = [sum(a == b for a, b in zip(guess, target, strict=True)) / 400 for guess in (near, chance)]
    assert agreement[0] > 0.85 > agreement[1]


class Fixed:
    def __init__(self, words: list[int]) -> None:
        self.words = np.array(words, dtype=np.int32)

    def allowed(self) -> np.ndarray:
        return self.words

    def accept(self, token_id: int) -> None:
        if token_id == 9:
            raise UsageError("nine is refused")


def test_a_request_that_cannot_go_on_fails_alone() -> None:
    rows = logits(4, seed=1)
    rows[2:, 9] = 99.0
    windows = [
        Window(request(SamplingParams(temperature=1.0)), (), Fixed([0, 0])),
        Window(request(SamplingParams())),
        Window(request(SamplingParams()), (9,), Fixed([-1, -1])),
    ]
    verdicts = verify(rows, windows)
    assert [len(verdict.tokens) for verdict in verdicts] == [0, 1, 0]
    assert isinstance(verdicts[0].failure, QnextError) and "no token may be chosen" in str(verdicts[0].failure)
    assert verdicts[1] == Verdict((SampledToken(int(rows[1].argmax())),))
    assert "nine" in str(verdicts[2].failure)


def test_bits_of_a_mask_are_tokens() -> None:
    rows = torch.zeros(1, VOCAB_SIZE)
    for token in (0, 31, 32, VOCAB_SIZE - 1):
        words = [0, 0]
        words[token // 32] = 1 << token % 32 if token % 32 != 31 else -(2**31)
        (verdict,) = verify(rows, [Window(request(SamplingParams(temperature=1.0)), (), Fixed(words))])
        assert verdict.tokens == (SampledToken(token),)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_the_failure_of_its_window_alone(value: float, temperature: float) -> None:
    rows = logits(4)
    params = SamplingParams(temperature=temperature, logprobs=2, seed=9)
    wanted = verify(rows, [Window(request(params)), Window(request(params), (40,)), Window(request(params))])
    rows[1] = value
    guide = Alternating(VOCAB_SIZE)
    found = verify(rows, [Window(request(params)), Window(request(params), (40,), guide), Window(request(params))])
    assert isinstance(found[1].failure, NotFinite) and "not finite" in str(found[1].failure)
    assert not found[1].tokens and not guide.told
    assert (found[0], found[2]) == (wanted[0], wanted[2])
    guesses = draft(logits(4), [request(params)] * 4, [0, 1, 2, 3])
    assert draft(rows, [request(params)] * 4, [0, 1, 2, 3])[::2] == guesses[::2]


def test_rows_after_a_wrong_draft_may_hold_anything() -> None:
    rows = logits(3)
    wanted = verify(rows[:1], [Window(request(SamplingParams()))])
    rows[1:] = math.nan
    wrong = (wanted[0].tokens[0].token_id + 1) % VOCAB_SIZE
    assert verify(rows, [Window(request(SamplingParams()), (wrong, wrong))]) == wanted
    right = wanted[0].tokens[0].token_id
    (verdict,) = verify(rows, [Window(request(SamplingParams()), (right, wrong))])
    assert verdict.tokens == wanted[0].tokens and isinstance(verdict.failure, NotFinite)


class Panic(BaseException):
    """What a library's panic is to Python."""


class Breaking(Alternating):
    """Raises when it is asked, or told, for the first time."""

    def __init__(self, when: str, error: BaseException) -> None:
        super().__init__(VOCAB_SIZE)
        self.when, self.error = when, error

    def allowed(self) -> np.ndarray:
        if self.when == "allowed":
            raise self.error
        return super().allowed()

    def accept(self, token_id: int) -> None:
        if self.when == "accept":
            raise self.error
        super().accept(token_id)


@pytest.mark.parametrize("when", ["allowed", "accept"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError(), Panic("at src/lexer.rs"), AssertionError()])
def test_whatever_a_guide_raises_ends_its_request_alone(when: str, error: BaseException) -> None:
    rows, params = logits(3), SamplingParams(temperature=1.0, logprobs=1, seed=4)
    wanted = verify(rows, [Window(request(params))] * 3)
    guide = Breaking(when, error)
    found = verify(rows, [Window(request(params)), Window(request(params), (), guide), Window(request(params))])
    assert isinstance(found[1].failure, RequestBroke) and found[1].failure.__cause__ is error
    assert "rs" not in str(found[1].failure), "what a library says stays in the log"
    assert (found[0], found[2]) == (wanted[0], wanted[2])


def test_an_interrupt_is_nobodys_failure() -> None:
    with pytest.raises(KeyboardInterrupt):
        verify(logits(1), [Window(request(SamplingParams()), (), Breaking("allowed", KeyboardInterrupt()))])


def test_nothing_to_do() -> None:
    assert verify(torch.empty(0, VOCAB_SIZE), []) == []
    assert draft(torch.empty(0, VOCAB_SIZE), [], []) == []


def test_min_tokens_are_reached_inside_a_window() -> None:
    rows = torch.zeros(4, VOCAB_SIZE)
    rows[:, 5], rows[:, 6] = 2.0, 1.0
    made = request(SamplingParams(min_tokens=3, logit_bias={0: 0.5}), output=(9,), stop=(5,))
    (verdict,) = verify(rows, [Window(made, (6, 6, 6))])
    assert [token.token_id for token in verdict.tokens] == [6, 6, 5]
