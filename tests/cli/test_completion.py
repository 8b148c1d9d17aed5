"""Completion: the candidates, and bash with the script. The scripts of absent shells are only looked at."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.cli import VERBS
from qnext.cli.parsing.complete import FILES, FOLDERS, candidates

from .command import Capture, run

ROOT = Path(__file__).parents[2]


def names(*words: str) -> set[str]:
    return {line.partition("\t")[0] for line in candidates(words)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub" / "models--org--small--model").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_verbs() -> None:
    assert names("") == {*VERBS, "--help", "--version"}
    assert names("in") == {"init", "inspect"}
    assert names("nonsense", "--") == set()


def test_flags() -> None:
    assert names("generate", "--lo") == {"--logprobs"}
    assert {"--mtp", "--no-mtp", "--config", "--help"} < names("init", "--")
    assert names("generate", "m", "--", "--lo") == set()


def test_arguments() -> None:
    assert names("verify", "") == {FOLDERS, "org/small--model"}
    assert names("verify", "model", "") == set()
    assert names("convert", "") == {FILES, "org/small--model"}
    assert "nano-5m" in names("inspect", "")
    assert names("init", "nano-5") == {"nano-5m"}
    assert names("init", "--seed", "3", "nano-5") == {"nano-5m"}
    assert names("init", "--no-mtp", "nano-5m", "") == {FOLDERS}
    assert names("generate", "model", "") == set()
    assert names("eval", "model", "file", "") == {FILES}


def test_values_of_flags() -> None:
    assert names("logits", "m", "--dtype", "") == {"float32", "bfloat16"}
    assert names("logits", "m", "--dtype", "=", "f") == {"float32"}
    assert names("logits", "m", "--dtype=f") == {"--dtype=float32"}
    assert names("init", "--tokenizer=") == {FOLDERS}
    assert names("logits", "m", "--dtype", "=") == {"float32", "bfloat16"}
    assert names("generate", "m", "--config", "") == {FILES} == names("generate", "m", "--config", "x")
    assert names("init", "--tokenizer", "") == {FOLDERS}
    assert names("generate", "m", "--seed", "") == set()


def test_no_torch() -> None:
    code = (
        "import sys; from qnext.cli import VERBS; from qnext.cli.parsing.complete import candidates\n"
        "for verb in VERBS: assert candidates([verb, '--'])\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def reply_of_bash(tmp_path: Path, script: str, *words: str) -> set[str]:
    """COMPREPLY, with a program called qnext on the path."""
    program = tmp_path / "bin" / "qnext"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m qnext "$@"\n')
    program.chmod(0o755)
    (tmp_path / "folder one").mkdir(exist_ok=True)
    (tmp_path / "file.gguf").touch()
    line = " ".join(map(shlex.quote, ("qnext", *words)))
    text = f'{script}\nCOMP_WORDS=({line}) COMP_CWORD={len(words)}\n_qnext qnext\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
    )
    assert done.stderr == ""
    return set(done.stdout.splitlines())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash(tmp_path: Path, capsys: Capture) -> None:
    script = run(capsys, "completion", "bash").out
    assert reply_of_bash(tmp_path, script, "in") == {"init", "inspect"}
    assert reply_of_bash(tmp_path, script, "generate", "--lo") == {"--logprobs"}
    assert reply_of_bash(tmp_path, script, "verify", "fo") == {"folder one"}
    assert reply_of_bash(tmp_path, script, "convert", "f") == {"folder one", "file.gguf"}
    assert reply_of_bash(tmp_path, script, "logits", "m", "--dtype", "=") == {"float32", "bfloat16"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_can_be_parsed(capsys: Capture, tmp_path: Path, shell: str) -> None:
    result = run(capsys, "completion", shell)
    assert (result.code, result.err) == (0, "")
    assert "completion words --" in result.out
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    path = tmp_path / "script"
    path.write_text(result.out)
    subprocess.run([shell, "-n", path], check=True)


def test_another_shell(capsys: Capture) -> None:
    assert "no completion for 'tcsh'" in run(capsys, "completion", "tcsh").error_line
