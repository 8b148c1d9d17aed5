"""The guide and deploy/README.md are true: commands exist, links lead somewhere, examples run, figures are computed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml

from qnext.cli import click_command, main
from qnext.config import preset
from qnext.planning import kv_bytes_per_token, list_parameters, state_bytes_per_sequence
from qnext.planning.expert_speed import MachineRates, missed_bytes
from qnext.planning.forecast import Circumstances, forecast, step_work
from qnext.quant.scheme import make_policy
from qnext.server.access.keys import KeyRing
from qnext.server.admin import ADMIN_ROUTES
from qnext.server.metrics import ServerCounters, ServerMetrics
from qnext.server.requests import NO_ANSWER
from qnext.server.table import public_routes
from qnext.session.planned import planned_model
from qnext.text.messages import RAW_ARGUMENT
from qnext.text.template_files import TEMPLATE_FILES
from qnext.text.thinking import EFFORTS, KNOWN_ARGUMENTS
from qnext.text.tokenizer_files import READ_FORMS
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.checkpoint.record_folders import RECORD_CONFIG, RecordForm, record_folder
from tests.docs import fields_table, limits_table, supported_page
from tests.docs.snippets import ROOT, USAGE_ERROR, Block, blocks, check_arguments, commands, qnext_arguments
from tests.server.serving import Running, running_server, save_served
from tests.server.test_expert_watch import alerted_watch
from tests.server.test_metrics import Source, made_up

GUIDE = ROOT / "docs" / "guide"
PAGES = [*sorted(GUIDE.glob("*.md")), ROOT / "deploy" / "README.md"]
BLOCKS = [block for path in PAGES for block in blocks(path)]
KEY = "secret-of-the-guide"
ADDRESS = "http://127.0.0.1:8000"
MODEL = "models/qwen3-0.6b"

every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def run_blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and (block.is_run or language == "python")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("guide") / "qwen3-next")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running_server(folder, keys=KeyRing(plain=[KEY])) as running:
        yield running


@every_page
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_index_names_every_page() -> None:
    index = (GUIDE / "README.md").read_text(encoding="utf-8")
    assert {p.name for p in GUIDE.glob("*.md")} - {"README.md"} == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


@every_page
def test_commands_of_qnext_parse(path: Path) -> None:
    found = [words for block in blocks(path) for words in commands(block)]
    for words in found:
        arguments = qnext_arguments(words)
        if arguments is not None:
            check_arguments(arguments)


def test_the_check_of_commands_can_fail() -> None:
    wrong = (["serve", "m", "--no-such-flag"], ["serve"], ["serve", "m", "--port", "x"], ["keys", "create"])
    for arguments in wrong:
        with pytest.raises(USAGE_ERROR):
            check_arguments(arguments)
    with pytest.raises(AssertionError):
        check_arguments(["fly"])
    block = Block(Path("x"), "sh", "sudo qnext keys list --file f | cat\ncurl -d '{\n}' x # qnext\n", False)
    called, *others = commands(block)
    assert qnext_arguments(called) == ["keys", "list", "--file", "f"]
    assert others == [["cat"], ["curl", "-d", "{\n}", "x"]]


def test_flags_named_in_the_text_exist() -> None:
    """Flags in backticks outside code blocks are of `qnext serve` unless the text says another verb before them."""
    known: set[str] = {"--help", "--config", "--shm-size", "--model-path"}
    for verb in (
        "serve",
        "keys create",
        "quantize",
        "experts",
        "attention",
        "compare",
        "doctor",
        "bench",
        "chat",
        "generate",
        "convert",
        "train",
        "train-sft",
        "train-distill",
        "train-gspo",
        "init",
        "plan",
        "audit-verify",
        "audit-show",
        "audit-trace",
        "eval-tasks",
        "eval-docs",
        "eval-harness",
        "eval-quant",
        "eval-speed",
        "eval-bias",
        "watermark create",
        "watermark detect",
    ):
        name, _, sub = verb.partition(" ")
        command = click_command(name)
        command = command.commands[sub] if sub else command
        known |= {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            if (
                code.startswith(("docker", "kubectl", "helm", "tensorboard", "ray ", "torchrun"))
                or "PYTHON_IMAGE" in code
            ):
                continue
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
                assert flag in known, f"{path.name}: {flag}"


def test_routes_named_exist() -> None:
    routes = {route.path for route in (*public_routes(), *ADMIN_ROUTES)}
    named = r"(?:/v1|/admin|/health|/live|/metrics|/tokenize|/detokenize|/tokenizer_info|/version)\b[/\w{}-]*"
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for route in re.findall(rf"`(?:GET |POST )?({named})`|127\.0\.0\.1:8000({named})", text):
            found = next(filter(None, route)).rstrip("/")
            assert found in routes or found == "/v1", f"{path.name}: {found}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("json", "yaml")], ids=str)
def test_files_parse(block: Block) -> None:
    assert json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four experts a layer that stands for the one of 80 billion parameters."""
    path = tmp_path_factory.mktemp("records") / "m"
    record_folder(path, RecordForm("float16", 4, 32), config=replace(RECORD_CONFIG, max_position_embeddings=32_768))
    save_tokenizer(byte_level_tokenizer(), path, model_max_length=32_768)
    return path


@pytest.mark.parametrize("block", run_blocks("sh"), ids=str)
def test_shell_examples_run(block: Block, server: Running, records: Path) -> None:
    for words in commands(block):
        if words[0] == "qnext":
            with pytest.raises(SystemExit) as stop:
                main([word.replace("models/80b-records", str(records)) for word in words[1:]])
            assert stop.value.code == 0, words
            continue
        assert words[0] == "curl", words
        words = [word.replace(ADDRESS, server.url).replace("$QNEXT_KEY", KEY) for word in words]
        if "Authorization" not in " ".join(words):  # a page that knows no keys yet
            words += ["-H", f"Authorization: Bearer {KEY}"]
        done = subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr
        check_answer(words, done.stdout)


def check_answer(words: list[str], answer: str) -> None:
    """What the page says of the answer."""
    if any(word.endswith("/metrics") for word in words):
        assert "qnext_num_requests_waiting" in answer
        return
    body = json.loads(words[words.index("-d") + 1]) if "-d" in words else {}
    if body.get("stream"):
        assert answer.rstrip().endswith("data: [DONE]") and '"usage":{' in answer
        return
    values = json.loads(answer)
    choice = values.get("choices", [{}])[0]
    if "response_format" in body:
        assert json.loads(choice["message"]["content"])["verdict"] in ("good", "bad", "mixed")
    elif "guided_choice" in body:
        assert choice["text"] in body["guided_choice"]
    elif "guided_regex" in body:
        assert re.fullmatch(body["guided_regex"], choice["text"])
    elif body.get("tool_choice") == "required":
        assert choice["finish_reason"] == "tool_calls"
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["city"] in ("Oslo", "Rome")
    elif body.get("timings"):
        assert "cached_tokens" in values["usage"]["prompt_tokens_details"] and "prompt_ms" in values["timings"]
    elif "messages" in body:
        assert values["usage"]["completion_tokens"] <= body["max_tokens"]
    elif "prompt" in body:
        assert values["count"] == len(values["tokens"]) > 0
    else:
        assert values.get("data") or values["status"] in ("ok", "ready")


@pytest.mark.parametrize("block", run_blocks("python"), ids=str)
def test_python_examples_run(block: Block, folder: Path, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNEXT_KEY", KEY)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    text = block.text.replace(ADDRESS, server.url).replace(MODEL, str(folder))
    code = compile(text, block.path.name, "exec", dont_inherit=True)
    exec(code, {"__name__": __name__})


def test_metrics_named_exist(server: Running) -> None:
    with server.client(KEY) as client:
        sample = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert sample.status_code == 200
        served = client.get("/metrics").text
    counters = ServerCounters()
    counters.observe_moderation("prompt", "allow", 0.1)
    streams = ServerMetrics(counters, model_name="a", block_size=16, source=Source(made_up(streams=True)))
    streams.watch = alerted_watch()
    served += streams.render().decode()
    for path in PAGES:
        for name in re.findall(r"\bqnext_[a-z_]+", path.read_text(encoding="utf-8")):
            assert f"# TYPE {name} " in served, f"{path.name}: {name}"


def test_the_table_of_limits_is_that_of_the_program() -> None:
    assert limits_table.PAGE.read_text(encoding="utf-8") == limits_table.page(), "python -m tests.docs.limits_table"
    for _, flag in limits_table.OPERATOR.values():
        if flag is not None:
            check_arguments(["serve", "model", flag, "1"])


def test_the_tables_of_fields_are_those_of_the_program() -> None:
    assert fields_table.PAGE.read_text(encoding="utf-8") == fields_table.page(), "python -m tests.docs.fields_table"


def test_what_is_supported_is_told_by_the_program() -> None:
    assert supported_page.PAGE.read_text(encoding="utf-8") == supported_page.page(), (
        "python -m tests.docs.supported_page"
    )


def raised_errors() -> set[tuple[int, str]]:
    """(status, code) of every error that the server's code makes, read from its calls; the code is "" where there is
    none."""
    found: set[tuple[int, str]] = set()
    kinds = {"bad": (400, "invalid_value"), "busy": (503, "overloaded"), "too_long": (400, "context_length_exceeded")}
    for path in sorted((ROOT / "qnext" / "server").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            values = {keyword.arg: keyword.value for keyword in call.keywords}
            status, code = kinds.get(name, (None, ""))
            if name in ("ApiError", "cls") and call.args:
                values.setdefault("status", call.args[0])
            elif status is None:
                continue
            statuses = constants(values["status"]) if "status" in values else {status}
            codes = constants(values["code"]) if "code" in values else {code}
            found |= {(one, other or "") for one in statuses for other in codes if isinstance(one, int)}
    return found


def constants(value: ast.expr) -> set[Any]:
    """What an expression may be, as far as its text says."""
    if isinstance(value, ast.IfExp):
        return constants(value.body) | constants(value.orelse)
    return {value.value} if isinstance(value, ast.Constant) else set()


def test_the_table_of_errors_has_every_status_and_code_of_the_server() -> None:
    text = (GUIDE / "errors.md").read_text(encoding="utf-8")
    rows = {(int(s), c) for s, c in re.findall(r"^\| (\d{3}) \| (?:`([a-z_]+)`)? ?\|", text, re.MULTILINE)}
    raised = raised_errors()
    assert len(raised) > 25
    # Made of variables: routes that are not there, and what was passed on.
    raised |= {(404, "not_found"), (405, "method_not_allowed"), (400, "missing_required_parameter")}
    raised |= {(503, "aborted_by_admin"), (503, "draining")}
    assert raised - rows == set()
    assert rows - raised == set()
    source = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "qnext" / "server").rglob("*.py")))
    logged = set(re.findall(r'"(client_(?:disconnected|too_[a-z_]+))"', source))
    assert logged == set(re.findall(r"`(client_[a-z_]+)`", text))
    sent = set(map(int, re.findall(r'"?status(?:_code)?"?[:=] ?(\d{3})\b', source))) | {NO_ANSWER}
    assert {204, 304, 503} <= sent
    assert {status for status in sent if f"{status}" not in text} == set()


def test_the_examples_of_errors_are_answers_of_the_server(server: Running) -> None:
    openai, anthropic = (json.loads(block.text) for block in blocks(GUIDE / "errors.md") if block.language == "json")
    messages = [{"role": "user", "content": "a"}]
    with server.client(KEY) as client:
        wrong = client.post("/v1/chat/completions", json={"messages": messages, "temperature": -1})
        assert (wrong.status_code, wrong.json()) == (400, openai)
        lacking = client.post("/v1/messages", json={"model": "qwen3-next", "messages": messages})
        assert (lacking.status_code, lacking.json()) == (400, anthropic)


def test_the_table_of_scopes_is_that_of_the_routes() -> None:
    text = (GUIDE / "serve-a-team.md").read_text(encoding="utf-8")
    routes = {route.path: route.scope for route in public_routes()}
    for scope in ("tokenize", "metrics"):
        (row,) = re.findall(rf"^\| `{scope}` \| (.*) \|$", text, re.MULTILINE)
        assert set(re.findall(r"`([^`]+)`", row)) == {path for path, needed in routes.items() if needed == scope}
    assert all(path.startswith("/v1/") == (scope == "inference") for path, scope in routes.items())
    assert {route.scope for route in ADMIN_ROUTES} == {"admin"}


def folder_gibibytes(scheme: str | None) -> float:
    """GiB of the 80B model's tensors, in bf16 or quantised with bf16 scales."""
    policy = None if scheme is None else make_policy(scheme, head=None, is_tied=False)
    total = 0.0
    for info in list_parameters(preset("80b-a3b")).values():
        found = None if policy is None else policy.scheme_of(info)
        total += prod(info.shape) * (2 if found is None else found.bits / 8 + 2 / found.group_size)
    return total / 2**30


def test_figures_of_memory_are_those_of_the_shapes() -> None:
    text = (GUIDE / "run-the-80b.md").read_text(encoding="utf-8")
    for label, scheme in (("bf16", None), ("`int8`", "int8"), ("`int4-g32`", "int4-g32"), ("`int4-g128`", "int4-g128")):
        size = folder_gibibytes(scheme)
        assert f"| {label} | {size * 2**30 / 1e9:.1f} GB ({size:.1f} GiB) |" in text
    config = preset("80b-a3b")
    whole = " ".join(path.read_text(encoding="utf-8") for path in PAGES)
    per_1000 = {dtype: kv_bytes_per_token(config, dtype=dtype) * 1000 / 2**20 for dtype in ("bfloat16", "int8")}
    assert set(re.findall(r"(\S+) MiB (?:for every|per) 1,000", whole)) == {f"{per_1000['bfloat16']:.1f}"}
    assert f"`--kv-cache-dtype int8`: {per_1000['int8']:.1f} MiB" in whole
    assert f"{per_1000['bfloat16'] * 262.144 / 1024:.1f} GiB for all 262,144 tokens" in whole
    state = f"{state_bytes_per_sequence(config).total / 2**20:.1f}"
    assert len(re.findall(rf"{re.escape(state)} MiB", whole)) == 2


def test_hit_rates_are_those_of_the_plan() -> None:
    text = (GUIDE / "run-the-80b.md").read_text(encoding="utf-8")
    model = planned_model("80b-a3b", "int4-g32")
    rows = re.findall(r"^\| (\d+) GiB \|", text, re.MULTILINE)
    assert len(rows) >= 4
    for memory in rows:
        rates = MachineRates(memory=1e10, disk=1e9, arithmetic=1e12)
        found = forecast(model.config, model.sizes, Circumstances(int(memory) << 30, 2, rates, 4096, 1))
        hits = " | ".join(f"{speed.hit_rate:.0%}" for speed in found.traffic.values())
        assert f"| {memory} GiB | {found.share:.0%} | {hits} |" in text
    missed = missed_bytes(step_work(model.config, model.sizes, 4096), 0.5)
    assert f"reads {missed / 1e6:.0f} MB, and a disk of 1.5 GB/s allows {1.5e9 / missed:.1f} such tokens" in text


def test_the_page_on_prompts_names_what_is_read() -> None:
    text = (GUIDE / "prompts.md").read_text(encoding="utf-8")
    files = [name for form in READ_FORMS for name in form.split(" + ")]
    names = [*KNOWN_ARGUMENTS, *TEMPLATE_FILES, *files, RAW_ARGUMENT, *EFFORTS[:2]]
    assert not [name for name in names if f"`{name}`" not in text]
