"""Every command and every piece of code in the README runs."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from qnext.checkpoint.nearby import published_models
from qnext.cli import VERBS, _joined_verb, main
from qnext.recipes import code, instruct
from qnext.training.sources import TextFile, split_by_package, take_bytes
from tests.bench.limits import LIMITS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What would take minutes is done for seconds; everything else runs as it stands.
SHORTER = {
    "--minutes 3": "--minutes 0.01",
    "time_budget=60": "time_budget=0.3",
    "total_steps=20": "total_steps=1",
    "--depths 0,512": "--depths 0,32",
    "--minutes 0.05": "--minutes 0.003",
    "--out runs/reason": "--out runs/reason"
    + "".join(f" --set {stage}.total_steps=1" for stage in ("pretrain", "sft", "gspo")),
}
LESS_TEXT = (200_000, 5_000)  # bytes of the library to train on and to evaluate on
SERVER_URL = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]


@contextmanager
def serving(arguments: list[str]) -> Iterator[str]:
    """The URL of a server that a command starts, on a free port."""
    command = [sys.executable, "-m", "qnext", *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            found = next(filter(None, (re.match(r"ready: (\S+)", line) for line in process.stderr)))
            yield found[1]
        finally:
            process.terminate()


def watch(arguments: list[str]) -> None:
    """Open the page of a run, and end it."""
    command = [sys.executable, "-m", "qnext", *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        with urlopen(f"{process.stdout.readline().strip()}metrics") as reply:
            assert b'"loss"' in reply.read()
        process.terminate()


def run_verb(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0, arguments


def test_every_verb_is_shown() -> None:
    shown = {_joined_verb(words[1:])[0] for words in commands() if words[0] == "qnext"}
    assert shown == set(VERBS)


def test_commands_are_of_known_kinds() -> None:
    for words in commands():
        assert words[0] in ("qnext", "make"), words


@pytest.mark.parametrize("target", sorted({words[1] for words in commands() if words[0] == "make"}))
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_qnext_commands_and_python_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    pulled: list[str] = []

    def snapshot_download(name: str, **options: object) -> str:
        """Instead of the model a small one with random weights, which every command after it takes."""
        pulled.append(name)
        run_verb(["init", "nano-5m", str(options["local_dir"])], monkeypatch)
        return str(options["local_dir"])

    def split_less(files: Sequence[TextFile], **options: Any) -> list[list[TextFile]]:
        sides = split_by_package(files, **options)
        return [take_bytes(side, limit=limit) for side, limit in zip(sides, LESS_TEXT, strict=True)]

    monkeypatch.setattr(code, "split_by_package", split_less)
    few = replace(instruct.RECIPES["instruct"], num_questions=100, num_bytes=20_000, num_tested=4)
    monkeypatch.setitem(instruct.RECIPES, "instruct", few)
    monkeypatch.setattr("qnext.bench.run._limits", lambda threads: LIMITS)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(README[:4_000], encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "guide", tmp_path / "docs" / "guide")
    (tmp_path / "requests.jsonl").write_text("".join(blocks("jsonl")), encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}\n', encoding="utf-8")
    with ExitStack() as stack:
        url = ""
        for words in commands():
            if words[0] != "qnext":
                continue
            line = shlex.join(words[1:])
            for long, short in {**SHORTER, SERVER_URL: url}.items():
                line = line.replace(long, short)
            if words[1] == "serve":
                url = stack.enter_context(serving(shlex.split(line)))
            elif words[1] == "watch":
                watch(shlex.split(line))
            else:
                run_verb(shlex.split(line), monkeypatch)
    assert (tmp_path / "runs/demo/model/model.safetensors").is_file()
    assert (tmp_path / "runs/logits.npy").is_file()
    answers = [json.loads(line) for line in (tmp_path / "runs/answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted((answer["custom_id"], answer["response"]["status_code"]) for answer in answers) == [
        ("one", 200),
        ("two", 200),
    ]
    assert pulled == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-Coder-Next"]
    assert set(pulled) <= set(published_models())
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


_TINY_ENGINE = (
    "--model MODEL --scheme bf16 --conversation 256 --shared 128 --streams 1 2 --prompt 16 --output 8 --rounds 1 "
    "--steps 2 --text-bytes 20000"
)
_TINY_STREAMING = "RECORDS --expert-memory 1M --tokens 4 --warm 8 --prefill 40 --presets diverse"
SMALL_BENCHMARKS = {
    "bench_engine.py": _TINY_ENGINE.split(),
    "bench_train_step.py": ["--models", "nano-5m", "--sequences", "2", "--length", "64", "--rounds", "1"],
    "bench_training_memory.py": ["--points", "1"],
    "bench_health.py": ["--models", "nano-5m", "--tokens", "64", "--rounds", "2"],
    "bench_lora.py": ["--models", "nano-5m", "--sequences", "2", "--length", "64", "--rounds", "1"],
    "bench_inference.py": [
        "MODEL",
        "--schemes",
        "bf16",
        "--prefill",
        "32",
        "--depths",
        "0,16",
        "--decode",
        "4",
        "--rounds",
        "1",
    ],
    "bench_long_context.py": ["--tokens", "700", "--decode", "4", "--edge", "128", "--yarn", "4"],
    "bench_demo.py": ["--seconds", "3"],
    "bench_distill.py": [
        *("--teacher-steps", "1", "--steps", "1", "--seeds", "2", "--text-bytes", "20000", "--held-out-bytes", "5000")
    ],
    "bench_server.py": ["MODEL", "--streams", "2", "--tokens", "300", "--rounds", "1", "--idle", "4", "--active", "2"],
    "bench_quantize.py": ["--model", "MODEL", "--reference", "--rounds", "1", "--isa", "best"],
    "bench_streaming.py": _TINY_STREAMING.split(),
    "bench_residency.py": ["--tokens", "40", "--slots", "0.2", "--half-lives", "64"],
    "bench_replicas.py": [
        *("MODEL", "--conversations", "4", "--turns", "2", "--streams", "4", "--tokens", "400", "--rounds", "2")
    ],
    "bench_spin.py": ["--rounds", "1", "--spins", "default", "1000", "--busy", "1", "--work", "quantize", "decode 16"],
    "bench_watermark.py": [
        "MODEL",
        "--answers",
        "2",
        "--lengths",
        "10,20",
        "--temperatures",
        "0,1",
        "--texts",
        "4",
        "--speed",
        "1",
        *("--rate", "1", "--task", "4", "--task-flops", "1e9"),
    ],
    "bench_plan.py": ["--calibrate", "--points", "0", "--threads", "1"],
    "bench_probes.py": ["--layers", "4", "--experts", "16", "--tokens", "64", "--steps", "2", "--rounds", "1"],
    "bench_ranks.py": ["MODEL", "--prompt", "16", "--tokens", "4", "--rounds", "1"],
    "bench_snapshots.py": ["--model", "nano-5m", "--tokens", "32", "--rounds", "1"],
    "bench_train_ranks.py": ["--tokens", "32", "--steps", "1", "--rounds", "1"],
    "bench_recall.py": ["--minutes", "0.02", "--batch", "2", "--problems", "4"],
    "bench_expert_watch.py": ["--rounds", "2"],
    "bench_quality.py": ["--minutes", "0.02", "--tokens", "2048", "--eval-bytes", "20000"],
}


def test_benchmarks_that_are_named_exist() -> None:
    named = set(re.findall(r"benchmarks/(\w+\.py)", README))
    assert named <= {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(SMALL_BENCHMARKS) == {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL_BENCHMARKS)
def test_benchmarks_run(script: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["init", "nano-5m", str(tmp_path / "model")])
    names = {"MODEL": str(tmp_path / "model"), "RECORDS": str(tmp_path / "records")}
    if "RECORDS" in SMALL_BENCHMARKS[script]:
        with pytest.raises(SystemExit):
            main(["convert", names["MODEL"], names["RECORDS"], "--records"])
    arguments = [names.get(word, word) for word in SMALL_BENCHMARKS[script]]
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    # What is kept of the machine is kept there.
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["machine"]
