"""Ranks as users start them: what is refused, equal answers, a rank that fails, and processes that end with theirs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qnext.checkpoint.quantize import quantize_folder
from qnext.planning import machine
from qnext.quant.scheme import make_policy
from tests.server.serving import save_served

from .command import Capture, poke, run

ROOT = Path(__file__).parents[2]
ANSWER = ("Hello", "--max-tokens", "24", "--ignore-eos", "--json", "--logprobs", "1", "--seed", "7")
TWO = ("--tensor-parallel", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("ranks") / "m")


def answer(text: str) -> dict[str, Any]:
    """What does not depend on time."""
    document: dict[str, Any] = json.loads(text)
    del document["timings"]
    return document


def test_two_ranks_answer_as_one_process(folder: Path, capsys: Capture) -> None:
    """With drafts, sampled, to the last digit of the log-probabilities; nothing of the ranks is left."""
    alone = run(capsys, "generate", folder, *ANSWER)
    found = run(capsys, "generate", folder, *ANSWER, *TWO)
    assert (alone.code, found.code) == (0, 0), found.err
    assert answer(found.out) == answer(alone.out)
    assert children(os.getpid()) == []


@pytest.mark.parametrize(
    ("flags", "chunk"),
    [
        (TWO, 5),
        pytest.param(TWO, None, marks=pytest.mark.slow),
        pytest.param((*TWO, "--expert-parallel", "2"), 7, marks=pytest.mark.slow),
    ],
)
def test_logits_of_ranks_are_those_of_one_process(
    folder: Path, tmp_path: Path, capsys: Capture, flags: tuple[str, ...], chunk: int | None
) -> None:
    """To the last bit, in one pass over more rows than a head computes at once, and in chunks through the caches."""
    (tmp_path / "ids.json").write_text(json.dumps([7 * n % 250 for n in range(400 if chunk is None else 12)]))
    given = ["logits", folder, "--tokens", f"@{tmp_path / 'ids.json'}", *([] if chunk is None else ["--chunk", chunk])]
    files = [tmp_path / name for name in ("one.npy", "ranks.npy")]
    alone = run(capsys, *given, "--out", files[0])
    found = run(capsys, *given, "--out", files[1], *flags)
    assert (alone.code, found.code) == (0, 0), found.err
    assert files[0].read_bytes() == files[1].read_bytes()
    assert children(os.getpid()) == []


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--tensor-parallel", "3"], "--tensor-parallel 3: num_attention_heads is 4, which it does not divide"),
        (["--expert-parallel", "9"], "9 ranks are more than the 8 experts of a layer"),
        (["--expert-placement", "auto"], "--expert-placement, --expert-copies and --rank-patience need several ranks"),
        ([*TWO, "--expert-copies", "2"], "--expert-copies: which experts are hot? --expert-placement says it"),
        ([*TWO, "--expert-placement", "no.json"], "no.json: No such file or directory"),
    ],
)
def test_what_is_refused_before_a_rank_is_started(folder: Path, capsys: Capture, flags: list[str], line: str) -> None:
    result = run(capsys, "generate", folder, "a", *flags)
    assert result.code == 2 and line in result.error_line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--lora", "a=b"],
            "--lora: adapters are not served on ranks; `qnext merge` makes one a part of the model",
        ),
        (["--disk-cache", "c"], "--disk-cache: on ranks prefixes stay in the memory of each rank"),
    ],
)
def test_what_a_server_on_ranks_does_not_have(folder: Path, capsys: Capture, flags: list[str], line: str) -> None:
    result = run(capsys, "serve", folder, "--port", "0", *TWO, *flags)
    assert result.code == 2 and line in result.err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launcher_with_another_number_of_processes(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    result = run(capsys, "generate", folder, "a", *TWO)
    told = "qnext generate: --tensor-parallel 2 --expert-parallel 1 make 2 ranks, but torchrun has started 4 processes"
    assert (result.code, result.err.strip()) == (2, "" if rank else told), "one rank says it"


def test_a_rank_that_cannot_load_its_part_ends_all_with_its_line(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of the last expert, which the first rank does not read, is none."""
    broken = save_served(tmp_path / "m")
    file = poke(broken, "model.layers.0.mlp.experts.7.up_proj.weight", b"\xff" * 8)
    result = run(capsys, "generate", broken, "a", *TWO)
    assert result.code == 5
    assert re.fullmatch(rf"qnext generate: rank 1: {file}: tensor \S+experts\.7\.up_proj\.weight .*", result.error_line)
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 20)
    result = run(capsys, "generate", folder, "a", *TWO)
    assert result.code == 4 and "rank 1" not in result.error_line, "the first rank's own line"


def children(pid: int) -> list[int]:
    """Processes that are ranks of this one."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"rank_worker" in (each / "cmdline").read_bytes():
                found.append(int(each.name))
    return found


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def begun(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], list[int]]:
    """`qnext generate` on two ranks that has written something, and its ranks."""
    command = [sys.executable, "-m", "qnext", "generate", folder, "Hello", "--max-tokens", "2000", "--ignore-eos", *TWO]
    command += flags
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    one = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert one.stdout is not None
    assert one.stdout.read(1)
    return one, children(one.pid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGTERM, 143, "terminated\n"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_no_rank_outlives_the_first(folder: Path, number: signal.Signals, code: int, line: str) -> None:
    one, ranks = begun(folder)
    assert len(ranks) == 1
    one.send_signal(number)
    _, said = one.communicate(timeout=30)
    assert one.returncode == code and said.endswith(line)
    end = time.monotonic() + 5
    while any(map(is_running, ranks)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(is_running, ranks))


@pytest.mark.slow
def test_a_killed_rank_ends_the_command(folder: Path) -> None:
    one, ranks = begun(folder)
    os.kill(ranks[0], signal.SIGKILL)
    _, said = one.communicate(timeout=30)
    assert (one.returncode, said.splitlines()[-1]) == (7, "qnext generate: rank 1 was lost: signal 9 ended it")


@pytest.mark.slow
def test_a_stopped_rank_is_lost_when_patience_ends(folder: Path) -> None:
    """It does not answer, and its process is there."""
    one, (rank,) = begun(folder, "--rank-patience", "2")
    os.kill(rank, signal.SIGSTOP)
    try:
        _, said = one.communicate(timeout=30)
    finally:
        one.kill()
    lost = "qnext generate: rank 1 was lost: it has shown no life for 2 seconds"
    assert (one.returncode, said.splitlines()[-1]) == (7, lost)
    assert not is_running(rank)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--tensor-parallel", "2"), ("--tensor-parallel", "2", "--expert-parallel", "2")])
def test_torchrun(folder: Path, tmp_path: Path, capsys: Capture, flags: tuple[str, ...]) -> None:
    """Int4, with experts on disk."""
    policy = make_policy("int4-g32", head=None, is_tied=False)
    quantize_folder(folder, tmp_path / "q", policy=policy, with_records=True)
    alone = run(capsys, "generate", tmp_path / "q", *ANSWER)
    number = 2 ** (len(flags) // 2)
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", number, "-m", "qnext"]
    command += ["generate", tmp_path / "q", *ANSWER, *flags, "--expert-memory", "200K"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert answer(done.stdout) == answer(alone.out)


@pytest.mark.slow
def test_torchrun_without_flags_is_refused_once(folder: Path) -> None:
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", 2, "-m", "qnext"]
    command += ["generate", folder, "a"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode and done.stdout == ""
    assert done.stderr.count("make 1 ranks, but torchrun has started 2 processes") == 1
