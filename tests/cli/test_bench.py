"""`qnext bench`: what it refuses, what it reports, and the arithmetic between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .command import Capture, make_model, run

CASES = {
    "peer": (["--peer", "vllm"], "--peer vllm: must be llama.cpp or transformers"),
    "scheme": (["--scheme", "int3"], "--scheme int3: must be one of f32, f16, bf16, int4-g32"),
    "deep": (["--depths", "0,120"], "--depths: 120 and 32 decoded tokens are beyond the context of 128"),
    "negative depth": (["--depths=-1"], "--depths: -1 and"),
    "no number": (["--depths", "0,2k"], "--depths '0,2k': must be numbers"),
    "rounds": (["--rounds", "0"], "--rounds must be at least 1, not 0"),
    "threads": (["--threads", "-3", "--prefill", "64"], "--threads must be at least 1, not -3"),
    "prompt": (["--prefill", "128"], "--prefill 128: a prompt has 1 to 127 tokens"),
    "long prompt": (["--prefill", "64", "--long-prefill", "999"], "--long-prefill 999"),
    "no llama.cpp": (
        ["--prefill", "64", "--peer", "llama.cpp", "--llama-cpp", "nowhere"],
        "peer llama.cpp: no llama-bench in nowhere; build https://",
    ),
    "file": (["--prefill", "64", "--gguf", "none.gguf"], "--gguf none.gguf: no such file"),
    "file for what": (
        ["--prefill", "64", "--scheme", "bf16", "--scheme", "int8", "--gguf", "x.gguf"],
        "say for which",
    ),
    "file for nothing": (["--prefill", "64", "--gguf", "int8=x.gguf"], "int8 is not among the schemes bf16"),
    "no device": (["--prefill", "64", "--device", "cuda"], "--device cuda: torch finds no CUDA device here"),
    "nothing to compare": (
        ["--prefill", "64", "--scheme", "int8", "--peer", "transformers"],
        "nothing to compare in int8",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", CASES)
def test_refusals_come_before_any_work(folder: Path, capsys: Capture, name: str) -> None:
    options, message = CASES[name]
    result = run(capsys, "bench", folder, *options)
    assert result.code == 2
    assert message in result.error_line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--peer", "transformers"],
            "--peer transformers: peers compute on the CPU, and --device is cuda; --device cpu",
        ),
        (["--scheme", "f16"], "--scheme f16: on cuda weights become f32 or bf16, or stay as they are"),
    ],
)
def test_what_a_gpu_does_not_do_is_refused(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("qnext.session.folder.check_device", lambda name: None)
    result = run(capsys, "bench", folder, "--prefill", 64, "--device", "cuda", *options)
    assert (result.code, result.error_line) == (2, f"qnext bench: {message}")


def test_no_such_model(capsys: Capture) -> None:
    assert run(capsys, "bench", "nowhere").code == 3


def test_a_missing_transformers_is_said(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(capsys, "bench", folder, "--prefill", "64", "--peer", "transformers")
    assert (result.code, result.error_line) == (
        2,
        "qnext bench: peer transformers: not installed; pip install transformers",
    )


@pytest.mark.slow
def test_against_transformers(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "model"  # transformers multiplies experts only where rows are multiples of 16 bytes
    assert run(capsys, "init", "nano-5m", folder).code == 0
    options = ["--prefill", 32, "--depths", "0,16", "--decode", 4, "--rounds", 1, "--threads", 1]
    result = run(
        capsys,
        "bench",
        folder,
        "--peer",
        "transformers",
        *options,
        "--cache",
        tmp_path,
        "--json",
    )
    assert result.code == 0, result.err
    (peer,) = json.loads(result.out)["schemes"][0]["peers"]
    assert len(peer["figures"]) == 3 and all(figure["ratio"]["median"] > 0 for figure in peer["figures"])
    assert peer["load"]["seconds"]["median"] > 0 and peer["peak_bytes"] > 0
