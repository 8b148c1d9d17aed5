"""Engines with a host's memory or a disk behind their cache, and what they answer."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from qnext.engine import DiskCache, Engine, EngineConfig, SamplingParams
from qnext.engine.storage.disk import DiskStore
from qnext.engine.storage.disk_files import ENTRY_SUFFIX
from qnext.model import CausalLM
from tests.engine.conversations import MAX_LEN, Answer, Conversations, alone
from tests.engine.disk_stores import folder_bytes
from tests.engine.drafts import GivenDrafts
from tests.engine.executors import KeepingExecutor, local, tiers_of

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


PROMPT = [7 * i % 50 for i in range(150)]


def cache_in(folder: Path, *, max_bytes: int = 1 << 26, at_once: bool = False, queue_bytes: int = 1 << 26) -> DiskCache:
    return DiskCache(folder, max_bytes, at_once=at_once, min_tokens=8, chunk_tokens=32, queue_bytes=queue_bytes)


def make_engine(model: CausalLM, folder: Path | None, **options: object) -> Engine:
    settings: dict[str, object] = {"max_num_seqs": 2, "max_model_len": MAX_LEN, "poison": True, **options}
    if folder is not None:
        settings.setdefault("disk_cache", cache_in(folder))
    engine = Engine.of(model, EngineConfig(**settings))  # type: ignore[arg-type]
    assert engine.scheduler.prefixes is not None
    engine.scheduler.prefixes.min_tokens = 4
    return engine


def store_of(engine: Engine) -> DiskStore:
    assert tiers_of(engine) is not None and tiers_of(engine).disk is not None
    return tiers_of(engine).disk


def serve(
    engine: Engine, rng: random.Random, conversations: Conversations, num_requests: int, *, num_drafts: int = 0
) -> list[Answer]:
    """Requests that come and are aborted at random, each with what it would get alone. Some drafts are right."""
    engine.drafter = given = GivenDrafts()
    executor = KeepingExecutor(engine)
    answers: list[Answer] = []
    while len(answers) < num_requests or engine.has_unfinished:
        for _ in range(rng.randint(0, 2) if len(answers) < num_requests else 0):
            prompt, params = conversations.prompt(), conversations.params()
            assert params.max_tokens is not None
            wanted, wanted_rows = alone(local(engine).model, prompt, params, params.max_tokens)
            request = engine.add_request(prompt, params, salt=rng.choice(("", "", "b")))
            answers.append(Answer(request, wanted, wanted_rows, executor.rows.setdefault(request.id, [])))
            conversations.history.append(prompt + wanted)
        if rng.random() < 0.03 and engine.has_unfinished:
            engine.abort(rng.choice([a.request.id for a in answers[-8:]]))
        for request, wanted, _, _ in answers[-10:]:
            if num_drafts and request.output_ids:
                next_ids = wanted[len(request.output_ids) :][: rng.randint(0, num_drafts)]
                spoiled = rng.randrange(2 * num_drafts)
                given[request.id] = tuple(3 if i == spoiled else t for i, t in enumerate(next_ids))
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
            model,
            None,
            max_num_seqs=rng.randint(2, 4),
            num_blocks=rng.randint(17, 26),
            num_checkpoints=rng.randint(1, 5),
            max_num_batched_tokens=rng.choice((70, 100, 300)),
            checkpoint_interval=rng.choice((0, 50)),
            max_draft_tokens=num_drafts,
            host_cache_bytes=rng.choice((None, 1 << 17, 1 << 20)),
            disk_cache=cache_in(folder, max_bytes=rng.choice((1 << 19, 1 << 24)), at_once=rng.random() < 0.3),
        )
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


def full_hit(engine: Engine) -> int:
    grid = engine.scheduler.limits.chunk_size
    return (len(PROMPT) - 1) // grid * grid
