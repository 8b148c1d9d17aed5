"""Lists of module names: what they match, and patterns that would take too long."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.checkpoint.patterns import ModuleNames, NamePieces, PatternError, module_names
from tests.pace import seconds_of, slowness

LONGEST = "model.layers.10.mlp.experts.127.down_proj"


def test_exact_names_and_patterns_from_the_beginning() -> None:
    names = ModuleNames(["lm_head"], [r".*mlp\.gate$", r"mtp\."])
    assert all(name in names for name in ("lm_head", "model.layers.3.mlp.gate", "mtp.fc"))
    assert not any(name in names for name in ("lm_head2", "model.layers.3.mlp.gate_proj", "model.mtp.fc"))


def test_pieces_are_whole() -> None:
    pieces = NamePieces(["mlp.gate", "layers.1.", "lm_head"])
    assert all(name in pieces for name in ("model.layers.0.mlp.gate", "model.layers.1.self_attn.q_proj", "lm_head"))
    assert not any(
        name in pieces for name in ("model.layers.0.mlp.gate_proj", "model.layers.11.mlp.up_proj", "mlp", "gate")
    )


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*.*)*x",
        r"(a|b)+c",
        r"(.{1,3}){2}",
        ".*" * 8 + "x",
        ".?" * 40 + "." * 40,
        "(.|.)" * 30 + "x",
        r"(?x).* #[",
        "x" * 501,
        "(",
        "[",
        "a{2,1}",
        r"*",
    ],
)
def test_what_could_run_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError) as caught:
        ModuleNames([], [pattern])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*mlp\.gate$",
        r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r".*layers\.\d+\..*experts\.\d+\.(gate|up)_proj",
        r"^(?!.*experts).*",
        r"[^.]+\.fc",
        r"mtp.*",
        r"(?:model|mtp)\.layers\.[0-9]{1,2}\..*",
    ],
)
def test_what_is_written_in_practice_is_accepted(pattern: str) -> None:
    assert (LONGEST in ModuleNames([], [pattern])) == (re.match(pattern, LONGEST) is not None)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"ab.*+?|()[]^\\{}1,$", "(?:", ".*", "\\d+", "proj"]), max_size=30).map("".join))
def test_any_pattern_is_refused_or_ends_soon(pattern: str) -> None:
    try:
        names = ModuleNames([], [pattern])
    except PatternError:
        return
    assert seconds_of(lambda: LONGEST in names) < 5.0 * slowness()


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "_orig_mod.module.", "base_model.model."])
def test_names_inside_wrappers_are_those_of_the_model(wrapper: str) -> None:
    names = module_names([f"{wrapper}model.layers.0.self_attn.q_proj", "lm_head"])
    assert "model.layers.0.self_attn.q_proj" in names
    assert "model.layers.1.self_attn.q_proj" not in names
