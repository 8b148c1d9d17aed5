"""One conversation in every form that people write is one sample; what is no sample is told by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qnext.errors import QnextWarning, UsageError
from qnext.text.messages import Message, ToolCall
from qnext.text.sample_files import read_values
from qnext.text.samples import FORMS, Sample, sample_of

TURNS = [("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?"), ("assistant", "4")]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "weather", "arguments": {"city": "Ulm"}}


def openai(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


FORMS_OF_ONE: dict[str, list[dict[str, Any]]] = {
    "two turns": [
        openai(*TURNS, id=7, score=0.5),
        {"conversations": [{"from": "human" if r == "user" else "gpt", "value": c} for r, c in TURNS]},
        {"conversations": openai(*TURNS)["messages"]},
        {"instruction": "2+2?", "input": "", "output": "4", "history": [["Hi", "Hello."]]},
    ],
    "a question with a system message": [
        openai(("system", "Be brief."), ("user", "Add\n\n1 and 2"), ("assistant", "3")),
        {"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be brief."},
        {"prompt": "Add\n\n1 and 2", "completion": "3", "system": "Be brief."},
        {
            "conversations": [{"from": "human", "value": "Add\n\n1 and 2"}, {"from": "gpt", "value": "3"}],
            "system": "Be brief.",
        },
    ],
    "a call": [
        {
            "messages": [
                {"role": "user", "content": "Rain?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
                    ],
                },
                {"role": "tool", "content": "dry"},
                {"role": "assistant", "content": "No."},
            ],
            "tools": [WEATHER],
        },
        {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "dry"},
                {"from": "gpt", "value": "No."},
            ],
            "tools": json.dumps([WEATHER]),
        },
    ],
}


@pytest.mark.parametrize("name", FORMS_OF_ONE)
def test_a_conversation_is_the_same_sample_in_every_form(name: str) -> None:
    first, *others = [sample_of(value) for value in FORMS_OF_ONE[name]]
    assert others and {sample.digest() for sample in others} == {first.digest()}
    assert first.messages[-1].role == "assistant" and all(first.is_taught)


def test_calls_and_tools_are_read() -> None:
    sample = sample_of(FORMS_OF_ONE["a call"][1])
    assert sample.tools == (WEATHER,)
    assert sample.messages[1] == Message("assistant", tool_calls=(ToolCall("weather", {"city": "Ulm"}),))
    assert sample.messages[2].role == "tool"


def test_weights_say_what_is_taught() -> None:
    value = openai(*TURNS)
    value["messages"][1]["weight"] = 0
    assert sample_of(value).is_taught == (True, False, True, True)
    cut = {"prompt": openai(*TURNS[:2])["messages"], "completion": openai(*TURNS[2:])["messages"]}
    assert sample_of(cut).is_taught == (False, False, True, True)
    assert sample_of(value).digest() != sample_of(openai(*TURNS)).digest()


def test_a_text() -> None:
    assert sample_of({"text": "def f(): ...", "path": "f.py"}) == Sample(text="def f(): ...")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a sample is a JSON object, not a list"),
        ({}, "keys none are of no known form"),
        ({"question": "q", "answer": "a"}, "keys answer, question are of no known form: messages"),
        ({"chosen": [], "rejected": []}, "what `qnext train dpo` learns from"),
        ({"text": "t", **openai(*TURNS)}, "several forms (messages, text)"),
        ({"text": 3}, "text is a number, not a string"),
        ({"messages": "hi"}, "messages is a string, not a list"),
        ({"messages": ["hi"]}, "messages: message 0 is a string, not an object"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [{"content": "x"}]}, "message 0: a message needs a role"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 0: content parts other than text",
        ),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "weight is 0 or 1, not 0.5"),
        ({"conversations": [{"from": "human"}]}, "turn 0: needs from and value"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien' is unknown"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "from ['gpt'] is unknown"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "turn 0: not valid JSON"),
        ({"instruction": "x", "output": None}, "output is null, not a string"),
        ({"instruction": "x", "output": "y", "history": ["ab"]}, "pair 0: expected a question and its answer"),
        ({"prompt": "x", "completion": []}, "prompt is a string, not a list"),
        ({**openai(*TURNS), "tools": "[{]"}, "tools: not valid JSON"),
        ({**openai(*TURNS), "tools": [{}]}, "tool 0: a tool is an object with a function name"),
    ],
)
def test_what_is_no_sample_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        sample_of(value)
    assert message in str(caught.value)


def test_a_named_form_decides_and_must_fit() -> None:
    value = {"text": "t", **openai(*TURNS)}
    assert sample_of(value, form="text").text == "t"
    with pytest.raises(UsageError, match="no key 'conversations', which the form sharegpt has"):
        sample_of(value, form="sharegpt")
    assert all(form in FORMS for form in ("messages", "sharegpt", "alpaca", "prompt-completion", "text"))


VALUES = [openai(*TURNS), {"text": "a\nb"}, {"prompt": "ä", "completion": "ö"}]


def write(path: Path) -> Path:
    """The same values in the form that the suffix names."""
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        keys = {key for value in VALUES for key in value}
        parquet.write_table(arrow.Table.from_pylist([dict.fromkeys(keys) | value for value in VALUES]), path)
    elif path.suffix == ".jsonl" or path.name == "lines.json":
        path.write_text("\n\n".join(json.dumps(value) for value in VALUES) + "\n")
    else:
        path.write_text(json.dumps(VALUES, indent=1, ensure_ascii=False))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "list.json", "a.parquet"])
def test_every_kind_of_file_has_the_same_values(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    found = list(read_values(path))
    assert [sample_of(each.value).digest() for each in found] == [sample_of(value).digest() for value in VALUES]
    done = [each.num_bytes_read for each in found]
    assert done == sorted(done) and done[0] > 0 and done[-1] <= path.stat().st_size


def test_places_are_lines_that_an_editor_finds(tmp_path: Path) -> None:
    for name in ("a.jsonl", "list.json"):
        path = write(tmp_path / name)
        lines = path.read_text().splitlines()
        for each in read_values(path):
            number = int(each.place.removeprefix(f"{path}:"))
            assert lines[number - 1].lstrip().startswith("{")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2: not valid JSON"),
        ("a.json", '[{"text": "x"},\n{"text"]', "a.json:2: not valid JSON"),
        ("a.json", '[{"text": "x"}\n', "a.json:1: the list does not end"),
        ("a.json", '[{"text": "x"}]\n{}', "a.json:2: something follows the list"),
        ("a.parquet", "PAR1", "a.parquet: not a sound parquet file"),
        ("a.txt", "\0", "a.txt: holds NUL bytes"),
        ("a.json", "", "a.json: empty"),
    ],
)
def test_damage_is_told_by_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        list(read_values(path))
    assert message in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow: pip install 'qnext\[parquet\]'"):
        list(read_values(tmp_path / "a.parquet"))


def test_a_folder_is_of_samples_or_a_tree_of_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.json")
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / ".hidden").write_text("x")
    assert len(list(read_values(tmp_path))) == 6
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "f.py").write_text("x = 1\n")
    (tmp_path / "src" / "image.png").write_bytes(b"\x89PNG\0")
    with pytest.warns(QnextWarning, match="1 files are no texts and are left out, the first is .*image.png"):
        found = [each.value["text"] for each in read_values(tmp_path)]
    assert "x = 1\n" in found and "what this is" in found and len(found) == 4
    with pytest.raises(UsageError, match="no such file or folder"):
        list(read_values(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no data"):
        list(read_values(tmp_path / "empty"))
