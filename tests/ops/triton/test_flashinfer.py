"""Pieces of prompts by flashinfer: what it is given, when it serves, what happens when it is wrong."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import DeltaInputs, Packing, reference
from qnext.ops import triton as gpu
from qnext.ops.reference.attention import attend
from qnext.ops.torch.delta import gated_delta_rule
from qnext.ops.triton.outside import fits_piece_attention, fits_prompt_rule

from ..compare import assert_close
from ..test_delta_mixer import Sizes, make_cache, make_inputs
from .device import DEVICE, exact, here
from .packages import put_module
from .test_attention import make_call, run
from .test_delta_step import assert_same_caches, mixer_arguments, step, wanted_step

HEADS = Sizes(1, 1, 128, 128, 4)
BF16 = torch.bfloat16


class FakeFlashinfer:
    """Computes by the reference, wrongly where `error` is not one, and keeps the numbers of tokens of its calls."""

    def __init__(self) -> None:
        self.error = 1.0
        self.delta_calls: list[tuple[int, object]] = []
        self.attention_calls: list[int] = []
        self.num_plans = 0

    def chunk_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        output: Tensor | None = None,
        output_state: Tensor | None = None,
        use_cp: str | bool = "auto",
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[T, H, .] each; g is the factor of decay, states lie [N, H, V, K]."""
        assert g is not None and beta is not None and scale is not None and cu_seqlens is not None
        assert output_final_state and not use_qk_l2norm_in_kernel and output is output_state is None
        assert all(x.is_contiguous() for x in (q, k, v, g, beta, cu_seqlens))
        assert {x.dtype for x in (q, k, v)} == {BF16} and {g.dtype, beta.dtype} == {torch.float32}
        num_heads = v.shape[1]
        assert q.shape == k.shape and num_heads % k.shape[1] == 0 and g.shape == beta.shape == v.shape[:2]
        assert q.shape[2] == v.shape[2] == 128 and g.min() >= 0.0 and g.max() <= 1.0
        lengths = cu_seqlens.diff().tolist()
        assert cu_seqlens.dtype == torch.int64 and type(max_seqlen) is int and max_seqlen == max(lengths)
        if initial_state is not None:
            assert initial_state.shape == (len(lengths), num_heads, 128, 128) and initial_state.is_contiguous()
            assert initial_state.dtype == torch.float32
            initial_state = initial_state.transpose(2, 3)
        self.delta_calls.append((len(q), use_cp))
        inputs = DeltaInputs(q.float() * (scale * 128**0.5), k.float(), v.float(), self.error * g.log(), beta)
        o, state = gated_delta_rule(inputs, packing=Packing(lengths, device=q.device), initial_state_NHKV=initial_state)
        return o.to(BF16), state.transpose(2, 3).contiguous()

    def make_wrapper(self) -> type:
        fake = self

        class BatchPrefillWithPagedKVCacheWrapper:
            def __init__(
                self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto"
            ) -> None:
                assert (float_workspace_buffer.dtype, kv_layout, backend) == (torch.uint8, "HND", "fa3")
                self._lengths = torch.empty(8, dtype=torch.int32, device=float_workspace_buffer.device)

            def plan(
                self,
                qo_indptr: Tensor,
                paged_kv_indptr: Tensor,
                paged_kv_indices: Tensor,
                paged_kv_last_page_len: Tensor,
                num_qo_heads: int,
                num_kv_heads: int,
                head_dim_qk: int,
                page_size: int,
                *,
                causal: bool = False,
                sm_scale: float | None = None,
                q_data_type: torch.dtype = torch.float16,
                kv_data_type: torch.dtype | None = None,
            ) -> None:
                on_host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
                assert all(x.device.type == "cpu" and x.dtype == torch.int32 for x in on_host)
                assert paged_kv_indices.dtype == torch.int32 and len(paged_kv_indices) == paged_kv_indptr[-1]
                assert causal and sm_scale is not None and q_data_type == kv_data_type == BF16
                assert paged_kv_last_page_len.min() >= 1 and paged_kv_last_page_len.max() <= page_size
                lengths = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
                self._lengths[: len(lengths)].copy_(lengths)  # fails for memory that was made in inference
                self._sizes = (num_qo_heads, num_kv_heads, page_size, head_dim_qk)
                self._starts, self._first_pages = qo_indptr.tolist(), paged_kv_indptr.tolist()
                self._pages, self._scale = paged_kv_indices.long(), sm_scale
                fake.num_plans += 1

            def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
                assert {x.dtype for x in (q, *paged_kv_cache, out)} == {BF16} and q.is_contiguous()
                num_heads, *of_page = self._sizes
                assert q.shape == out.shape == (self._starts[-1], num_heads, of_page[-1])
                assert all(list(pages.shape[1:]) == of_page and pages.is_contiguous() for pages in paged_kv_cache)
                fake.attention_calls.append(len(q))
                for n, length in enumerate(self._lengths[: len(self._starts) - 1].tolist()):
                    numbers = self._pages[self._first_pages[n] : self._first_pages[n + 1]]
                    k, v = (pages[numbers].transpose(1, 2).flatten(0, 1)[:length].float() for pages in paged_kv_cache)
                    part = slice(self._starts[n], self._starts[n + 1])
                    out[part] = attend(q[part].float(), k, v, self._scale * fake.error).to(BF16)
                return out

        return BatchPrefillWithPagedKVCacheWrapper


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlashinfer]:
    """Stands there as flashinfer. Nobody has been asked yet."""
    made = FakeFlashinfer()
    put_module(monkeypatch, "flashinfer.gdn_prefill", chunk_gated_delta_rule=made.chunk_gated_delta_rule)
    put_module(monkeypatch, "flashinfer.prefill", BatchPrefillWithPagedKVCacheWrapper=made.make_wrapper())
    forget()
    yield made
    forget()


def forget() -> None:
    gpu.prompt_rule.cache_clear()
    gpu.piece_attention.cache_clear()


def attention_call(lengths: list[int], contexts: list[int], *, dim: int = 256) -> dict[str, Any]:
    """A call in bf16 whose lengths the host knows."""
    call = make_call(lengths, contexts, heads=2, kv_heads=1, dim=dim, dtype=BF16)
    pages = [page.to(BF16) for page in call["cache"][:2]]
    cache = call["cache"]._replace(k_pages=pages[0], v_pages=pages[1], host_lengths=tuple(contexts))
    return call | {"cache": cache, "weights": call["weights"]._replace(scale=256**-0.5)}


@torch.inference_mode()
def test_the_delta_rule_of_prompts(fake: FakeFlashinfer) -> None:
    """The mixer over slots: outputs and states are the reference's, behind a state and from the start."""
    inputs, slots = make_inputs(67, HEADS, dtype=BF16), [5, 0]
    ours, theirs = here(make_cache(HEADS, slots, fresh=(1,))), exact(make_cache(HEADS, slots, fresh=(1,)))
    actual = step(inputs, [64, 3], ours)
    assert fake.delta_calls == [*[(79, how) for how in ("auto", False)] * 2, (67, "auto")]
    assert actual.dtype == BF16
    assert_close(actual, wanted_step(inputs, [64, 3], theirs), tolerance=2e-2)  # q, k and v are rounded to bf16
    assert_same_caches(ours, theirs, tolerance=2e-2)


def test_what_the_delta_rule_of_prompts_does_not_serve() -> None:
    rows, weights = torch.zeros(1, dtype=BF16), mixer_arguments(make_inputs(1, HEADS), [1])[2]
    assert fits_prompt_rule(rows, weights, Packing([64, 1]))
    assert not fits_prompt_rule(rows, weights, Packing([63, 1]))
    assert not fits_prompt_rule(rows.float(), weights, Packing([64]))
    assert not fits_prompt_rule(rows, weights._replace(key_head_dim=64), Packing([64]))


@torch.inference_mode()
def test_attention_of_prompts(fake: FakeFlashinfer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a context and from the start; one plan for all layers of a step, and another one for the next step."""
    monkeypatch.setattr("qnext.ops.triton.outside.attention.MIN_PIECE", 7)  # Triton's interpreter takes its time
    for count, (lengths, contexts) in enumerate((([2, 7], [33, 7]), ([8], [14])), start=1):
        call = attention_call(lengths, contexts)
        wanted, _ = run(exact(call), reference.attention_mixer, torch.device("cpu"))
        there, packing = here(call), Packing(lengths, device=DEVICE)
        for _ in range(3 - count):
            actual = ops.attention_mixer(
                *there["rows"], there["weights"], rope=there["rope"], packing=packing, cache=there["cache"]
            )
            assert_close(actual.cpu(), wanted, tolerance=2e-2)  # rounded before the gate and after it
        assert fake.num_plans == 1 + count  # one of the self-test
    assert fake.attention_calls == [143, 143, 9, 9, 8]


@pytest.mark.parametrize("kind", ["recorded", "short", "narrow", "wide pages", "wide queries"])
def test_what_attention_of_prompts_does_not_serve(kind: str) -> None:
    """A recorded step has no lengths for the host, whatever lengths it has."""
    cache = attention_call([64], [64], dim=128 if kind == "narrow" else 256)["cache"]
    packing, q_THK = Packing([64]), torch.zeros(64, 2, cache.k_pages.shape[-1], dtype=BF16)
    assert fits_piece_attention(q_THK, cache, packing) == (kind != "narrow")
    if kind == "recorded":
        cache = cache._replace(host_lengths=None)
    elif kind == "short":
        packing = Packing([63, 1])
    elif kind == "wide pages":
        cache = cache._replace(k_pages=cache.k_pages.float(), v_pages=cache.v_pages.float())
    elif kind == "wide queries":
        q_THK = q_THK.float()
    assert not fits_piece_attention(q_THK, cache, packing)


def test_one_that_is_wrong_is_named_once_and_not_used(fake: FakeFlashinfer) -> None:
    fake.error = 0.5
    with pytest.warns(RuntimeWarning, match="delta rule of flashinfer is off by .*; another serves") as seen:
        assert gpu.prompt_rule(DEVICE) is None and gpu.prompt_rule(DEVICE) is None
    assert len(seen) == 1
    with pytest.warns(RuntimeWarning, match="attention over pages of flashinfer is off by .*; another serves") as seen:
        assert gpu.piece_attention(DEVICE) is None and gpu.piece_attention(DEVICE) is None
    assert len(seen) == 1


def test_one_that_may_not_serve_is_not_asked(fake: FakeFlashinfer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNEXT_PACKAGES", "flash-qla")
    assert gpu.prompt_rule(DEVICE) is None and gpu.piece_attention(DEVICE) is None
    assert not fake.delta_calls and not fake.attention_calls


def test_one_that_cannot_be_imported_is_passed_over(fake: FakeFlashinfer, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("gdn_prefill", "prefill"):
        monkeypatch.setitem(sys.modules, f"flashinfer.{part}", None)
    with pytest.warns(RuntimeWarning, match="delta rule of flashinfer cannot be imported .ModuleNotFoundError"):
        assert gpu.prompt_rule(DEVICE) is None
    with pytest.warns(RuntimeWarning, match="pages of flashinfer cannot be imported .ModuleNotFoundError"):
        assert gpu.piece_attention(DEVICE) is None


def test_what_bits_depend_on_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes on disk that it computed are not those of our own kernels."""
    own, version = ops.arithmetic_of(DEVICE), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.8" if "flashinfer" in name else version(name))
    assert "flashinfer 9.8 " in ops.arithmetic_of(DEVICE) != own
    monkeypatch.setenv("QNEXT_PACKAGES", "none")
    assert "flashinfer" not in ops.arithmetic_of(DEVICE)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_the_installed_one_is_right() -> None:
    pytest.importorskip("flashinfer")
    if torch.cuda.get_device_capability(DEVICE)[0] != 9:
        pytest.skip("its kernels that are asked are for Hopper")
    forget()
    assert gpu.prompt_rule(DEVICE) is not None and gpu.piece_attention(DEVICE) is not None
    forget()
