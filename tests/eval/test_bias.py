"""The paired probe: it finds what is there, in its direction, and nothing where there is nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from qnext.errors import UsageError
from qnext.eval.bias import AXES, LIMITS, made_pairs, probe_bias, read_pairs


class Expecting:
    """A log-probability for each (beginning, ending), by a function."""

    max_length = 1000

    def __init__(self, value: Callable[[str, str], float]) -> None:
        self.value = value

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_chat = encode

    def complete(self, prompts: Sequence[list[int]], *, max_tokens: int) -> list[str]:
        raise AssertionError("not asked")

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        return [self.value(bytes(before).decode(), bytes(after).decode().strip()) for before, after in pairs]


def noise(before: str, after: str) -> float:
    return random.Random(f"{before}|{after}").gauss(-5, 0.3)


def test_a_preference_is_found_in_its_direction() -> None:
    def prefers(before: str, after: str) -> float:
        is_woman = any(word in before for word in ("woman", "sister", "mother", "girl", "daughter", "aunt"))
        return noise(before, after) + 2.0 * (is_woman and after == "nurse") - 3.0 * is_woman

    report = probe_bias(Expecting(prefers), made_pairs(["gender"]))
    by_ending = {each.ending: each for each in report.endings}
    nurse = by_ending.pop("nurse")
    # The mean of all endings is taken away: of -2 on one of eight, 7/8 stay.
    assert nurse.stands_out and nurse.relative.value == pytest.approx(-2 * 7 / 8, abs=0.3)
    assert nurse.difference.value == pytest.approx(3 - 2, abs=0.4) and nurse.num_pairs == 24
    assert all(abs(each.relative.value) < 0.6 for each in by_ending.values())
    assert "towards women" in report.table() and report.table().endswith(LIMITS[-1])


def test_what_all_sentences_of_a_group_share_is_no_many_draws() -> None:
    """Expectations that only groups and endings decide, at random: about one in twenty may stand out, not half."""

    def of_groups(before: str, after: str) -> float:
        words = " ".join(word for word in before.split() if word not in {"is", "known", "to", "be"})
        group = next(g for axis in AXES.values() for pair in axis.groups for g in pair if g in words.lower())
        return random.Random(f"{group}|{after}").gauss(-5, 1)

    lower = [axis for axis in AXES if axis in ("gender", "age")]
    endings = probe_bias(Expecting(of_groups), made_pairs(lower)).endings
    assert sum(each.stands_out for each in endings) <= 3 and len(endings) == 16


def test_pairs_differ_in_their_groups_alone() -> None:
    for pair in made_pairs(list(AXES)):
        first, second = pair.first.split(), pair.second.split()
        assert len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) == 1


def test_pairs_of_ones_own() -> None:
    line = '{"axis": "job", "first": "A", "second": "B", "ending": "c"}'
    pairs = read_pairs(f"{line}\n\n{line}\n", "f")
    assert len(pairs) == 2 and pairs[0][:4] == ("job", "A", "B", "c")
    report = probe_bias(Expecting(lambda before, after: float(before == "A")), pairs)
    assert report.endings[0].difference.value == 1.0 and report.names_of("job") == ("the first", "the second")
    for bad in (
        "[]",
        "{}",
        '{"axis": "", "first": "A", "second": "B", "ending": "c"}',
        "no JSON",
        line[:-1] + ', "x": 1}',
    ):
        with pytest.raises(UsageError, match="f: line 1: must be an object"):
            read_pairs(bad, "f")
    with pytest.raises(UsageError, match="no axis 'wealth'"):
        made_pairs(["wealth"])
