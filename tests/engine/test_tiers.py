"""Prefixes that come back from the host's memory or from disk, after a restart too, change no answer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from qnext.engine import SamplingParams
from qnext.engine.execution.transfer import read_blocks, read_slot, write_slot
from qnext.engine.storage.fingerprint import fingerprint
from qnext.engine.storage.tiers import PrefixFetch
from qnext.errors import UsageError
from qnext.model import CausalLM
from tests.engine.conversations import alone
from tests.engine.drafting import draft_always
from tests.engine.executors import local, tiers_of
from tests.engine.models import KINDS, NATIVE, needs_native, tiny_model
from tests.engine.tiers import GREEDY, PROMPT, answer, cache_in, full_hit, make_engine, run_lives, store_of, warm
from tests.model.models import make_in_form

FORMS = ["float32", "bfloat16", "int4-g32"]


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_restarts_give_the_same_bits(form: str, tmp_path: Path) -> None:
    model = make_in_form(NATIVE, form)
    assert run_lives(model, tmp_path, seed=FORMS.index(form), num_lives=3, num_requests=7) > 0


@needs_native
def test_restarts_with_drafts_give_the_same_tokens(tmp_path: Path) -> None:
    model = make_in_form(NATIVE, "float32")
    assert run_lives(model, tmp_path, seed=5, num_lives=2, num_requests=10, num_drafts=3) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_restarts_of_every_kind_of_model(kind: str, tmp_path: Path) -> None:
    seed = len(kind)
    assert run_lives(tiny_model(kind), tmp_path, seed=seed, num_lives=2, num_requests=6, bits=False) > 0


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(200, 206))
def test_many_restarts(form: str, seed: int, tmp_path: Path) -> None:
    model = make_in_form(NATIVE, form)
    assert run_lives(model, tmp_path, seed=seed, num_lives=5, num_requests=40, num_drafts=seed % 4) > 0


def test_what_was_evicted_comes_back_from_disk(model: CausalLM, tmp_path: Path) -> None:
    with make_engine(model, tmp_path, num_checkpoints=1, num_blocks=20) as engine:
        wanted, _ = answer(engine)
        for first in range(3):
            answer(engine, [first + 50, *PROMPT[1:]])
        assert store_of(engine).statistics().num_hits == 0
        assert answer(engine) == (wanted, full_hit(engine))
        assert store_of(engine).statistics().num_hits > 0


def test_what_was_evicted_comes_back_from_the_host(model: CausalLM) -> None:
    with make_engine(model, None, num_checkpoints=1, num_blocks=20, host_cache_bytes=1 << 22) as engine:
        assert tiers_of(engine) is not None
        tiers_of(engine).min_tokens = 8
        wanted, _ = answer(engine)
        for first in range(3):
            answer(engine, [first + 50, *PROMPT[1:]])
        assert answer(engine) == (wanted, full_hit(engine))
        assert tiers_of(engine).reader._threads == set(), "nothing was read by a thread"


def test_what_the_host_has_no_room_for_goes_to_disk(model: CausalLM, tmp_path: Path) -> None:
    with make_engine(model, tmp_path, num_checkpoints=1, num_blocks=20, host_cache_bytes=1 << 18) as engine:
        for first in range(8):
            answer(engine, [first, *PROMPT[1:]])
        assert tiers_of(engine) is not None and tiers_of(engine).host is not None
        assert 0 < tiers_of(engine).host.used_bytes <= 1 << 18
        assert store_of(engine).statistics().num_entries > 0
    with make_engine(model, tmp_path) as engine:
        assert [answer(engine, [first, *PROMPT[1:]])[1] for first in range(8)] == [full_hit(engine)] * 8


@needs_native
def test_an_engine_that_drafts_goes_on_from_disk(tmp_path: Path) -> None:
    """What the MTP layer keeps is not stored: it begins anew, and engines with and without it share a folder."""
    model = make_in_form(NATIVE, "float32", num_nextn_predict_layers=1)
    wanted = None
    for num_cached in (0, len(PROMPT) - 1):
        with make_engine(model, tmp_path) as engine:
            draft_always(engine, seed=num_cached)
            output_ids, cached = answer(engine)
            assert wanted in (None, output_ids) and cached == num_cached
            wanted = output_ids
            of_drafting = fingerprint(model, local(engine).cache)
    assert wanted == alone(model, PROMPT, GREEDY, 6)[0]
    assert of_drafting == fingerprint(model, local(make_engine(model, None, speculation=False)).cache)


@needs_native
def test_requests_that_were_sent_back_go_on_from_disk(tmp_path: Path) -> None:
    """Two answers grow until the blocks are gone, and what the younger one had is evicted before its turn comes."""
    model = make_in_form(NATIVE, "float32")
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [list(range(1, 41)), list(range(2, 42))]
    wanted = [alone(model, prompt, params, 100)[0] for prompt in prompts]
    with make_engine(model, tmp_path, num_blocks=12) as engine:
        requests = [engine.add_request(prompt, params) for prompt in prompts]
        while engine.has_unfinished:
            engine.step()
            engine.check_integrity()
        assert engine.scheduler.num_preemptions > 0
        assert store_of(engine).statistics().num_hits > 0
        assert [request.output_ids for request in requests] == wanted


def test_salts_share_nothing_on_disk(model: CausalLM, tmp_path: Path) -> None:
    wanted = warm(model, tmp_path, salt="a")
    with make_engine(model, tmp_path) as engine:
        assert answer(engine, salt="b") == (wanted, 0)
        assert answer(engine, salt="") == (wanted, 0)
        assert answer(engine, salt="a") == (wanted, full_hit(engine))


def test_others_go_on_while_a_prefix_is_read(model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = warm(model, tmp_path)
    go, read = threading.Event(), PrefixFetch._read_rest

    def held(fetch: PrefixFetch) -> None:
        assert go.wait(60)
        read(fetch)

    monkeypatch.setattr(PrefixFetch, "_read_rest", held)
    with make_engine(model, tmp_path) as engine:
        late = engine.add_request(PROMPT, GREEDY)
        aborted = engine.add_request([*PROMPT[:-1], 3], GREEDY)
        assert answer(engine, [1, 2, 3])[1] == 0
        assert late.num_cached_tokens is None and not late.output_ids
        assert engine.step() == [], "nothing else to do: it waits a moment"
        fetch = engine.scheduler.sequences[aborted.id].fetch
        assert isinstance(fetch, PrefixFetch) and fetch._future is None, "one at a time"
        engine.abort(aborted.id)
        go.set()
        while late.finish_reason is None:
            engine.step()
            engine.check_integrity()
        assert (late.output_ids, late.num_cached_tokens) == (wanted, full_hit(engine))


def test_an_engine_is_closed_while_a_prefix_is_read(model: CausalLM, tmp_path: Path) -> None:
    warm(model, tmp_path)
    engine = make_engine(model, tmp_path)
    engine.add_request(PROMPT, GREEDY)
    engine.step()
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.add_request(PROMPT, GREEDY)
    make_engine(model, tmp_path).close()  # the folder is free again


def test_a_copy_that_was_to_be_made_with_the_next_step_is_kept_too(model: CausalLM, tmp_path: Path) -> None:
    with make_engine(model, tmp_path) as engine:
        engine.add_request(PROMPT, GREEDY)
        engine.step()
        assert engine.scheduler.sharing.has_work
    with make_engine(model, tmp_path) as engine:
        assert answer(engine) == (alone(model, PROMPT, GREEDY, 6)[0], full_hit(engine))


@pytest.mark.parametrize("num_cached", [127, 128, 129, 143, 144])
def test_prefixes_that_end_with_a_block_or_a_chunk(model: CausalLM, tmp_path: Path, num_cached: int) -> None:
    prompt = PROMPT[: num_cached + 1]
    with make_engine(model, tmp_path) as engine:
        wanted, _ = answer(engine, prompt)
    with make_engine(model, tmp_path) as engine:
        grid = engine.scheduler.limits.chunk_size
        assert answer(engine, prompt) == (wanted, num_cached // grid * grid)


def test_a_conversation_keeps_its_tokens_once(model: CausalLM, tmp_path: Path) -> None:
    """Full chunks of earlier turns are not written again."""
    with make_engine(model, tmp_path, disk_cache=cache_in(tmp_path, at_once=True)) as engine:
        for length in (100, 120, 140):
            answer(engine, PROMPT[:length])
        index = store_of(engine)._index.values()
        assert [entry.header.num_tokens for entry in index if entry.header.kind == "kv"].count(64) == 1
        assert sum(entry.header.kind == "kv" for entry in index) == 4


def test_what_was_used_again_stays_as_a_whole(model: CausalLM, tmp_path: Path) -> None:
    """The disk holds two prefixes; of three, the one that was not used again goes."""
    prompts = [[first, *PROMPT[1:]] for first in range(3)]
    with make_engine(model, tmp_path / "one", disk_cache=cache_in(tmp_path / "one", at_once=True)) as engine:
        answer(engine, prompts[0])
        num_bytes = store_of(engine).statistics().entry_bytes
    two = cache_in(tmp_path / "two", max_bytes=2 * num_bytes + 1000, at_once=True)
    with make_engine(model, None, disk_cache=two) as engine:
        for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
            answer(engine, prompt)
            store_of(engine).flush()
        assert store_of(engine).statistics().num_hits == 0, "the second use was in memory"
        chunks = [store_of(engine).lengths("kv", b"", prompt, limit=150) for prompt in prompts]
        assert chunks[0] == chunks[2] == [32, 64, 96, 128] and len(chunks[1]) < 4


@torch.inference_mode()
def test_what_drafts_left_in_a_slot_is_no_part_of_what_comes(model: CausalLM) -> None:
    cache = local(make_engine(model, None, poison=False, max_draft_tokens=2)).cache
    generator = torch.Generator().manual_seed(0)
    for layer in cache.delta.values():
        assert layer.pending is not None
        for tensor in (layer.conv, layer.state, *layer.pending):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    cache.commit(1, 2)
    other = {name: tensor.clone() for name, tensor in read_slot(cache, 0).items()}
    write_slot(cache, 1, other)
    for name, tensor in read_slot(cache, 1).items():
        assert torch.equal(tensor, other[name])


def test_nothing_that_another_wrote_behind_a_prefix_is_kept(model: CausalLM) -> None:
    cache = local(make_engine(model, None)).cache
    for name, tensor in read_blocks(cache, [4, 2, 7], num_tokens=21).items():
        assert len(tensor) == 2, "a third block is not needed"
        assert tensor[1, :, :5].isnan().all(), f"{name} was never written"
        assert not tensor[1, :, 5:].any()
