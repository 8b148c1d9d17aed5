"""Which tensor of a model gets which scheme."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qnext.checkpoint.names import disk_parts
from qnext.config import preset
from qnext.errors import UsageError
from qnext.planning import list_parameters
from qnext.quant.scheme import SCHEMES, make_policy

HIGH = ("norm", "mlp.gate.", "shared_expert_gate", "in_proj_ba", "conv1d", "A_log", "dt_bias", "embed_tokens", "mtp.fc")


@pytest.mark.parametrize("name", ["80b-a3b", "qwen3-32b", "qwen3-30b-a3b"])
def test_released_models_keep_what_decides_and_round_the_rest(name: str) -> None:
    config = preset(name).with_layers(4)
    policy = make_policy("int4-g128", head=None, is_tied=False)
    for tensor, info in list_parameters(config).items():
        scheme = policy.scheme_of(info)
        if any(mark in tensor for mark in HIGH):
            assert scheme is None, tensor
        elif tensor == "lm_head.weight":
            assert scheme == SCHEMES["int8-g128"]
        else:
            assert scheme == SCHEMES["int4-g128"], tensor


def test_policy_agrees_with_the_official_fp8_checkpoint() -> None:
    """It converts the same matrices (spec of the released FP8 checkpoint), MTP's among them; only the head differs."""
    config = preset("80b-a3b").with_layers(4)
    policy = make_policy("int8", head="keep", is_tied=False)
    kinds = {"in_proj_qkvz", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    infos = list_parameters(config).values()
    rounded = [part.name for info in infos if policy.scheme_of(info) for part in disk_parts(info)]
    assert {name.split(".")[-2] for name in rounded} == kinds
    assert any(name.startswith("mtp.layers.0.mlp.experts.") for name in rounded)


def test_inputs_that_are_no_whole_groups_stay() -> None:
    config = replace(preset("nano-5m"), moe_intermediate_size=48)
    policy = make_policy("int4-g64", head=None, is_tied=True)
    infos = list_parameters(config)
    names = [f"model.layers.0.mlp.experts.{kind}_proj" for kind in ("down", "gate_up")]
    assert [policy.scheme_of(infos[name]) is None for name in names] == [True, False]


@pytest.mark.parametrize(
    ("head", "is_tied", "expected"),
    [(None, False, "int8-g64"), (None, True, None), ("keep", False, None), ("int4", False, "int4-g64")],
)
def test_head(head: str | None, is_tied: bool, expected: str | None) -> None:
    policy = make_policy("int4-g64", head=head, is_tied=is_tied)
    assert (policy.head.name if policy.head else None) == expected


@pytest.mark.parametrize(
    ("name", "head", "is_tied", "wrong"),
    [
        ("int3", None, False, "int3"),
        ("", None, False, "int4-g32"),
        ("int4-g32", "int2", False, "int2"),
        ("int4-g32", "int8", True, "keep"),
    ],
)
def test_unknown_words_are_refused(name: str, head: str | None, is_tied: bool, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        make_policy(name, head=head, is_tied=is_tied)
