"""From files of chats to a folder that answers as they do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import load_model
from qnext.checkpoint.snapshot import list_snapshots, load_snapshot
from qnext.cli import main
from qnext.text.chat import ChatFormat
from qnext.text.tokenizer import Tokenizer
from tests.text_folders import save_plain

QUICK = ("lr=1e-2", "tokens_per_batch=128", "sequence_length=128", "precision=float32", "eval_every=0", "held_out=0")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def sft(*arguments: str, settings: tuple[str, ...] = ()) -> int:
    return run("train", "sft", *arguments, *(part for each in settings for part in ("--set", each)))


def metrics(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("elapsed", "tokens_per_second")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines if "loss" in line]


def answer(folder: Path, question: str) -> str:
    """The greedy answer of `qnext chat`'s own path: template, ids, engine."""
    from qnext import LLM, SamplingParams

    with LLM(str(folder)) as llm:
        return llm.chat([{"role": "user", "content": question}], SamplingParams(temperature=0.0, max_tokens=12)).content


def test_a_model_learns_the_answers_and_answers_in_chat(
    tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert sft("--from", str(base), "--data", str(chats), "--out", str(out), settings=(*QUICK, "total_steps=60")) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "model")
    assert "2 samples" in printed.err and "learnt" in printed.err and "zero-centred norm" in printed.err
    assert [answer(out / "model", question) for question in ("a?", "b?")] == ["Yes.", "No."]
    generation = json.loads((out / "model" / "generation_config.json").read_text())
    assert generation["temperature"] == 1.4 and 258 in generation["eos_token_id"], "what the base recommends stays"
    before, after = load_model(base), load_model(out / "model")
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert one.dtype == other.dtype and not torch.equal(one, other), name
    assert sft("--from", str(base), "--data", str(chats), "--out", str(out)) == 2
    assert "holds a run already; --resume continues it" in capsys.readouterr().err


def test_a_base_without_a_template_is_given_one(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, out = save_plain(tmp_path / "plain"), tmp_path / "run"
    command = ("--from", str(plain), "--data", str(chats), "--out", str(out))
    assert sft(*command) == 2
    assert "no chat template; --template instruct or thinking gives it one" in capsys.readouterr().err
    assert sft(*command, "--template", "chatml") == 2
    assert "--template chatml: expected one of instruct, thinking" in capsys.readouterr().err
    assert sft(*command, "--template", "thinking", settings=(*QUICK, "total_steps=2")) == 0
    model = out / "model"
    tokenizer = Tokenizer.from_folder(model)
    assert ChatFormat.for_folder(model).name == "thinking"
    assert tokenizer.token_id("<|im_end|>") in tokenizer.eos_ids & set(load_model(model).config.eos_token_ids)


def test_resumed_equals_uninterrupted(
    tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    command = ("--from", str(base), "--data", str(chats), "--data", str(chats.parent))
    settings = (
        *QUICK,
        "tokens_per_batch=30",
        "sequence_length=30",
        "total_steps=6",
        "snapshot_every=2",
        "weights=2,1",
        "keep_snapshots=9",
    )
    more = chats.parent / "more.jsonl"
    more.write_text(json.dumps({"prompt": "c?", "completion": "Maybe."}) + "\n")
    assert sft(*command, "--out", str(straight), settings=settings) == 0
    assert sft(*command, "--out", str(cut), settings=settings) == 0
    shutil.rmtree(cut / "model")
    for path in list_snapshots(cut / "snapshots")[1:]:
        shutil.rmtree(path)
    capsys.readouterr()
    more.unlink()  # the tokenised data is enough
    assert sft("--out", str(cut), "--resume") == 0
    assert "resumed at step 2" in capsys.readouterr().err
    assert metrics(straight) == metrics(cut)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (straight / "model" / name).read_bytes() == (cut / "model" / name).read_bytes(), name


def test_a_run_that_gets_worse_ends_with_its_best_model_and_a_page(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "run", tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i * i}."}) + "\n" for i in range(20)))
    settings = (*QUICK, "held_out=0.5", "eval_every=1", "early_stop=2", "lr=0.3", "total_steps=40", "snapshot_every=40")
    command = ("--from", str(base), "--data", str(data), "--out", str(out), "--page-port", "0")
    assert sft(*command, settings=settings) == 0
    said = capsys.readouterr().err
    assert "the page of this run: http://127.0.0.1:" in said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["evaluation"]["loss"] for line in lines if "evaluation" in line}
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == best + 2 < 40
    assert f"none of the last 2 evaluations was better than step {best}'s" in said
    assert f"the model is that of step {best}" in said
    (snapshot,) = list_snapshots(out / "snapshots")
    kept, saved = load_snapshot(snapshot).tensors["best"], dict(load_model(out / "model").named_parameters())
    assert all(torch.equal(value.to(saved[name].dtype), saved[name]) for name, value in kept.items())


def test_show_sample_marks_what_is_learnt_and_trains_nothing(
    tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert sft("--from", str(base), "--data", str(chats), "--out", str(out), "--show-sample", "2") == 0
    printed = capsys.readouterr().out
    assert "assistant\n⟦Yes.<|im_end|>⟧" in printed and "⟦No.<|im_end|>⟧" in printed
    assert "a?<|im_end|>" in printed and not (out / "model").exists() and not (out / "snapshots").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "message"),
    [
        ((), (), 2, "--from MODEL is missing"),
        (("--from", "BASE"), (), 2, "--data FILE is missing"),
        (("--from", "BASE", "--data", "none.jsonl"), (), 2, "none.jsonl: no such file or folder"),
        (("--from", "nowhere", "--data", "DATA"), (), 3, "nowhere"),
        (("--from", "BASE", "--data", "DATA"), ("speed=1",), 2, "--set speed: unknown"),
        (("--from", "BASE", "--data", "DATA"), ("taught=first",), 2, "taught must be one of assistant, last, whole"),
        (("--from", "BASE", "--data", "DATA"), ("form=csv",), 2, "form must be one of messages"),
        (("--from", "BASE", "--data", "DATA"), ("held_out=0.9",), 2, "held_out must be between 0 and 0.5"),
        (("--from", "BASE", "--data", "DATA"), ("epochs=0",), 2, "epochs must be above zero"),
        (("--from", "BASE", "--data", "DATA"), ("weights=1,2",), 2, "1 sources need as many weights"),
        (
            ("--from", "BASE", "--data", "DATA"),
            ("sequence_length=8",),
            2,
            "nothing to learn from in it; 2 samples: too",
        ),
        (("--from", "BASE", "--data", "DATA"), ("tokens_per_batch=9", "sequence_length=99"), 2, "longer than a batch"),
        (("--resume",), (), 2, "holds no run that could be resumed"),
        (("--resume", "--data", "DATA"), (), 2, "--resume takes --from, --data, --recipe, --template and --lora"),
    ],
)
def test_faults_of_the_user_are_one_line(
    tmp_path: Path,
    base: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    settings: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    named = {"BASE": str(base), "DATA": str(chats)}
    out = ("--out", str(tmp_path / "run"))
    assert sft(*(named.get(each, each) for each in arguments), *out, settings=settings) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("qnext train-sft: ")
