"""`qnext train sft --lora`: chats to an adapter, which is merged, served, and goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qnext import SamplingParams
from qnext.checkpoint import load_model
from qnext.checkpoint.adapters import read_adapter
from qnext.checkpoint.hashing import sha256_of
from qnext.checkpoint.provenance import read_provenance
from qnext.engine import Engine, EngineConfig
from qnext.errors import QnextWarning
from qnext.lora.serving import serve_adapters
from qnext.session.folder import end_token_ids, open_folder
from qnext.session.served import ServeConfig, load_served
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message
from qnext.text.prompts import ChatPrompt
from tests.text_folders import save_plain

from .test_sft import QUICK, answer, run, sft

LORA = ("--lora", "all", "--rank", "4", "--experts", "auto:coverage=0.5")


def test_chats_become_an_adapter(
    tmp_path: Path,
    base: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, settings = tmp_path / "run", (*QUICK, "total_steps=60", "lr=2e-2")
    assert sft("--from", str(base), "--data", str(chats), "--out", str(out), *LORA, settings=settings) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "adapter")
    assert "experts that get 50%" in printed.err
    assert "LoRA factors" in printed.err
    assert "adapted expert matrices got gradient" in printed.err
    assert not (out / "model").exists()
    assert run("merge", str(out), str(tmp_path / "merged")) == 0
    assert [answer(tmp_path / "merged", question) for question in ("a?", "b?")] == ["Yes.", "No."]
    assert served(base, out / "adapter", "a?") == "Yes."
    kept = load_model(base)
    stored = {name: parameter.dtype for name, parameter in kept.named_parameters()}
    assert {name: parameter.dtype for name, parameter in load_model(tmp_path / "merged").named_parameters()} == stored


def served(base: Path, adapter: Path, question: str) -> str:
    """The answer of the base with the adapter beside it."""
    folder = open_folder(str(base))
    model = load_model(base)
    switch = serve_adapters(model, {"mine": read_adapter(adapter, folder.config)})
    ends = end_token_ids(folder.tokenizer, folder.config)
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, adapters=switch, eos_token_ids=ends))
    chat_format = ChatFormat.for_folder(base, tokenizer=folder.tokenizer)
    prompt = ChatPrompt([Message("user", question)]).encode(chat_format, folder.tokenizer)
    chat_format.close()
    request = engine.add_request(prompt.token_ids, SamplingParams(temperature=0.0, max_tokens=12), adapter="mine")
    while engine.has_unfinished:
        engine.step()
    return folder.tokenizer.decode(list(request.output_ids), skip_special=True)


def test_a_server_writes_chats_as_the_adapter_was_trained(
    tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base has no chat template. The adapter's folder brings the one that the run gave it, and its end of a turn;
    an adapter with another one is named."""
    plain = save_plain(tmp_path / "plain")
    runs = {template: tmp_path / template for template in ("instruct", "thinking")}
    for template, out in runs.items():
        command = ("--from", str(plain), "--data", str(chats), "--out", str(out), "--lora", "all")
        assert sft(*command, "--template", template, settings=(*QUICK, "total_steps=2")) == 0
    notes: list[str] = []
    config = ServeConfig(names=["plain"], adapters=runs)
    with pytest.warns(QnextWarning, match="adapter thinking was trained with another chat template"):
        engine, model = load_served(open_folder(str(plain)), config, note=notes.append)
    try:
        assert "no chat template; chats are written as adapter instruct was trained" in notes[0]
        assert model.chat_format is not None and model.chat_format.name == "instruct"
        assert model.tokenizer.token_id("<|im_end|>") in engine.eos_token_ids
    finally:
        model.close()


def test_a_run_goes_on_and_leaves_the_same_adapter(tmp_path: Path, base: Path, chats: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    settings = (*QUICK, "total_steps=6", "snapshot_every=3")
    arguments = ("--from", str(base), "--data", str(chats), "--lora", "experts", "--rank", "2")
    for out in (whole, half):
        assert sft(*arguments, "--out", str(out), settings=settings) == 0
    (last,) = half.glob("snapshots/step-*6")
    for path in sorted(last.iterdir()):
        path.unlink()
    last.rmdir()
    assert sft("--out", str(half), "--resume") == 0
    config = open_folder(str(base)).config
    made = read_provenance(whole / "adapter")
    assert made is not None and made["made_by"] == "train sft" and made["settings"]["adapter"]["rank"] == 2
    assert made["data"] == [{"name": chats.name, "bytes": chats.stat().st_size, "sha256": sha256_of(chats)}]
    assert (made["cost"]["steps"], made["parents"][0]["role"]) == (6, "base") and len(made["parents"][0]["model"]) == 32
    assert str(tmp_path) not in json.dumps(made)
    ours, again = (read_adapter(out / "adapter", config) for out in (whole, half))
    assert all(torch.equal(part.A, again.parts[name].A) for name, part in ours.parts.items())
    assert all(torch.equal(part.B, again.parts[name].B) for name, part in ours.parts.items())


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("--lora", "everything"), "lora must be one of all, attention, experts"),
        (("--rank", "4"), "--rank goes with --lora alone"),
        (("--experts", "all"), "--experts goes with --lora alone"),
        (("--lora", "all", "--experts", "best"), "experts must be all or auto"),
        (("--lora", "all", "--alpha", "-1"), "alpha must be positive"),
    ],
)
def test_impossible_flags_are_named(
    arguments: tuple[str, ...],
    culprit: str,
    tmp_path: Path,
    base: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sft("--from", str(base), "--data", str(chats), "--out", str(tmp_path / "run"), *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert culprit in line
    assert not (tmp_path / "run").exists()
