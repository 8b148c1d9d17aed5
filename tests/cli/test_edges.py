"""Every file, folder and model that a verb takes, and what people and scripts give there by mistake: one line, a right
exit code, nothing left behind. The options are read from the verbs, so a new one needs a line in the tables below."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.cli import VERBS, click_command
from qnext.engine.policy.watermark_key import WatermarkKey
from qnext.errors import CorruptCheckpoint, QnextWarning, one_line
from qnext.session.watermark import write_key

from .command import Capture, make_model, run

BATCH = '{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":"a"}}\n'
TRACED = '{"request_id":"a","trace":{"template":null,"seeds":[1],"also_given":[]}}\n'
# verb and parameter -> a command whose X is what is tried
INPUTS = {
    "init tokenizer": "init nano-5m NEW --tokenizer X",
    "inspect model": "inspect X",
    "verify model": "verify X",
    "logits model": "logits X --tokens 1 --out NEW",
    "logits tokens": "logits MODEL --tokens @X --out NEW",
    "generate model": "generate X text",
    "chat model": "chat X text",
    "serve model": "serve X --port 0",
    "serve audit_log": "serve MODEL --port 0 --audit-log X/none",
    "run-batch model": "run-batch X -i BATCH -o NEW",
    "run-batch input": "run-batch MODEL -i X -o NEW --max-model-len 1",
    "eval model": "eval X BATCH",
    "eval-bias model": "eval-bias X --axes age",
    "eval-bias pairs": "eval-bias MODEL --pairs X",
    "eval-quant models": "eval-quant MODEL X --text BATCH",
    "eval-quant filler": "eval-quant MODEL MODEL --text BATCH --tasks needle --filler X --lengths 9",
    "eval-speed model": "eval-speed X --minutes 0",
    "eval-docs folder": "eval-docs X --model MODEL --lengths 9",
    "eval-docs model": "eval-docs BATCH --model X",
    "eval-harness model": "eval-harness X --tasks a",
    "eval-harness include_path": "eval-harness MODEL --tasks a --include-path X/none",
    "eval-tasks model": "eval-tasks X --tasks copy --lengths 100",
    "eval-tasks filler": "eval-tasks MODEL --tasks needle --filler X --lengths 9",
    "quantize model": "quantize X NEW",
    "quantize text": "quantize MODEL NEW --scheme int4-g32 --text X",
    "bench model": "bench X",
    "convert model": "convert X NEW",
    "merge adapter": "merge X NEW",
    "experts model": "experts X text",
    "experts file": "experts MODEL --text X",
    "experts baseline": "experts MODEL text --baseline X",
    "experts other": "experts MODEL text --compare X",
    "experts against": "experts MODEL text --against X",
    "attention model": "attention X text",
    "attention file": "attention MODEL --text X",
    "compare model": "compare X MODEL",
    "compare other": "compare MODEL X",
    "compare file": "compare MODEL MODEL --text X",
    "compare tokens": "compare MODEL MODEL --tokens @X",
    "keys create file": "keys create --name a --file X",
    "keys list file": "keys list --file X",
    "keys show file": "keys show a --file X",
    "keys rotate file": "keys rotate a --file X",
    "keys revoke file": "keys revoke a --file X",
    "generate watermark": "generate MODEL text --watermark X",
    "chat watermark": "chat MODEL --watermark X",
    "watermark detect file": "watermark detect --key KEY --model MODEL X",
    "watermark detect key": "watermark detect --key X --model MODEL BATCH",
    "watermark detect model": "watermark detect --key KEY --model X BATCH",
    "audit log": "audit X",
    "audit-verify log": "audit-verify X",
    "audit-show log": "audit-show X",
    "audit-trace log": "audit-trace X a",
    "audit-trace model": "audit-trace LOG a --model X",
    "audit-trace adapter": "audit-trace LOG a --model MODEL --adapter X",
    "doctor model": "doctor X",
    "plan models": "plan X",
    "train-sft base": "train-sft --from X --data BATCH --out NEW",
    "train-sft data": "train-sft --from MODEL --data X --out NEW --template instruct",
    "train-dpo base": "train-dpo --from X --data BATCH --out NEW",
    "train-dpo data": "train-dpo --from MODEL --data X --out NEW --template instruct",
    "train-gspo base": "train-gspo --from X --data BATCH --out NEW",
    "train-gspo data": "train-gspo --from MODEL --data X --out NEW --template instruct",
    "train-distill base": "train-distill --from X --teacher MODEL --data BATCH --out NEW",
    "train-distill teacher": "train-distill --from MODEL --teacher X --data BATCH --out NEW --template instruct",
    "train-distill data": "train-distill --from MODEL --teacher MODEL --data X --out NEW --template instruct",
}
OUTPUTS = {
    "watermark create file": "watermark create X",
    "init out": "init nano-5m X --layers 4 --experts 2 --experts-per-token 1 --vocab-size 300",
    "logits out": "logits MODEL --tokens 1 --out X",
    "run-batch output": "run-batch MODEL -i BATCH -o X --max-model-len 1",
    "quantize out": "quantize MODEL X --scheme int4-g16",
    "convert out": "convert MODEL X",
    "experts save_baseline": "experts MODEL text --save-baseline X",
    "experts picture": "experts MODEL text --picture X",
    "eval-tasks picture": "eval-tasks MODEL --tasks needle --lengths 9 --picture X",
    "attention picture": "attention MODEL text --picture X",
    "compare picture": "compare MODEL MODEL --random 4 --picture X",
    "plan picture": "plan nano-5m --machine h200 --picture X",
}
# what is no file of this machine, needs a server or another program, or trains for minutes; tested in the verb's tests
ELSEWHERE = {
    "demo out",
    "train out",
    "train-sft out",
    "train-dpo out",
    "train-distill out",
    "train-gspo out",
    "train-reason out",
    "pull out",
    "bench llama_cpp",
    "bench gguf",
    "bench cache",
    "claims out",
    "claims llama_cpp",
    "bench-serve model",
    "bench-serve dataset_path",
    "bench-serve save_result",
    "keys create model",
    "experts text",
    "eval files",
    "eval-quant text",
    "attention text",
    "merge base",
    "merge out",
    "watch run",
    "plan calibration",
    "quantize report",
}
SERVE = {"serve model", "serve audit_log"}


def parameters() -> Iterator[str]:
    """Those whose value names a file, a folder or a model."""
    for verb in VERBS:
        whole = click_command(verb)
        for name, command in (getattr(whole, "commands", None) or {"": whole}).items():
            hints = inspect.signature(inspect.unwrap(command.callback), eval_str=True).parameters
            for each in command.params:
                hint = str(hints[each.name].annotation) if each.name in hints else ""
                if "Path" in hint or any(word in str(each.metavar) for word in ("FILE", "FOLDER", "MODEL")):
                    yield " ".join(part for part in (verb, name, each.name) if part)


def test_every_parameter_is_tried() -> None:
    known = {*INPUTS, *OUTPUTS, *ELSEWHERE}
    found = {each for each in parameters() if not each.startswith("serve ")} | SERVE
    assert found - known == set(), "a new parameter needs a line in INPUTS or OUTPUTS"
    assert known - found <= {
        "logits tokens",
        "experts text",
        "eval files",
        "eval-quant text",
        "attention text",
        "bench-serve model",
        "keys create model",
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edges")
    make_model(folder)
    (folder / "batch").write_text(BATCH)
    (folder / "log").write_text(TRACED)
    write_key(folder / "key", WatermarkKey(bytes(32)))
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(bytes(range(256)) * 40)
    (folder / "folder").mkdir()
    (folder / "full").symlink_to("/dev/full")
    return folder


def _words(command: str, shared: Path, new: Path, value: str) -> list[str]:
    places = {
        "MODEL": shared / "model",
        "BATCH": shared / "batch",
        "LOG": shared / "log",
        "KEY": shared / "key",
        "NEW": new,
    }
    words = []
    for word in command.split():
        words.append(str(places.get(word, word.replace("X", value) if "X" in word else word)))
    return words


def _is_one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1 and text[:-1].isprintable() and len(text) < 1500


BAD = ("none", "empty", "binary", "folder", "LONG", "ESCAPES")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("parameter", [each for each in INPUTS if each not in SERVE])
def test_a_bad_input_is_one_line(parameter: str, bad: str, shared: Path, tmp_path: Path, capsys: Capture) -> None:
    if parameter.startswith("keys ") and bad in ("none", "ESCAPES"):
        pytest.skip("a file that is not there yet")
    value = {"LONG": "n" * 100_000, "ESCAPES": "no\n\x1b[31m\u202e\tname"}.get(bad, str(shared / bad))
    command = INPUTS[parameter]
    words = _words(command, shared, tmp_path / "new", value)
    result = run(capsys, *words)
    told = result.out + result.err if parameter.startswith("doctor") else result.err
    assert result.code in ((1, 2, 3, 5, 6) if parameter.startswith("doctor") else (2, 3, 5, 6)), told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
    if not parameter.startswith("doctor"):
        assert _is_one_line(result.err), result.err[:3000]
    assert len(told) < 5000
    assert "\x1b[31m" not in told


@pytest.mark.parametrize("bad", ["none/out", "folder", "full", "LONG", "binary/out"])
@pytest.mark.parametrize("parameter", OUTPUTS)
def test_a_bad_output_is_one_line(parameter: str, bad: str, shared: Path, tmp_path: Path, capsys: Capture) -> None:
    value = str(shared / bad) if bad != "LONG" else str(tmp_path / ("n" * 100_000))
    makes_parents = parameter in ("init out", "quantize out", "convert out")
    if makes_parents and bad in ("none/out", "folder"):
        pytest.skip("it is made")
    before = {path.name: path.lstat().st_mtime_ns for path in shared.iterdir()}
    result = run(capsys, *_words(OUTPUTS[parameter], shared, tmp_path / "new", value))
    assert result.code in (2, 3, 4, 5, 6), result.err
    assert "Traceback" not in result.err
    assert _is_one_line(result.err[-1500:].splitlines(keepends=True)[-1])
    assert result.err.count("qnext ") <= 2
    assert list(tmp_path.iterdir()) == []
    assert {path.name: path.lstat().st_mtime_ns for path in shared.iterdir()} == before
    assert (shared / "full").is_symlink()
    assert os.listdir(shared / "folder") == []


LONG = "v" * 100_000
WORDS = [
    f"{LONG}",
    f"generate {LONG} text",
    f"generate MODEL text --{LONG}",
    f"generate MODEL text --dtype {LONG}",
    f"generate MODEL text --temperature {LONG}",
    f"generate MODEL text --max-tokens {LONG}",
    f"generate MODEL text extra {LONG}",
    f"train {LONG}",
    f"train small-code --set {LONG}",
    f"train small-code --set {LONG}=1",
    f"train small-code --set lr={LONG}",
    f"train small-code --set model.hidden_size={LONG}",
    f"init {LONG} NEW",
    f"init nano-5m NEW --dtype {LONG}",
    f"init nano-5m NEW --layers {LONG}",
    f"quantize MODEL NEW --scheme {LONG}",
    f"quantize MODEL NEW --scheme int4-g32 --method {LONG}",
    f"quantize MODEL NEW --scheme int4-g32 --head {LONG}",
    f"convert MODEL NEW.gguf --type {LONG}",
    f"convert MODEL NEW --dtype {LONG}",
    f"logits MODEL --tokens {LONG} --out NEW",
    f"logits MODEL --tokens {'9' * 4000} --out NEW",
    f"bench MODEL --scheme {LONG}",
    f"bench MODEL --peer {LONG}",
    f"bench-serve --url {LONG}",
    f"chat --url http://{LONG}",
    f"eval MODEL {LONG}",
    f"completion {LONG}",
    f"keys create --name a --scope {LONG} --file NEW",
    f"keys create --name a --expires {LONG} --file NEW",
    f"keys revoke {LONG} --file NEW",
    f"serve MODEL --speculative-config {LONG}",
    f"serve MODEL --host {LONG} --port 0 --insecure-no-auth",
    f"serve MODEL --default-chat-template-kwargs {LONG}",
    f"generate MODEL text --config {LONG}",
]


@pytest.mark.parametrize("line", WORDS, ids=[line.replace(LONG, "LONG")[:60] for line in WORDS])
def test_a_long_value_is_told_by_its_beginning(line: str, shared: Path, tmp_path: Path, capsys: Capture) -> None:
    result = run(capsys, *_words(line, shared, tmp_path / "new", "X"))
    assert result.code in (2, 3, 6), result.err[:500]
    assert "Traceback" not in result.err
    assert _is_one_line(result.err.splitlines(keepends=True)[-1]), result.err[:2000]
    assert len(result.err) < 1500
    assert len(result.out) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_spoils_a_line_is_escaped() -> None:
    error = CorruptCheckpoint("file a\nb\x1b[2J\u202e\udc80: bad")
    assert str(error) == "file a\\nb\\x1b[2J\\u202e\\udc80: bad"
    assert str(QnextWarning("a\rb")) == "a\\rb"
    long = one_line("begin " + "x" * 100_000 + " end")
    assert long.startswith("begin xxx") and long.endswith("xxx end") and "99,110 more characters" in long
