"""A model on a device whose experts wait on the host: from the folder to the tokens of an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.hosted import DeviceRoom, hosted_bytes
from qnext.checkpoint.quantize import quantize_folder
from qnext.errors import DoesNotFit, UsageError
from qnext.model import CausalLM, SparseMoE
from qnext.ops import HostedWeight
from qnext.quant.scheme import make_policy
from qnext.residency.ahead import NUM_PLACES
from qnext.residency.hosted import HostedExperts
from qnext.session import folder as session
from tests.engine.drafting import make_engine, prompts_of
from tests.engine.models import tiny_model
from tests.other_device.device import OtherDevice, other_device
from tests.other_device.test_engine import PARAMS


def answers(model: CausalLM) -> list[tuple[int, ...]]:
    engine = make_engine(model, speculation=False)
    together = engine.generate(prompts_of(model, [40, 3, 1]), PARAMS)
    return [each.output_ids for each in (*together, *engine.generate([[5, 6]], PARAMS[0]))]


@pytest.mark.parametrize("scheme", [None, "int4-g32"])
def test_answers_are_those_of_experts_on_the_device(
    scheme: str | None, tmp_path: Path, other: OtherDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    save_model(tiny_model("hybrid"), plain)
    path = plain if scheme is None else tmp_path / "codes"
    if scheme is not None:
        quantize_folder(plain, path, policy=make_policy(scheme, head="keep", is_tied=False), is_calibrated=False)
    whole = load_model(path, device=other_device())
    layers = [each.experts for each in whole.modules() if isinstance(each, SparseMoE)]
    of_layer = layers[0].gate_up_proj.nbytes + layers[0].down_proj.nbytes
    assert hosted_bytes(read_layout(path), None, other_device()) == pytest.approx(
        of_layer * len(layers), rel=0.01
    )  # and shapes
    three_of_each = of_layer + (3 * len(layers) + NUM_PLACES) * (of_layer // 5)
    monkeypatch.setattr(session, "choose_device", lambda wanted: other_device())
    opened = session.open_model(str(path), expert_memory=three_of_each)
    hosted = session.load_weights(opened)
    assert answers(hosted) == answers(whole)
    engine = make_engine(hosted, speculation=False)
    engine.generate([[5, 6]], PARAMS[0])
    reads = engine.metrics.experts
    assert reads is not None and reads.num_resident == 3 * len(layers) and reads.num_experts == 5 * len(layers)
    assert reads.all_misses > 0 and reads.all_hits > 0 and reads.bytes_read > 0 and reads.seconds_waited is None
    for layer in (each.experts for each in hosted.modules() if isinstance(each, SparseMoE)):
        for weight in (layer.gate_up_proj, layer.down_proj):
            assert isinstance(weight, HostedWeight) and all(part.device.type == "cpu" for part in weight.tensors)
            assert isinstance(weight.experts, HostedExperts)
            counts = weight.experts.counts
            assert counts["hits"] + counts["sweep_hits"] > 0 and counts["misses"] + counts["sweep_misses"] > 5
    with pytest.raises(DoesNotFit, match="the experts of a layer and 2 of each need"):
        load_model(path, device=other_device(), residency=DeviceRoom(of_layer))


def test_a_dense_model_has_none_that_could_wait(tmp_path: Path, other: OtherDevice) -> None:
    save_model(tiny_model("dense"), tmp_path / "m")
    with pytest.raises(UsageError, match="--expert-memory is for models with experts"):
        load_model(tmp_path / "m", device=other_device(), residency=DeviceRoom(1 << 20))
