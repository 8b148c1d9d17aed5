"""Rotary positions against complex multiplication, YaRN against transformers."""

from __future__ import annotations

import pytest
import torch

from qnext import ops

from .compare import assert_close, randn

RELEASED = {"theta": 1e7, "original_length": 262144, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def test_rotation_is_a_complex_product_on_the_first_dims() -> None:
    x = randn(9, 3, 20, seed=0)
    positions = torch.arange(9) * 11
    frequencies = ops.rope_frequencies(12, theta=100.0)
    rope = ops.rope_cos_sin(positions, frequencies)
    rotated = ops.apply_rope(x, ops.Rope(*(turn.double() for turn in rope)))
    turns = torch.exp(1j * (positions[:, None] * frequencies).double())[:, None]
    expected = torch.complex(x[..., :6], x[..., 6:12]) * turns
    assert_close(rotated[..., :6], expected.real, tolerance=1e-5)
    assert_close(rotated[..., 6:12], expected.imag, tolerance=1e-5)
    assert torch.equal(rotated[..., 12:], x[..., 12:])
    assert torch.equal(rotated[0], x[0])


def test_frequencies() -> None:
    frequencies = ops.rope_frequencies(64, theta=1e7)
    expected = torch.tensor([1e7 ** (-2 * i / 64) for i in range(32)])
    assert frequencies.dtype == torch.float32
    assert torch.allclose(frequencies, expected, rtol=1e-6)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = randn(1, 1, 16, seed=0), randn(1, 1, 16, seed=1)

    def score(at: int, from_: int) -> float:
        q_at, k_at = (
            ops.apply_rope(x, ops.rope_cos_sin(torch.tensor([p]), ops.rope_frequencies(16, theta=1e4)))
            for x, p in ((q, at), (k, from_))
        )
        return (q_at * k_at).sum().item()

    assert score(20, 13) == pytest.approx(score(107, 100), rel=1e-4)
    assert score(20, 13) != pytest.approx(score(20, 14), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    rope = ops.rope_cos_sin(torch.arange(4), ops.rope_frequencies(8, theta=1e4))
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    assert ops.apply_rope(randn(4, 2, 8, seed=0, dtype=dtype), rope).dtype == dtype


def test_the_released_yarn_ramp() -> None:
    """Factor 4 at 262,144 tokens: indices up to 14 stay, from 22 on they are divided, attention factor 1.1386."""
    stretched, attention_factor = ops.yarn_frequencies(64, factor=4.0, attention_factor=None, **RELEASED)
    ratio = ops.rope_frequencies(64, theta=1e7) / stretched
    assert torch.allclose(ratio[:15], torch.ones(15))
    assert torch.allclose(ratio[22:], torch.full((10,), 4.0))
    assert ((ratio[15:22] > 1.0) & (ratio[15:22] < 4.0)).all()
    assert attention_factor == pytest.approx(1.1386, abs=5e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("attention_factor", [None, 1.25])
@pytest.mark.parametrize(("head_dim", "partial", "theta", "original"), [(256, 0.25, 1e7, 262144), (24, 1.0, 1e4, 64)])
def test_yarn_equals_transformers(
    factor: float,
    truncate: bool,
    attention_factor: float | None,
    head_dim: int,
    partial: float,
    theta: float,
    original: int,
) -> None:
    pytest.importorskip("transformers")
    from transformers import Qwen3NextConfig
    from transformers.modeling_rope_utils import _compute_yarn_parameters

    parameters = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "rope_theta": theta,
        "partial_rotary_factor": partial,
        "truncate": truncate,
    }
    if attention_factor is not None:
        parameters["attention_factor"] = attention_factor
    config = Qwen3NextConfig(
        head_dim=head_dim, max_position_embeddings=int(original * factor), rope_parameters=parameters
    )
    expected, expected_factor = _compute_yarn_parameters(config, torch.device("cpu"))
    frequencies, our_factor = ops.yarn_frequencies(
        int(head_dim * partial),
        theta=theta,
        factor=factor,
        original_length=original,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=attention_factor,
        truncate=truncate,
    )
    assert our_factor == pytest.approx(expected_factor)
    assert torch.allclose(frequencies, expected, rtol=1e-6)


def test_the_attention_factor_reaches_the_rotated_dims_only() -> None:
    x = randn(3, 2, 16, seed=0)
    rope = ops.rope_cos_sin(torch.arange(3), ops.rope_frequencies(8, theta=1e4), attention_factor=1.5)
    rotated = ops.apply_rope(x, rope)
    assert_close(rotated[..., :8].norm(dim=-1), 1.5 * x[..., :8].norm(dim=-1), tolerance=1e-6)
    assert torch.equal(rotated[..., 8:], x[..., 8:])
