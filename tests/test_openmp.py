"""Threads of torch watch for work for a bounded time, however the package is entered."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.openmp import SPIN_COUNT, SPINS, WAIT_POLICY, environment_of_others

ROOT = Path(__file__).parent.parent
INIT = ["init", "nano-5m", "OUT", "--layers", "2", "--experts", "4", "--vocab-size", "300"]


def environment(**values: str) -> dict[str, str]:
    """As a user has it: without what this process was given."""
    kept = {name: value for name, value in os.environ.items() if name not in (SPIN_COUNT, WAIT_POLICY)}
    return {**kept, **values}


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP is libgomp on Linux")
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "qnext", *INIT],
        [str(Path(sys.executable).parent / "qnext"), *INIT],
        [sys.executable, "-c", "import qnext, torch"],
        [sys.executable, "-c", "from qnext.ops import linear"],
    ],
    ids=["module", "script", "library", "part of the library"],
)
def test_torch_is_loaded_with_a_bounded_spin(command: list[str], tmp_path: Path) -> None:
    """libgomp says itself what it has read."""
    words = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    done = subprocess.run(words, env=environment(OMP_DISPLAY_ENV="verbose"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"{SPIN_COUNT} = '{SPINS}'" in done.stderr


def spins_of(**values: str) -> str:
    code = f"import qnext, os; print(os.environ.get({SPIN_COUNT!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(**values), capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SPINS),
        ({SPIN_COUNT: "7"}, "7"),
        ({SPIN_COUNT: "INFINITY"}, "INFINITY"),
        ({SPIN_COUNT: "0"}, "0"),
        ({WAIT_POLICY: "active"}, "None"),
        ({WAIT_POLICY: "passive"}, "None"),
        ({WAIT_POLICY: "active", SPIN_COUNT: "5"}, "5"),
    ],
)
def test_what_the_user_has_set_stays(values: dict[str, str], expected: str) -> None:
    assert spins_of(**values) == expected


def test_peers_are_measured_as_the_user_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPIN_COUNT, SPINS)
    assert SPIN_COUNT not in environment_of_others() and "PATH" in environment_of_others()
    monkeypatch.setenv(SPIN_COUNT, "7")
    assert environment_of_others()[SPIN_COUNT] == "7"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("bench_*.py")), ids=lambda path: path.stem)
def test_benchmarks_load_the_package_before_torch(script: Path) -> None:
    """Imports at the top, in order: nothing that is not of the standard library comes before `_pair` or qnext."""
    names = [
        name.split(".")[0]
        for node in ast.parse(script.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    foreign = [name for name in names if name not in sys.stdlib_module_names]
    assert foreign[0] in ("_pair", "qnext")
