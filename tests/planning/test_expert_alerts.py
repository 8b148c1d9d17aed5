"""A baseline that is kept and read again, distances with known noise, and thresholds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qnext.errors import UsageError
from qnext.planning.expert_alerts import ExpertThresholds, Reference, alerts_of, measures_of, tokens_needed
from qnext.planning.expert_baseline import ExpertBaseline

SHARE = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])


def blocks(seed: int, *, num_blocks: int = 100, stretch: int = 1) -> NDArray[np.int64]:
    """[B, 2, E] of blocks of 64 choices, which come in stretches of equal ones."""
    counts = np.random.default_rng(seed).multinomial(64 // stretch, SHARE, size=(num_blocks, 2))
    return counts * stretch


def baseline(seed: int = 0, *, stretch: int = 1) -> ExpertBaseline:
    return ExpertBaseline.of_blocks("m", (1, 3), blocks(seed, stretch=stretch))


@pytest.mark.parametrize("stretch", [1, 8])
def test_noise_is_what_samples_of_the_same_text_differ_by(stretch: int) -> None:
    """Also where neighbours are alike, which makes it larger by the root of their number."""
    kept = baseline(stretch=stretch)
    assert kept.spread_L == pytest.approx(stretch, rel=0.25)
    found = [kept.distances(blocks(seed, num_blocks=60, stretch=stretch).sum(0)) for seed in range(1, 60)]
    distance_L = np.mean([each.distance_L for each in found], axis=0)
    noise_L = np.mean([each.noise_L for each in found], axis=0)
    # The baseline's own accident stays the same in all of them.
    assert distance_L == pytest.approx(noise_L, rel=0.25)


def test_a_file(tmp_path: Path) -> None:
    kept = baseline()
    kept.write(tmp_path / "b.json")
    again = ExpertBaseline.read(tmp_path / "b.json")
    assert (again.model, again.layers) == ("m", (1, 3))
    assert np.array_equal(again.counts_LE, kept.counts_LE)
    assert again.spread_L == pytest.approx(kept.spread_L, abs=1e-6)
    again.check([1, 3], 8, where="x")
    for layers, num_experts in (([1, 2], 8), ([1, 3, 5], 8), ([1, 3], 9)):
        with pytest.raises(UsageError, match="x: a baseline of 2 layers of 8 experts"):
            again.check(layers, num_experts, where="x")
    good = json.loads((tmp_path / "b.json").read_text())
    row = good["layers"][0]
    for bad in (
        [],
        {},
        good | {"form": "other"},
        good | {"layers": []},
        good | {"layers": [row, {**row, "counts": [1]}]},
        good | {"layers": [{**row, "counts": [-1] * 8}]},
        good | {"layers": [{**row, "counts": [1.5] * 8}]},
        good | {"layers": [{**row, "spread": math.inf}]},
        good | {"layers": [{"layer": 1}]},
    ):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(UsageError, match=r"bad\.json: no "):
            ExpertBaseline.read(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="none"):
        ExpertBaseline.read(tmp_path / "none")


def test_measures() -> None:
    counts_LE = np.array([[10, 10, 10, 10], [40, 0, 0, 0]])
    found = measures_of((0, 1), counts_LE)
    assert found.skew_L.tolist() == [1, 4]
    assert found.dead_L.tolist() == [0, 0.75]
    assert found.collapse_L == pytest.approx([0, 1])
    assert np.isnan(found.drift_L).all()
    kept = ExpertBaseline.of_blocks("m", (1,), np.array([[[10, 10, 10, 10]]] * 4))
    found = measures_of((0, 1), counts_LE, Reference.of_baseline(kept, (0, 1), counts_LE))
    expected = kept.distances(counts_LE[1:])
    assert expected.distance_L == pytest.approx([0.75])
    assert math.isnan(found.drift_L[0]) and found.drift_L[1] == expected.distance_L[0] - expected.noise_L[0] > 0
    thresholds = ExpertThresholds.parse("skew=4, drift=0.5,dead=0.8")
    assert [(each.layer, each.measure) for each in alerts_of((0, 1), found, thresholds)] == [(1, "skew"), (1, "drift")]
    assert tokens_needed(512, 10) == 1024


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be one of skew, dead, collapse, drift"),
        ("heat=3", "must be one of"),
        ("skew=8,skew=9", "once each"),
        ("skew", "no number"),
        ("skew=a", "no number"),
        ("skew=1", "above 1"),
        ("skew=inf", "above 1"),
        ("drift=0", "above 0 and at most 1"),
        ("drift=nan", "above 0 and at most 1"),
        ("dead=1.5", "above 0 and at most 1"),
    ],
)
def test_thresholds_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExpertThresholds.parse(text)
