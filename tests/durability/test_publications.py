"""Kills, full disks and errors of the disk at every step of everything that is written, all of them in turn.

After each fault a reader finds what was there before or the whole new thing, the same command succeeds when it is
given again, and nothing is left of what the first one began.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.durability.faults import Step, lost_by_power
from tests.durability.scenarios import SCENARIOS
from tests.forked import Program

ROOT = Path(__file__).parents[2]
# What is run by every `make test`; the others are the same verbs of qnext.files below a longer command.
QUICK = {
    ("kill", "snapshot"),
    ("kill", "file replaced"),
    ("kill", "tokenizer"),
    ("kill", "keys create"),
    ("kill", "keys rotate"),
    ("kill", "audit"),
    ("kill", "batch"),
    ("full", "file replaced"),
    ("broken", "file replaced"),
    ("full", "batch"),
}

Strike = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def strike(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Strike]:
    words = ["-m", "tests.durability.driver", tmp_path_factory.mktemp("durability")]
    process = Program(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    reader, writer = process.stdout, process.stdin

    def ask(kind: str, name: str) -> dict[str, Any]:
        writer.write(f"{kind} {name}\n")
        writer.flush()
        line = reader.readline()
        assert line, "the driver ended"
        found: dict[str, Any] = json.loads(line)
        return found

    yield ask
    writer.close()
    process.wait(60)


def _cases() -> Iterator[Any]:
    for kind in ("kill", "full", "broken", "power"):
        for name in SCENARIOS:
            is_slow = (kind != "power" and (kind, name) not in QUICK) or SCENARIOS[name].is_slow
            yield pytest.param(kind, name, marks=[pytest.mark.slow] if is_slow else [], id=f"{kind}-{name}")


@pytest.mark.parametrize(("kind", "name"), list(_cases()))
def test_nothing_is_lost_at_any_step(strike: Strike, kind: str, name: str) -> None:
    found = strike(kind, name)
    assert found["faults"] == [], "\n".join(found["faults"])
    assert found["steps"] >= 4  # a scenario that counts nothing tests nothing


def test_the_check_for_power_failures_sees_what_is_not_flushed() -> None:
    write, rename = Step("write", "/r/.f.partial-1"), Step("rename", "/r/f", "/r/.f.partial-1")
    flush, name = Step("fsync", "/r/.f.partial-1"), Step("fsync", "/r")
    assert lost_by_power([write, flush, rename, name]) == []
    assert len(lost_by_power([write, rename, flush, name])) == 1
    assert len(lost_by_power([write, flush, rename])) == 1
    inner = [Step("write", "/r/.d.partial-1/a"), Step("exchange", "/r/d", "/r/.d.partial-1"), name]
    assert len(lost_by_power(inner)) == 1
