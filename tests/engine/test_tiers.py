"""Prefixes that come back from the host's memory or from disk, after a restart too, change no answer."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qnext.engine import DiskCache, Engine, SamplingParams
from qnext.engine.scheduling.archive import Load
from qnext.engine.storage import disk
from qnext.engine.storage.disk import ENTRY_SUFFIX, DiskStore
from qnext.engine.storage.fingerprint import fingerprint, weights_digest
from qnext.engine.storage.host import HostStore
from qnext.engine.storage.tiers import PrefixFetch, Tiers
from qnext.engine.storage.transfer import read_blocks, read_slot, write_slot
from qnext.errors import UsageError
from qnext.model import CausalLM
from tests.engine.models import KINDS, tiny_model
from tests.engine.test_drafter import draft_always
from tests.engine.test_hybrid_cache import (
    MAX_LEN,
    NATIVE,
    Answer,
    Conversations,
    KeepingRunner,
    alone,
    needs_native,
)
from tests.model.models import make_in_form

FORMS = ["float32", "bfloat16", "int4-g32"]
ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPT = [7 * i % 50 for i in range(150)]


def cache_in(folder: Path, *, max_bytes: int = 1 << 26, at_once: bool = False, queue_bytes: int = 1 << 26) -> DiskCache:
    return DiskCache(
        folder, max_bytes, at_once=at_once, min_tokens=8, chunk_tokens=32, queue_bytes=queue_bytes
    )  # fmt: skip


def make_engine(model: CausalLM, folder: Path | None, **options: object) -> Engine:
    settings: dict[str, object] = {"max_num_seqs": 2, "max_model_len": MAX_LEN, "poison": True, **options}
    if folder is not None:
        settings.setdefault("disk_cache", cache_in(folder))
    engine = Engine(model, **settings)  # type: ignore[arg-type]
    assert engine.scheduler.prefixes is not None
    engine.scheduler.prefixes.min_tokens = 4
    return engine


def store_of(engine: Engine) -> DiskStore:
    assert engine.tiers is not None and engine.tiers.disk is not None
    return engine.tiers.disk


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def serve(
    engine: Engine, rng: random.Random, conversations: Conversations, num_requests: int, *, num_drafts: int = 0
) -> list[Answer]:
    """Requests that come and are aborted at random, each with what it would get alone. Some drafts are right."""
    engine.runner = runner = KeepingRunner(engine)
    answers: list[Answer] = []
    while len(answers) < num_requests or engine.has_unfinished:
        for _ in range(rng.randint(0, 2) if len(answers) < num_requests else 0):
            prompt, params = conversations.prompt(), conversations.params()
            assert params.max_tokens is not None
            wanted, wanted_rows = alone(engine.model, prompt, params, params.max_tokens)
            request = engine.add_request(prompt, params, salt=rng.choice(("", "", "b")))
            answers.append(Answer(request, wanted, wanted_rows, runner.rows.setdefault(request.id, [])))
            conversations.history.append(prompt + wanted)
        if rng.random() < 0.03 and engine.has_unfinished:
            engine.abort(rng.choice([a.request.id for a in answers[-8:]]))
        for request, wanted, _, _ in answers[-10:]:
            if num_drafts and request.output_ids:
                next_ids = wanted[len(request.output_ids) :][: rng.randint(0, num_drafts)]
                spoiled = rng.randrange(2 * num_drafts)
                request.drafts = tuple(3 if i == spoiled else t for i, t in enumerate(next_ids))
        engine.step()
        engine.check_integrity()
    return answers


def check(answers: list[Answer], *, bits: bool) -> None:
    for request, wanted, wanted_rows, rows in answers:
        whole = request.finish_reason == "length"
        assert request.output_ids == (wanted if whole else wanted[: len(request.output_ids)])
        if rows and bits:
            assert torch.equal(torch.stack(rows), wanted_rows[: len(rows)])


def run_lives(
    model: CausalLM,
    folder: Path,
    *,
    seed: int,
    num_lives: int,
    num_requests: int,
    num_drafts: int = 0,
    bits: bool = True,
) -> int:
    """Engines of different sizes, one after another on the same folder, each far too small for its requests.

    Gives how many entries were read from disk.
    """
    rng = random.Random(seed)
    conversations = Conversations(rng, model.config.vocab_size)
    num_read = 0
    for life in range(num_lives):
        engine = make_engine(
            model, None, max_num_seqs=rng.randint(2, 4), num_blocks=rng.randint(17, 26),
            num_checkpoints=rng.randint(1, 5),
            max_num_batched_tokens=rng.choice((70, 100, 300)), checkpoint_interval=rng.choice((0, 50)),
            max_draft_tokens=num_drafts, host_cache_bytes=rng.choice((None, 1 << 17, 1 << 20)),
            disk_cache=cache_in(folder, max_bytes=rng.choice((1 << 19, 1 << 24)), at_once=rng.random() < 0.3),
        )  # fmt: skip
        with engine:
            answers = serve(engine, rng, conversations, num_requests, num_drafts=num_drafts)
            check(answers, bits=bits and not num_drafts)
            num_read += store_of(engine).statistics().num_hits
            bound, store = store_of(engine).max_bytes, store_of(engine)
            store.flush()
            assert folder_bytes(folder) <= bound
        assert folder_bytes(folder) <= bound
        assert store.statistics().num_damaged == store.statistics().num_failed_writes == 0
        assert any(folder.glob("*" + ENTRY_SUFFIX)), f"life {life} left nothing"
    return num_read


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


def answer(engine: Engine, prompt: list[int] = PROMPT, *, salt: str = "") -> tuple[list[int], int]:
    """Tokens of the answer, and how many of the prompt were cached."""
    request = engine.add_request(prompt, GREEDY, salt=salt)
    while request.finish_reason is None:
        engine.step()
        engine.check_integrity()
    assert request.num_cached_tokens is not None
    return request.output_ids, request.num_cached_tokens


def warm(model: CausalLM, folder: Path, *, salt: str = "") -> list[int]:
    with make_engine(model, folder) as engine:
        tokens, cached = answer(engine, salt=salt)
        assert cached == 0
    return tokens


@pytest.fixture
def model() -> CausalLM:
    return tiny_model("hybrid")


def full_hit(engine: Engine) -> int:
    grid = engine.scheduler.limits.chunk_size
    return (len(PROMPT) - 1) // grid * grid


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
        assert engine.tiers is not None
        engine.tiers.min_tokens = 8
        wanted, _ = answer(engine)
        for first in range(3):
            answer(engine, [first + 50, *PROMPT[1:]])
        assert answer(engine) == (wanted, full_hit(engine))
        assert engine.tiers.reader._threads == set(), "nothing was read by a thread"


def test_what_the_host_has_no_room_for_goes_to_disk(model: CausalLM, tmp_path: Path) -> None:
    with make_engine(model, tmp_path, num_checkpoints=1, num_blocks=20, host_cache_bytes=1 << 16) as engine:
        for first in range(8):
            answer(engine, [first, *PROMPT[1:]])
        assert engine.tiers is not None and engine.tiers.host is not None
        assert 0 < engine.tiers.host.used_bytes <= 1 << 16
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
            of_drafting = fingerprint(model, engine.cache)
    assert wanted == alone(model, PROMPT, GREEDY, 6)[0]
    assert of_drafting == fingerprint(model, make_engine(model, None, speculation=False).cache)


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
        assert isinstance(aborted.fetch, PrefixFetch) and aborted.fetch._future is None, "one at a time"
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
        assert engine.scheduler._copies.of_slots
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


@pytest.mark.parametrize("how", ["flip", "cut", "delete", "swap", "shape"])
def test_damaged_entries_are_misses(model: CausalLM, tmp_path: Path, how: str) -> None:
    """One entry after another: whatever is left is used, and the answer stays."""
    wanted = warm(model, tmp_path / "good")
    names = sorted(path.name for path in (tmp_path / "good").glob("*" + ENTRY_SUFFIX))
    assert len(names) > 4
    cached = set()
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        folder.mkdir(mode=0o700)
        for path in (tmp_path / "good").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
            (folder / path.name).chmod(0o600)
        with make_engine(model, folder) as engine:
            damage(store_of(engine), folder, name, names[number - 1], how)
            tokens, num_cached = answer(engine)
            assert tokens == wanted
            cached.add(num_cached)
            if how != "shape":
                assert store_of(engine).statistics().num_damaged <= 1
    assert min(cached) == 0, "without the first chunk nothing is of use"
    assert max(cached) == full_hit(engine), "some are not asked for"


def damage(store: DiskStore, folder: Path, name: str, other: str, how: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[-100] ^= 4
        path.write_bytes(data)
    elif how == "cut":
        os.truncate(path, len(data) // 2)
    elif how == "delete":
        path.unlink()
    elif how == "swap":
        path.write_bytes((folder / other).read_bytes())
    else:  # a whole entry of the right name whose tensors are of another layout
        entry = store._index[path.stem]
        header, body_B = store._read(entry)
        assert body_B is not None
        tokens = torch.frombuffer(bytearray(header.tokens(body_B)), dtype=torch.int32).tolist()
        with store._changed:
            store._forget(entry)
        path.unlink()
        tensors = {key: tensor[..., :-1].clone() for key, tensor in header.tensors(body_B).items()}
        assert store.put(header.kind, header.salt, tokens, tensors)
        store.flush()


def test_a_full_disk_ends_writing_with_one_warning(
    model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with make_engine(model, tmp_path, num_checkpoints=1, num_blocks=20) as engine:
        wanted, _ = answer(engine)
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(disk.os, "write", full)
            for first in range(3):
                answer(engine, [first + 50, *PROMPT[1:]])
                store_of(engine).flush()
        assert len(caplog.records) == 1 and "No space left" in caplog.text
        num_failed = store_of(engine).statistics().num_failed_writes
        for first in range(3):
            answer(engine, [first + 50, *PROMPT[1:]])
        assert answer(engine)[0] == wanted
        store_of(engine).flush()
        statistics = store_of(engine).statistics()
        assert statistics.num_failed_writes == num_failed and statistics.num_written == 0
    assert not any(tmp_path.glob("*" + ENTRY_SUFFIX))


def test_a_step_that_fails_leaves_nothing_wrong(
    model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = warm(model, tmp_path)
    with make_engine(model, tmp_path) as engine:
        request = engine.add_request(PROMPT, GREEDY)

        def failing(self: PrefixFetch, load: Load) -> None:
            raise RuntimeError("device lost")

        with monkeypatch.context() as patch:
            patch.setattr(PrefixFetch, "write", failing)
            while request.finish_reason is None:
                engine.step()
        assert isinstance(request.fault, RuntimeError) and not engine.has_unfinished
        engine.check_integrity()
        assert answer(engine) == (wanted, full_hit(engine))


def test_too_small_a_disk_takes_nothing(model: CausalLM, tmp_path: Path) -> None:
    with make_engine(model, tmp_path, disk_cache=cache_in(tmp_path, max_bytes=2000)) as engine:
        answer(engine)
    assert not any(tmp_path.glob("*" + ENTRY_SUFFIX))


def test_a_queue_that_is_too_short_loses_nothing_at_the_end(model: CausalLM, tmp_path: Path) -> None:
    with make_engine(model, tmp_path, disk_cache=cache_in(tmp_path, queue_bytes=1)) as engine:
        wanted, _ = answer(engine)
    with make_engine(model, tmp_path) as engine:
        assert answer(engine) == (wanted, full_hit(engine))


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
    cache = make_engine(model, None, poison=False, max_draft_tokens=2).cache
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
    cache = make_engine(model, None).cache
    for name, tensor in read_blocks(cache, [4, 2, 7], num_tokens=21).items():
        assert len(tensor) == 2, "a third block is not needed"
        assert tensor[1, :, :5].isnan().all(), f"{name} was never written"
        assert not tensor[1, :, 5:].any()


def test_other_engines_do_not_find_it(model: CausalLM, tmp_path: Path) -> None:
    def of(engine: Engine, **facts: int) -> bytes:
        return fingerprint(engine.model, engine.cache, **facts)

    engine = make_engine(model, None)
    twin = make_engine(model, None, max_num_seqs=3, num_blocks=31)
    assert of(engine) == of(twin) and of(engine) != of(engine, chunk=1)
    assert of(engine) != of(make_engine(model, None, kv_dtype=torch.int8))
    other = CausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert weights_digest(other) == weights_digest(model)
    with torch.no_grad():
        next(other.parameters())[-1, -1] += 1
    assert weights_digest(other) != weights_digest(model)
    renamed = CausalLM(replace(model.config, rope_theta=9_000.0)).eval()
    renamed.load_state_dict(model.state_dict())
    assert weights_digest(renamed) != weights_digest(model)


def test_wrong_settings_are_refused(model: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chunk_tokens"):
        make_engine(model, None, disk_cache=DiskCache(tmp_path, 1000, chunk_tokens=40))
    with pytest.raises(UsageError, match="needs prefix_cache"):
        Engine(model, prefix_cache=False, disk_cache=cache_in(tmp_path))
    with pytest.raises(UsageError, match="must be positive"):
        HostStore(max_bytes=0)


def test_saving_without_memory_is_said_once(
    model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*args: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(Tiers, "_read", none_left)
    wanted = warm(model, tmp_path)
    with make_engine(model, tmp_path) as engine:
        assert answer(engine) == (wanted, 0)
    assert len(caplog.records) == 2, "one for each engine"


KILLED = """
import sys
from pathlib import Path
from tests.engine.test_tiers import PROMPT, answer, cache_in, make_engine, store_of
from tests.engine.models import tiny_model
folder = Path(sys.argv[1])
engine = make_engine(tiny_model("hybrid"), folder, disk_cache=cache_in(folder, at_once=True))
for first in range(10**9):
    answer(engine, [first % 40, *PROMPT[1:]])
    if first == 1:
        store_of(engine).flush()
        print("ready", flush=True)
"""


def kill_and_check(folder: Path, seconds: float) -> None:
    """An engine that writes at once is killed at any moment; the next one answers as ever, from what was left."""
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        threading.Event().wait(seconds)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    model = tiny_model("hybrid")
    with make_engine(model, folder) as engine:
        cached = 0
        for first in range(0, 40, 7):
            prompt = [first, *PROMPT[1:]]
            tokens, num_cached = answer(engine, prompt)
            assert tokens == alone(model, prompt, GREEDY, 6)[0]
            cached += num_cached
        assert cached >= full_hit(engine), "the first answers were on disk"
        assert store_of(engine).statistics().num_damaged <= 1, "at most the file that was being written"


def test_killed_and_started_again(tmp_path: Path) -> None:
    kill_and_check(tmp_path, 0.1)


@pytest.mark.slow
def test_killed_many_times(tmp_path: Path) -> None:
    chance = random.Random(3)
    for _ in range(12):
        kill_and_check(tmp_path, chance.uniform(0, 0.4))
