"""Kills processes that write into a store and checks what they leave. Arguments: FOLDER calls|moments.

A program of its own, so that it can fork: it has no thread. Prints counts as one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from qnext.engine.storage.disk import DiskStore
from qnext.engine.storage.disk_files import PARTIAL_SUFFIX

MAX_BYTES = 2_000_000


def contents(token: int) -> dict[str, torch.Tensor]:
    """Follows from the token, so that a reader can check it."""
    generator = torch.Generator().manual_seed(token)
    size = 1 + token * 7919 % 300_000
    return {"x": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)}


def write(folder: Path, seed: int, count: int) -> None:
    chance = random.Random(seed)
    with DiskStore(folder, max_bytes=MAX_BYTES, fingerprint=b"m") as store:
        for _ in range(count):
            token = chance.randint(1, 60)
            if chance.random() < 0.7:
                store.put("kv", b"", [token], contents(token))
            else:
                store.get("kv", b"", [token])
            store.flush()


def check(folder: Path) -> Counter[str]:
    """Opens, reads everything, and takes a new entry; deterministic contents, nothing but half files deleted."""
    half_written = sum(path.suffix == PARTIAL_SUFFIX for path in folder.iterdir()) if folder.exists() else 0
    found = 0
    with DiskStore(folder, max_bytes=MAX_BYTES, fingerprint=b"m") as store:
        assert store.statistics().num_damaged == half_written
        num_entries = store.statistics().num_entries
        for token in range(1, 62):
            got = store.get("kv", b"", [token])
            if got is not None:
                found += 1
                assert got["x"].equal(contents(token)["x"]), token
        assert found == num_entries, (found, num_entries)
        assert store.statistics().num_damaged == half_written
        assert sum(path.stat().st_size for path in folder.iterdir()) == store.statistics().entry_bytes <= MAX_BYTES
        assert store.put("kv", b"", [61], contents(61))
        store.flush()
        assert store.get("kv", b"", [61]) is not None
    return Counter(half_written=half_written, entries=found)


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    work()
    os._exit(0)


def kill_before_call(number: int) -> None:
    """From now on this process dies by SIGKILL just before the numbered call of the store to the system."""
    count = 0

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def counting(*args: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count > number:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return call(*args, **options)

        return counting

    for name in ("open", "write", "fsync", "replace", "unlink", "utime", "close", "listdir", "fchmod"):
        setattr(os, name, counted(getattr(os, name)))


def kill_at_calls(folder: Path) -> Counter[str]:
    """Until a run comes to its end. Each goes on where the last one died."""
    counts: Counter[str] = Counter()
    while True:
        seed = counts["kills"]

        def work(seed: int = seed) -> None:
            kill_before_call(seed)
            write(folder, seed, 14)

        status = os.waitpid(fork(work), 0)[1]
        counts += check(folder)
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            return counts
        counts["kills"] += 1


def kill_at_moments(folder: Path) -> Counter[str]:
    """30 times, and more often until one dies amid a file: on a machine with other work most die elsewhere."""
    counts: Counter[str] = Counter()
    chance = random.Random(1)
    while counts["kills"] < 30 or (counts["half_written"] == 0 and counts["kills"] < 300):
        child = fork(lambda seed=counts["kills"]: write(folder, seed, 10**9))
        time.sleep(chance.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        counts += check(folder)
        counts["kills"] += 1
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, how = Path(sys.argv[1]), sys.argv[2]
    print(json.dumps({"calls": kill_at_calls, "moments": kill_at_moments}[how](folder)))
