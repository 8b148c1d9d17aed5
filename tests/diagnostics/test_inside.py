"""What is added up call after call is what one pass shows, and the parts of a read are the read."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from qnext.diagnostics.inside.attention_sums import first_of_bins
from qnext.diagnostics.inside.panels import Panel, write_panels
from qnext.diagnostics.inside.report import InsideReport, look_inside
from qnext.diagnostics.inside.show import show_inside, write_inside
from qnext.errors import DoesNotFit, UsageError
from qnext.model import Batch
from qnext.probe import Attended, ModelProbe
from tests.diagnostics.pictures import read_png
from tests.model.models import PEER_CONFIGS, make_model, random_tokens
from tests.model.wrapping import CONFIG

TOKENS = random_tokens(CONFIG, 150)
NUM_GENERATED = 6


@pytest.fixture(scope="module")
def report() -> InsideReport:
    """Of a text and a few tokens that follow it, none of which ends it."""
    return look_inside(make_model(CONFIG), TOKENS.tolist(), num_generated=NUM_GENERATED)


@pytest.fixture(scope="module")
def seen(report: InsideReport) -> dict[str, Tensor]:
    """All taps of the same tokens in one pass without a cache."""
    tokens = torch.cat([TOKENS, torch.tensor(report.generated)])
    model = make_model(CONFIG)
    with torch.no_grad(), ModelProbe(model, ["layers.*"]) as probe:
        model(Batch.from_lengths(tokens, [len(tokens)]))
    return {name: probe.captures.values(name).double() for name in probe.captures.names()}


def test_attention_is_that_of_one_pass(report: InsideReport, seen: dict[str, Tensor]) -> None:
    (layer,) = report.attention
    p_THS = seen["layers.1.attention.probabilities"]
    close = {"rel": 1e-3, "abs": 1e-5}  # sums in fp32
    assert layer.first_token == pytest.approx(p_THS[1:, :, 0].mean(0).tolist(), **close)
    assert layer.entropy == pytest.approx(torch.special.entr(p_THS).sum(-1).mean(0).tolist(), **close)
    distances = torch.arange(len(p_THS))[:, None] - torch.arange(len(p_THS))
    ends = [*report.bins[1:], math.inf]
    for number, (start, end) in enumerate(zip(report.bins, ends, strict=True)):
        inside = ((distances >= start) & (distances < end)).double()
        share_H = (p_THS * inside[:, None]).sum(-1).mean(0)
        assert [row[number] for row in layer.distance] == pytest.approx(share_H.tolist(), **close)
    assert [sum(row) for row in layer.distance] == pytest.approx([1.0] * len(layer.distance), abs=1e-4)
    received_S = p_THS.mean((0, 1))
    assert layer.top[0].position == int(received_S.argmax())
    assert layer.top[0].share == pytest.approx(float(received_S.max()), rel=1e-3)
    gate_THK = torch.sigmoid(seen["layers.1.attention.gate"])
    assert layer.gate == pytest.approx(gate_THK.mean((0, 2)).tolist(), rel=1e-4)
    assert layer.closed == pytest.approx((gate_THK < 0.1).double().mean((0, 2)).tolist(), abs=1e-6)


def test_states_are_those_of_one_pass(report: InsideReport, seen: dict[str, Tensor]) -> None:
    (layer,) = report.delta
    part = {name.removeprefix("layers.0.delta."): x for name, x in seen.items() if ".delta." in name}
    half_lives = math.log(2) / -part["decay"]
    for found, share in ((layer.half_life_low, 0.1), (layer.half_life, 0.5), (layer.half_life_high, 0.9)):
        assert found == pytest.approx(half_lives.quantile(share, dim=0).tolist(), rel=1e-3)
    assert layer.beta == pytest.approx(part["beta"].mean(0).tolist(), rel=1e-4)
    last_HKV = part["state"][-1]
    assert layer.state_norm == pytest.approx(last_HKV.norm(dim=(1, 2)).tolist(), rel=1e-3)
    reads_TH = part["core_out"].norm(dim=-1) * part["query"].shape[-1] ** 0.5
    # |S^T q|, from the state itself
    q_HK = part["query"][-1].repeat_interleave(len(last_HKV) // part["query"].shape[1], dim=0)
    assert torch.allclose(torch.einsum("hkv,hk->hv", last_HKV, q_HK).norm(dim=-1), reads_TH[-1], rtol=1e-3)
    assert layer.read == pytest.approx(reads_TH[: len(TOKENS)].mean(0).tolist(), rel=1e-3)
    assert layer.decoded_read == pytest.approx(reads_TH[len(TOKENS) :].mean(0).tolist(), rel=1e-3)


def test_reads_are_taken_apart(report: InsideReport, seen: dict[str, Tensor]) -> None:
    """exp(G_t - G_s) (q_t k_s) u_s add up to what the last token reads; their sizes give the shares."""
    (layer,) = report.delta
    q, k, u, g, core = (seen[f"layers.0.delta.{name}"] for name in ("query", "key", "update", "decay", "core_out"))
    repeats = u.shape[1] // k.shape[1]
    q_THK, k_THK = (x.repeat_interleave(repeats, dim=1) for x in (q, k))
    total_TH = g.cumsum(0)
    shares = []
    for t in range(len(q) - 16, len(q)):
        weights_SH = (total_TH[t] - total_TH[: t + 1]).exp() * (q_THK[t] * k_THK[: t + 1]).sum(-1)
        read_HV = (weights_SH[..., None] * u[: t + 1]).sum(0)
        assert torch.allclose(read_HV, core[t] * q.shape[-1] ** 0.5, rtol=1e-3, atol=1e-5)
        parts_SH = weights_SH.abs() * u[: t + 1].norm(dim=-1)
        shares.append(torch.nn.functional.pad(parts_SH / parts_SH.sum(0), (0, 0, 0, len(q) - t - 1)))
    share_S = torch.stack(shares).mean((0, 2))
    assert [each.position for each in layer.top[:2]] == share_S.argsort(descending=True)[:2].tolist()
    assert layer.top[0].share == pytest.approx(float(share_S.max()), rel=1e-3)
    assert sum(layer.distance) == pytest.approx(1.0, rel=1e-4)


def test_effective_rank_of_known_states() -> None:
    from qnext.diagnostics.inside.delta_sums import DeltaSums

    sums = DeltaSums(1, 1)
    equal, single = torch.eye(4, 6), torch.ones(4, 6)
    sums.state_HKV = torch.stack([equal, single])
    assert sums.effective_ranks().tolist() == pytest.approx([4.0, 1.0], rel=1e-4)


def test_no_matrix_of_all_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few queries give the sums of one block."""
    q, k = torch.randn(2, 90, 4, 8, generator=torch.Generator().manual_seed(0))
    text = Attended(q, k[:, :2], k[:, :2], 0.3)
    (_, whole), *others = text.blocks()
    assert not others
    monkeypatch.setattr("qnext.probe.attending._CELLS", 4 * 90 * 7)
    parts = [p for _, p in text.blocks()]
    assert len(parts) == 13 and torch.allclose(torch.cat(parts, 1), whole, atol=1e-7)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "next, all linear"])
def test_families_with_one_kind_of_layer(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PEER_CONFIGS[family]
    found = look_inside(make_model(config), random_tokens(config, 30).tolist())
    assert len(found.layers) == len(found.largest) == config.num_hidden_layers
    assert all(layer.gate == () for layer in found.attention)
    show_inside(found, str)
    assert ("half-life" in capsys.readouterr().out) == (family == "next, all linear")
    write_inside(tmp_path / "a.svg", found, title=family)
    ElementTree.parse(tmp_path / "a.svg")


def test_pictures_have_every_cell(tmp_path: Path, report: InsideReport) -> None:
    values = np.array([[0.0, 0.5, np.nan], [1.0, 0.25, 0.75]])
    panel = Panel("a <panel>", values, ["0", "7"], "head", low=0.0, high=1.0)
    write_panels(tmp_path / "a.svg", [[panel], [panel, panel]], title="several & more")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    boxes = [each for each in root.iter() if each.tag.endswith("rect")]
    assert len(boxes) == 1 + 3 * (5 + 64)  # paper, cells with a number, the scale
    write_inside(tmp_path / "b.png", report, title="a model")
    pixels, colors = read_png((tmp_path / "b.png").read_bytes())
    assert len(np.unique(pixels)) > 20 and len(colors) > 60


def test_texts_that_are_too_short_or_too_long() -> None:
    model = make_model(CONFIG)
    with pytest.raises(UsageError, match="one token"):
        look_inside(model, [1])
    with pytest.raises(DoesNotFit, match="600 tokens, but the context is 512"):
        look_inside(model, [1] * 600)
    assert first_of_bins(9) == [0, 1, 2, 4, 8]
