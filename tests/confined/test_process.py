"""What a confined process may not do: run on, grow, write, or outlive its parent."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qnext.confined.process import ConfinedFailure, ConfinedLimits, ConfinedProcess

PROGRAM = """
import os, time
from qnext.confined.child import serve

def answer(request):
    kind = request["kind"]
    if kind == "echo":
        print("nobody reads this")
        return {"value": request["value"]}
    if kind == "sleep":
        time.sleep(600)
    if kind == "spin":
        while True:
            pass
    if kind == "grow":
        return {"length": len(bytes(1 << 33))}
    if kind == "long":
        return {"value": "x" * (1 << 20)}
    if kind == "write":
        try:
            with open(request["path"], "wb") as file:
                file.write(b"1234")
                file.flush()
        except OSError as error:
            return {"error": error.errno}
    os._exit(3)

serve(lambda setup: answer)
"""
LIMITS = ConfinedLimits(seconds=30.0, cpu_seconds=30.0, memory_bytes=256 << 20, answer_bytes=1 << 16)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "some_worker.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return path


def limits(**values: float) -> ConfinedLimits:
    return ConfinedLimits(**{**vars(LIMITS), **values})  # type: ignore[arg-type]


def test_answers_come_back_and_prints_do_not_disturb_them(program: Path) -> None:
    process = ConfinedProcess(program, LIMITS)
    for value in ("é" * 1000, [1, {"a": None}], 5):
        assert process.ask({"kind": "echo", "value": value}) == {"value": value}
    process.kill()
    assert not process.is_alive()


@pytest.mark.parametrize(
    ("kind", "cause", "changed"),
    [
        ("sleep", "time", {"seconds": 0.3}),
        ("spin", "time", {"seconds": 0.3}),
        ("spin", "time", {"cpu_seconds": 0.2}),
        ("grow", "memory", {}),
        ("long", "broken", {}),
        ("exit", "broken", {}),
    ],
)
def test_what_uses_too_much_is_gone(program: Path, kind: str, cause: str, changed: dict[str, float]) -> None:
    process = ConfinedProcess(program, limits(**changed))
    began = time.monotonic()
    with pytest.raises(ConfinedFailure) as caught:
        process.ask({"kind": kind})
    assert caught.value.cause == cause
    assert time.monotonic() - began < 60, "far less than what it wanted"
    assert not process.is_alive()


def test_an_interrupted_process_is_not_asked_again(program: Path) -> None:
    process = ConfinedProcess(program, LIMITS)
    assert process.is_alive()
    process.interrupt()
    assert not process.is_alive()
    process.kill()


def test_nothing_is_written(program: Path, tmp_path: Path) -> None:
    process = ConfinedProcess(program, LIMITS)
    assert process.ask({"kind": "write", "path": str(tmp_path / "file")}) == {"error": errno.EFBIG}
    assert (tmp_path / "file").read_bytes() == b""


def test_ctrl_c_is_the_parents_affair(program: Path) -> None:
    process = ConfinedProcess(program, LIMITS)
    process._process.send_signal(signal.SIGINT)
    assert process.ask({"kind": "echo", "value": 1}) == {"value": 1}
    process.kill()


def test_a_program_that_fails_to_start_says_so(tmp_path: Path) -> None:
    path = tmp_path / "bad_worker.py"
    path.write_text("raise SystemExit(1)")
    with pytest.raises(OSError, match=r"bad_worker\.py did not start"):
        ConfinedProcess(path, LIMITS)


def test_it_ends_with_a_parent_that_was_killed(program: Path) -> None:
    code = (
        "import os, sys, pathlib; from qnext.confined.process import ConfinedLimits, ConfinedProcess; "
        f"p = ConfinedProcess(pathlib.Path({str(program)!r}), ConfinedLimits(30.0, 30.0, 256 << 20, 1000)); "
        "print(p._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = Path(f"/proc/{int(found.stdout)}")
    deadline = time.monotonic() + 60
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2:3]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
