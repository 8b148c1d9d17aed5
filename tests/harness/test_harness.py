"""lm-evaluation-harness on qnext: the numbers of one forward pass after another, in process and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qnext.harness.tables import TABLES, rows_of
from qnext.session.llm import LLM
from tests.cli.command import Capture, run
from tests.server.serving import Running, running_server, save_served

CONTEXT = 128
CLOSE = 1e-4  # sums of at most 130 log-probabilities, each rounded to float32 and computed with other batches
QUESTIONS = [
    {"question": "Two and two are", "choices": [" four", " five", " a lot of things"], "label": 0},
    {"question": "Ärger über 東京:", "choices": [" ja", " 日本", " nein"], "label": 1},
    {"question": "def main(", "choices": [")", "argv):", "self, *, x=1) -> None:"], "label": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
metadata: {{version: 1}}
"""
CHOICE = (
    "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n"
)
ROLLING = (
    "output_type: loglikelihood_rolling\ndoc_to_target: '{{question * 12}}'\nmetric_list: [{metric: byte_perplexity}]\n"
)
WRITE = """output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("models") / "asked", context=CONTEXT)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, form in (("own_choice", CHOICE), ("own_rolling", ROLLING), ("own_write", WRITE)):
        (root / f"{name}.yaml").write_text(TASK.format(name=name, data=root / "data.jsonl") + form)
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running_server(folder) as running:
        yield running


def test_the_three_verbs_equal_one_forward_pass_after_another(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from qnext.harness.model import HarnessModel
    from tests.server.clients.in_process import InProcess

    expected = InProcess(folder, max_length=CONTEXT - 1)
    pairs = [("Two and two are", " four"), ("", "from nothing"), ("a" * 150, " end"), ("def main(", "argv):")]
    greedy = expected.tok_encode("def main(")
    with LLM(folder, max_num_seqs=3) as llm:
        model = HarnessModel(llm)
        asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        for found, own in zip(model.loglikelihood(asked), expected.loglikelihood(asked), strict=True):
            assert abs(found[0] - own[0]) < CLOSE and found[1] is own[1]
        likely = expected.greedy(greedy, 4)
        ((score, is_greedy),) = model._loglikelihood_tokens([(("", ""), greedy, likely)])
        assert is_greedy and score < 0
        texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("short", "x = 1\n" * 60)]
        rolled = model.loglikelihood_rolling(texts)
        assert rolled == pytest.approx(expected.loglikelihood_rolling(texts), abs=10 * CLOSE)
        wanted = {"until": ["\n\n"], "max_gen_toks": 9}
        answers = [Instance("generate_until", {}, (text, wanted), 0) for text, _ in pairs[::3]]
        assert model.generate_until(answers) == expected.generate_until(answers)
        turns = [{"role": "user", "content": "Hi"}]
        assert model.tok_encode(model.apply_chat_template(turns)) == llm._chat_prompt("Hi", None, None).token_ids


def _scores(text: str) -> dict[tuple[str, str], float]:
    return {(score["task"], score["metric"]): score["value"] for score in json.loads(text)}


def test_over_http_the_numbers_are_equal(folder: Path, tasks: Path, server: Running, capsys: Capture) -> None:
    asked = ("--tasks", "own_choice,own_rolling,own_write", "--include-path", tasks, "--json")
    here = run(capsys, "eval", "harness", folder, *asked)
    there = run(capsys, "eval", "harness", "--url", server.url, *asked)
    assert here.code == there.code == 0, here.err + there.err
    found, served = _scores(here.out), _scores(there.out)
    assert {task for task, _ in found} == {"own_choice", "own_rolling", "own_write"} and found.keys() == served.keys()
    for name, value in found.items():
        assert served[name] == pytest.approx(value, rel=1e-5), name


def test_a_table_lists_published_figures_and_commands(capsys: Capture) -> None:
    told = run(capsys, "eval", "harness", "--table", "instruct", "--json")
    rows = {row["key"]: row for row in json.loads(told.out)["rows"]}
    assert rows["mmlu_pro"]["published"] == 80.6 and rows["mmlu_pro"]["own"] is None
    assert rows["mmlu_pro"]["settings"]["temperature"] == 0.7
    assert rows["livebench"]["command"] is None and "LiveBench" in rows["livebench"]["instead"]
    for table in TABLES:
        assert run(capsys, "eval-harness", "--table", table).out.count("\n") > len(rows_of(table))


def test_a_row_runs_with_its_settings(folder: Path, tasks: Path, monkeypatch: Any, capsys: Capture) -> None:
    """The row asks a task of this test instead of its own, whose data are elsewhere."""
    from dataclasses import replace

    from qnext.harness import tables

    row = next(row for row in tables.rows_of("base") if row.key == "mmlu")
    changed = replace(row, tasks=("own_choice",), num_fewshot=0)
    monkeypatch.setattr(tables, "rows_of", lambda table, only=None: (changed,))
    told = run(capsys, "eval", "harness", folder, "--table", "base", "--include-path", tasks, "--json")
    (found,) = json.loads(told.out)["rows"]
    assert found["key"] == "mmlu" and found["own"] is not None and 0 <= found["own"] <= 100


@pytest.mark.slow
def test_every_task_of_the_tables_is_the_harnesss() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for table in TABLES:
        for row in rows_of(table):
            assert bool(row.tasks) or row.instead
            for task in row.tasks:
                assert manager.match_tasks([task]), (table, row.key, task)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["MODEL"], "give either --tasks, or --table and --only"),
        pytest.param(["MODEL", "--tasks", "no_such_task"], "no task 'no_such_task'", marks=pytest.mark.slow),
        (["MODEL", "--table", "chat"], "--table chat: must be one of base, instruct, thinking"),
        (["MODEL", "--table", "base", "--only", "mlmu"], "did you mean mmlu?"),
        (["MODEL", "--tasks", "a", "--include-path", "/no/such"], "/no/such: no such folder"),
        (["MODEL", "--table", "instruct", "--only", "arena_hard"], "not in lm-eval"),
        (["--tasks", "a"], "give either MODEL or --url"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, folder: Path, capsys: Capture) -> None:
    told = run(capsys, "eval", "harness", *(folder if word == "MODEL" else word for word in words))
    assert line in told.err and told.err.count("\n") == 1 and "Traceback" not in told.err


def test_data_that_cannot_be_had_are_one_line(folder: Path, tasks: Path, capsys: Capture) -> None:
    text = TASK.format(name="own_far", data="none").replace("dataset_path: json", "dataset_path: nobody/nothing")
    far = tasks / "far"
    far.mkdir()
    (far / "own_far.yaml").write_text(text.replace("dataset_kwargs: {data_files: {test: none}}\n", "") + CHOICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.load_dataset", _fails)
        told = run(capsys, "eval", "harness", folder, "--tasks", "own_far", "--include-path", far)
    assert told.code == 2 and "own_far: the data set cannot be had (ConnectionError: no route" in told.error_line


def _fails(*arguments: Any, **more: Any) -> Any:
    raise ConnectionError("no route\nto the hub")
