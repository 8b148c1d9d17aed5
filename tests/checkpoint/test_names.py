"""Names and shapes on disk."""

from __future__ import annotations

from math import prod

import pytest
import torch

from qnext.checkpoint.names import disk_parts, expected_tensors, is_leftover
from qnext.config import PRESETS, preset
from qnext.planning import Kind, ParameterInfo, count_parameters

from .folders import CONFIGS


def test_released_checkpoint() -> None:
    """75,944 tensors, 1,553 of them MTP, with the published element counts."""
    tensors = expected_tensors(preset("80b-a3b"))
    mtp = {name: shape for name, shape in tensors.items() if name.startswith("mtp.")}
    assert (len(tensors), len(mtp)) == (75_944, 1_553)
    assert sum(map(prod, mtp.values())) == 1_650_471_424
    assert sum(map(prod, tensors.values())) == 79_674_391_296 + 1_650_471_424
    for name, shape in {
        "model.layers.0.linear_attn.in_proj_qkvz.weight": (12288, 2048),
        "model.layers.46.linear_attn.conv1d.weight": (8192, 1, 4),
        "model.layers.3.self_attn.q_proj.weight": (8192, 2048),
        "model.layers.47.mlp.experts.511.down_proj.weight": (2048, 512),
        "model.layers.47.mlp.shared_expert_gate.weight": (1, 2048),
        "mtp.fc.weight": (2048, 4096),
        "mtp.layers.0.mlp.experts.0.gate_proj.weight": (512, 2048),
    }.items():
        assert tensors[name] == shape


@pytest.mark.parametrize("name", [*PRESETS, *CONFIGS])
def test_no_element_is_lost(name: str) -> None:
    config = CONFIGS[name] if name in CONFIGS else preset(name)
    assert sum(map(prod, expected_tensors(config).values())) == count_parameters(config).total


def test_parts_cover_a_stacked_parameter_once() -> None:
    for kind, rows in ((Kind.EXPERTS_GATE_UP, 4), (Kind.EXPERTS_DOWN, 8)):
        info = ParameterInfo("model.layers.2.mlp.experts.x", (3, 8, 5), kind, "experts", layer=2, expert_axis=0)
        covered = torch.zeros(info.shape, dtype=torch.long)
        for part in disk_parts(info):
            assert part.shape == (rows, 5)
            assert covered[part.place].shape == part.shape
            covered[part.place] += 1
        assert (covered == 1).all()


def test_gate_rows_come_first() -> None:
    name = "mtp.layers.0.mlp.experts.gate_up_proj"
    gate, up = disk_parts(ParameterInfo(name, (1, 6, 2), Kind.EXPERTS_GATE_UP, "mtp", layer=4, expert_axis=0))
    assert (gate.name, gate.rows) == ("mtp.layers.0.mlp.experts.0.gate_proj.weight", (0, 3))
    assert (up.name, up.rows) == ("mtp.layers.0.mlp.experts.0.up_proj.weight", (3, 6))


def test_leftovers() -> None:
    assert is_leftover("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert is_leftover("model.rotary_emb.inv_freq")
    assert not is_leftover("model.inv_freq")
    assert not is_leftover("model.rotary_emb.inv_freq.weight")
