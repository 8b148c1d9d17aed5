"""Records of routers against routers that are watched, and what is concluded of records whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qnext.config import preset
from qnext.diagnostics.routing.agreement import agreement
from qnext.diagnostics.routing.drift import drift
from qnext.diagnostics.routing.pairs import coactivation, lifts
from qnext.diagnostics.routing.record import PIECE_TOKENS, RoutingRecord, read_routing
from qnext.diagnostics.statistics import block_interval, block_starts, spearman
from qnext.errors import UsageError
from qnext.model import Batch, CausalLM, Router, RouterOutput
from qnext.model.init import initialize

TINY = replace(preset("nano-5m").with_layers(4), vocab_size=64, hidden_size=32, num_experts=6, num_experts_per_tok=2)


def made(chosen_LTA: NDArray[np.int64], *, num_experts: int = 8, seed: int = 0) -> RoutingRecord:
    """A record of these choices. The probabilities are random, those of chosen experts the highest."""
    num_layers, num_tokens, _ = chosen_LTA.shape
    logits_LTE = np.random.default_rng(seed).normal(size=(num_layers, num_tokens, num_experts))
    np.put_along_axis(logits_LTE, chosen_LTA, 9.0 + np.arange(chosen_LTA.shape[2])[::-1], axis=2)
    return RoutingRecord(
        layers=tuple(range(num_layers)),
        num_experts=num_experts,
        chosen_LTA=chosen_LTA.astype(np.int16),
        mass_LE=np.zeros((num_layers, num_experts)),
        positions_P=np.arange(num_tokens),
        log_probs_LPE=torch.from_numpy(logits_LTE).log_softmax(-1).float().numpy(),
    )


def drawn(seed: int, share_E: list[float], *, num_tokens: int = 2048, stretch: int = 16) -> RoutingRecord:
    """A record of two layers whose neighbours are alike: every stretch of tokens chooses as its first one does."""
    generator = np.random.default_rng(seed)
    weights = np.log(share_E) + generator.gumbel(size=(2, num_tokens // stretch, len(share_E)))
    chosen = np.argsort(-weights, axis=2)[:, :, :2].repeat(stretch, axis=1)
    return made(chosen, num_experts=len(share_E), seed=seed)


def test_a_record_is_what_the_routers_choose() -> None:
    model = CausalLM(TINY)
    initialize(model, seed=0)
    ids = torch.randint(0, 64, (PIECE_TOKENS + 70,), generator=torch.Generator().manual_seed(0)).tolist()
    record = read_routing(model, ids, with_scores=True)
    outputs: list[RouterOutput] = []
    for module in model.model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        size = min(PIECE_TOKENS, TINY.context_length)
        for start in range(0, len(ids), size):
            piece = torch.tensor(ids[start : start + size])
            model(Batch.from_lengths(piece, [len(piece)]))
    by_layer = [torch.cat([each.routing.experts_TA for each in outputs[layer::4]]) for layer in range(4)]
    scores = [torch.cat([each.logits_TE for each in outputs[layer::4]]).log_softmax(-1) for layer in range(4)]
    assert np.array_equal(record.chosen_LTA, torch.stack(by_layer).numpy())
    assert np.array_equal(record.log_probs_LPE, torch.stack(scores).numpy())
    counts_LE = [torch.bincount(each.flatten(), minlength=6).tolist() for each in by_layer]
    assert record.counts().tolist() == counts_LE
    assert record.block_counts().shape[0] == len(block_starts(len(ids)))
    assert record.mass_LE.sum(axis=1) == pytest.approx([len(ids)] * 4)
    assert read_routing(model, ids[:9]).log_probs_LPE.shape == (4, 0, 6)
    with pytest.raises(UsageError, match="token id 64"):
        read_routing(model, [64])


def test_a_drift_that_is_none_is_rarely_found() -> None:
    """Neighbours are alike, as in texts: tokens that were samples of their own would drift everywhere."""
    share = [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]
    found = 0
    for seed in range(40):
        layers = drift(drawn(seed, share), drawn(1000 + seed, share), of="", is_paired=False).layers
        assert all(layer.distance > 0 for layer in layers)
        found += any(layer.is_real for layer in layers)
    assert found <= 5  # 2 are expected of 40; 6 or more come once in 70 times


def test_a_drift_is_found_and_its_interval_holds_it() -> None:
    share, moved = [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2]
    large = [drawn(seed, each, num_tokens=1 << 16).counts()[0] for seed, each in ((7, share), (8, moved))]
    truth = np.abs(large[0] / large[0].sum() - large[1] / large[1].sum()).sum() / 2
    held = 0
    for seed in range(20):
        layers = drift(drawn(seed, share), drawn(100 + seed, moved), of="", is_paired=False).layers
        assert all(layer.is_real and layer.excess == layer.distance - layer.noise for layer in layers)
        held += sum(layer.interval.low <= truth <= layer.interval.high for layer in layers)
    assert held >= 33  # of 40


def test_pairs_of_the_same_tokens() -> None:
    """The same record does not drift; a model that sends all tokens of expert 0 elsewhere does, at that layer alone."""
    record = drawn(0, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    for layer in drift(record, record, of="", is_paired=True).layers:
        assert (layer.distance, layer.probability, layer.is_real, layer.excess) == (0, 1, False, 0)
    chosen = record.chosen_LTA.astype(np.int64)
    chosen[1][(chosen[1] == 0) & ~(chosen[1] == 7).any(axis=1, keepdims=True)] = 7
    first, second = drift(record, made(chosen), of="", is_paired=True).layers
    assert (first.is_real, second.is_real) == (False, True)
    with pytest.raises(UsageError, match="different layers"):
        drift(record, made(chosen[:1]), of="", is_paired=True)
    alone = made(chosen[:, :1])
    assert not any(layer.is_real for layer in drift(alone, alone, of="", is_paired=False).layers)


def test_agreement_of_known_records() -> None:
    a = made(np.array([[[0, 1], [2, 3], [4, 5], [6, 7]]]))
    assert agreement(a, a).overlap == 1
    (same,) = agreement(a, a).layers
    assert (same.same_set, same.same_first, same.divergence, same.rank_correlation) == (1, 1, 0, pytest.approx(1))
    b = made(np.array([[[1, 0], [2, 5], [4, 5], [0, 1]]]), seed=1)
    found = agreement(a, b)
    (layer,) = found.layers
    assert (layer.overlap, layer.same_set, layer.same_first) == (0.625, 0.5, 0.5)
    assert found.by_position == [1, 0.5, 1, 0]
    assert found.worst == [(3, 0.0), (1, 0.5)]
    p, q = (torch.from_numpy(each.log_probs_LPE[0]).double() for each in (a, b))
    assert layer.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
    ranks = [spearman(*rows) for rows in zip(a.log_probs_LPE[0], b.log_probs_LPE[0], strict=True)]
    assert layer.rank_correlation == pytest.approx(np.mean([each for each in ranks if each is not None]))


def test_experts_that_go_together() -> None:
    """0 and 1 always come as a pair, the others at random; and the next layer's choice follows from the first's."""
    generator = np.random.default_rng(0)
    chosen = np.argsort(generator.random((2000, 6)), axis=1)[:, :2] + 2
    chosen[::5] = [0, 1]
    record = made(np.stack((chosen, (chosen + 3) % 8)))
    found = coactivation(record, num_pairs=2)
    assert [layer.groups for layer in found.layers] == [[[0, 1]], [[3, 4]]]
    pair = found.layers[0].pairs[0]
    assert (pair.first, pair.second, pair.tokens) == (0, 1, 400)
    assert pair.lift > 4 and pair.information == np.log2(pair.lift)
    (step,) = found.steps
    assert {(each.first, each.second) for each in step.pairs} == {(0, 3), (1, 4)} or step.pairs[0].first in (0, 1)
    assert step.hit_ratio is not None and step.hit_ratio_without is not None
    assert step.hit_ratio > 0.9 > 0.5 > step.hit_ratio_without
    lift_EE = lifts(record, 0)
    assert lift_EE[0, 1] == pair.lift and np.array_equal(lift_EE, lift_EE.T) and not lift_EE.diagonal().any()


def test_experts_that_do_not_go_together() -> None:
    chosen = np.argsort(np.random.default_rng(0).random((2, 3000, 8)), axis=2)[:, :, :2]
    found = coactivation(made(chosen))
    assert [layer.groups for layer in found.layers] == [[], []]
    assert all(0.8 < pair.lift < 1.3 and abs(pair.score) < 4.5 for layer in found.layers for pair in layer.pairs)
    assert coactivation(made(chosen[:, :20])).steps[0].hit_ratio is None  # too short to learn and to measure


def test_statistics() -> None:
    """Of blocks that are each constant, the interval is as wide as for one value per block."""
    values_B = np.random.default_rng(0).normal(size=64)
    value, low, high = block_interval(values_B.repeat(64))
    assert value == pytest.approx(values_B.mean())
    error = values_B.std() / 8
    assert low == pytest.approx(values_B.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values_B.mean() + 1.96 * error, abs=0.2 * error)
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 25, 90])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 2, 3]), np.array([3, 2, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1, 1]), np.array([1, 2])) is None
    assert [len(block_starts(n)) for n in (1, 5, 100, 6400)] == [1, 5, 16, 100]
