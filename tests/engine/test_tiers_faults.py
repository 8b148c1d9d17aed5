"""What fails, is damaged or is too small behind the cache costs time, and changes no answer."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qnext.engine import DiskCache, Engine, EngineConfig
from qnext.engine.policy.archive import Load
from qnext.engine.storage.disk import DiskStore
from qnext.engine.storage.disk_files import ENTRY_SUFFIX
from qnext.engine.storage.fingerprint import fingerprint, weights_digest
from qnext.engine.storage.host import HostStore
from qnext.engine.storage.tiers import PrefixFetch, Tiers
from qnext.errors import UsageError
from qnext.model import CausalLM
from tests.engine.conversations import alone
from tests.engine.executors import local
from tests.engine.models import tiny_model
from tests.engine.tiers import GREEDY, PROMPT, answer, cache_in, full_hit, make_engine, store_of, warm
from tests.forked import Program

ROOT = Path(__file__).parents[2]


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
            patch.setattr(os, "write", full)
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


def test_other_engines_do_not_find_it(model: CausalLM, tmp_path: Path) -> None:
    def of(engine: Engine, **facts: int) -> bytes:
        return fingerprint(local(engine).model, local(engine).cache, **facts)

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
        Engine.of(model, EngineConfig(prefix_cache=False, disk_cache=cache_in(tmp_path)))
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
from tests.engine.models import tiny_model
from tests.engine.tiers import PROMPT, answer, cache_in, make_engine, store_of
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
    child = Program(["-c", KILLED, folder], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
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
