"""The page on fine-tuning from top to bottom: its commands run, its table is that of the program."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from qnext.cli import main
from qnext.recipes.distill import DistillConfig
from qnext.recipes.dpo import DpoConfig
from qnext.recipes.gspo import GspoConfig
from qnext.recipes.on_policy import OnPolicyConfig
from qnext.recipes.reason import STAGES
from qnext.recipes.sft import SftConfig
from qnext.text.sample_files import LINES, PARQUET
from qnext.text.samples import FORMS
from qnext.training import TrainConfig
from tests.docs.snippets import ROOT, blocks, commands
from tests.recipes.test_instruct import make_small
from tests.text_folders import save_chat, save_plain

PAGE = ROOT / "docs" / "guide" / "fine-tune.md"
SHORT = {  # settings that keep a run short
    "gspo": ["total_steps=2", "prompts=1", "group_size=2", "max_tokens=8"],
    "reason": [
        *(f"{stage}.total_steps=2" for stage in STAGES),
        *("gspo.prompts=2", "gspo.group_size=2", "gspo.max_tokens=8", "gspo.eval_problems=2"),
    ],
}
MORE = {"chat": ["--max-tokens", "4"]}


def test_its_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("qwen3-0.6b", "qwen3-8b"):
        save_chat(tmp_path / "models" / name)
    save_plain(tmp_path / "runs" / "demo" / "model")
    samples = [{"prompt": "a?", "completion": "Yes."}, {"instruction": "b?", "output": "No."}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    pair = {"prompt": "a?", "chosen": "Yes.", "rejected": "No."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "problems.jsonl").write_text('{"prompt": "What is 17 + 5?", "answer": 22}\n')
    make_small(monkeypatch)
    smaller = {"151936": "300"}
    found = [[smaller.get(word, word) for word in words] for block in blocks(PAGE) for words in commands(block)]
    assert len(found) >= 7
    for words in found:
        assert words[0] == "qnext"
        if words[1] in ("serve", "watch"):  # they go on; one serves what `qnext chat` has loaded, one the run before
            continue
        trains = words[1] == "train" and "--show-sample" not in words
        short = SHORT.get(words[2], ["total_steps=2"]) if trains else []
        more = [part for each in short for part in ("--set", each)] or MORE.get(words[1], [])
        monkeypatch.setattr("sys.stdin", io.StringIO("What is 17 + 5?\n"))
        with pytest.raises(SystemExit) as stop:
            main([*words[1:], *more])
        assert stop.value.code == 0, words
    assert list((tmp_path / "runs" / "watched" / "tensorboard").iterdir())
    for name in (
        *("mine", "watched", "better", "student", "new", "writing"),
        *("right", "reason/gspo", "instruct", "thinking"),
    ):
        assert (tmp_path / "runs" / name / "model" / "model.safetensors").is_file()


def test_its_tables_are_those_of_the_program() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", text, re.MULTILINE))
    for form, keys in FORMS.items():
        assert all(f"`{key}`" in rows[form] for key in keys), form
    assert all(f"`{suffix}`" in text for suffix in (*LINES, ".json", *PARQUET))
    owners = (DistillConfig, OnPolicyConfig, DpoConfig, GspoConfig, TrainConfig)
    known = {each.name for owner in owners for each in fields(owner)}
    named = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \|", text.partition("## The training")[2], re.MULTILINE)
    keys = {key for cell in named for key in re.findall(r"`([a-z_]+)`", cell)}
    assert len(keys) >= 10 and keys <= known
    assert set(re.findall(r"--set ([a-z_]+)=", text)) <= known
    assert f"`--set beta={DpoConfig().beta:g}`" in text and f"`epochs` is {DpoConfig().epochs:g}," in text
    ours = DistillConfig(teacher="any")
    assert f"`max_tokens` tokens ({OnPolicyConfig(teacher='any').max_tokens})" in text
    for name in ("share", "budget", "temperature", "router_coefficient"):
        assert f"| `{name}` | {getattr(ours, name):g} |" in text
    assert f"| `kept` | `{ours.kept}` |" in text
    rewarded = GspoConfig()
    assert f"| `prompts`, `group_size` | {rewarded.prompts}, {rewarded.group_size} |" in text
    assert f"| `clip_low`, `clip_high` | {rewarded.clip_low}, {rewarded.clip_high} |" in text
    for name in ("minibatches", "max_tokens", "kl"):
        assert f"| `{name}` | {getattr(rewarded, name):g} |" in text
    assert f"| `epochs` | {SftConfig().epochs:g} |" in text and f"| `held_out` | {SftConfig().held_out:g} |" in text
