"""provenance.json: what made a folder and from what, through the verbs that make one, and files that differ."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qnext.checkpoint import create_folder, load_model, save_model
from qnext.checkpoint.provenance import Making, chain_of, hashes_of, licence_of, read_provenance
from qnext.diagnostics.folder import examine
from tests.cli.command import QUANTIZABLE, Capture, run
from tests.text_folders import save_plain

CARD = "---\nlicense: apache-2.0\nmodel_name: m\n---\n# A model\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("provenance") / "source"
    tokenizer = save_plain(folder.with_name("tokenizer"))
    create_folder(replace(QUANTIZABLE, vocab_size=300), folder, seed=1, tokenizer_folder=tokenizer)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Apache License")
    return folder


def provenance(folder: Path) -> dict[str, Any]:
    found = read_provenance(folder)
    assert found is not None
    return found


def test_hashes_are_those_of_the_files(source: Path) -> None:
    files = provenance(source)["files"]
    assert set(files) == {path.name for path in source.iterdir()} - {"provenance.json", "README.md", "LICENSE"}
    for name, entry in files.items():
        data = (source / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_chain_goes_through_every_verb(source: Path, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text"
    text.write_text("A text of some length to measure on. " * 40)
    int8, gguf, back, records = (tmp_path / name for name in ("int8", "m.gguf", "back", "records"))
    arguments = ("--scheme", "int8-g32", "--text", text, "--watts", 50)
    assert run(capsys, "quantize", source, int8, *arguments).code == 0
    made = provenance(int8)
    assert made["settings"].pop("calibration_tokens") > 64
    assert made["settings"] == {"scheme": "int8-g32", "method": "gptq"}
    assert made["data"] == [{"name": "text", "bytes": 1480, "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}]
    assert made["quality"]["text"]["kl_mean"] >= 0
    assert made["cost"]["joules"] == round(50 * made["cost"]["seconds"], 0) or made["cost"]["seconds"] < 0.1
    assert made["licence"]["name"] == "apache-2.0" and made["licence"]["file"] == "LICENSE"
    assert made["parents"][0]["provenance"]["made_by"] == "init"

    assert run(capsys, "convert", int8, gguf, "--type", "q8_0").code == 0
    assert run(capsys, "convert", gguf, back).code == 0
    assert run(capsys, "convert", back, records, "--records").code == 0
    found, verbs = provenance(records), []
    while found:
        verbs.append(found["made_by"])
        found = found["parents"][0]["provenance"] if found.get("parents") else {}
    assert verbs == ["convert", "convert", "convert", "quantize", "init"]
    assert provenance(records)["licence"]["name"] == "apache-2.0", "it goes through a GGUF file"
    assert provenance(back)["parents"][0]["files"]["m.gguf"]["sha256"] == hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert str(tmp_path) not in (records / "provenance.json").read_text(), "names, no places"
    shown = run(capsys, "inspect", records).out
    assert shown.count("source") >= 4 and "licence apache-2.0" in shown and "made by convert" in shown
    document = json.loads(run(capsys, "inspect", records, "--json").out)
    assert document["provenance"] == provenance(records)
    for folder in (int8, back, records):
        assert run(capsys, "verify", folder).code == 0


def test_equal_commands_differ_in_their_cost_alone(source: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in ("one", "two"):
        assert run(capsys, "quantize", source, tmp_path / name, "--scheme", "int8").code == 0
    one, two = provenance(tmp_path / "one"), provenance(tmp_path / "two")
    assert one.pop("cost")["seconds"] > 0 and two.pop("cost")
    assert one == two


def test_verify_names_a_file_that_differs(source: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "model"
    save_model(load_model(source), folder, tokenizer_folder=source, making=Making("test"))
    assert run(capsys, "verify", folder).code == 0
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8] ^= 1  # one bit, which no sample and no check of values sees
    weights.write_bytes(data)
    result = run(capsys, "verify", folder)
    assert result.code == 5 and "model.safetensors: differs from its hash in provenance.json" in result.err
    data[-8] ^= 1
    weights.write_bytes(data)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    result = run(capsys, "verify", folder)
    assert result.code == 0 and "warning" in result.err and "chat_template.jinja" in result.err
    assert run(capsys, "verify", folder, "--strict").code == 5


def test_a_folder_from_elsewhere_has_none_and_is_no_error(source: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "foreign"
    save_model(load_model(source), folder, tokenizer_folder=source)
    assert read_provenance(folder) is None and examine(folder).problems == []
    (folder / "provenance.json").write_text('{"of": "somebody else"}')
    assert read_provenance(folder) is None and run(capsys, "verify", folder).code == 0
    assert run(capsys, "quantize", folder, tmp_path / "out", "--scheme", "int8").code == 0
    (parent,) = provenance(tmp_path / "out")["parents"]
    assert parent["provenance"] is None and len(parent["model"]) == 32
    assert any("nothing is known" in line for line in chain_of(provenance(tmp_path / "out")))
    (folder / "provenance.json").write_text("{")
    result = run(capsys, "verify", folder)
    assert result.code == 0 and "cannot be read" in result.err


def test_licences_of_cards(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("no head\nlicense: mit\n")
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: 'own'\nlicense_link: https://x/LICENSE\n---\n"
    )
    assert licence_of(tmp_path) == {"name": "own", "link": "https://x/LICENSE"}


def test_hidden_files_and_the_file_itself_are_left_out(tmp_path: Path) -> None:
    for name in (".cache/a", "b", "c/d", "provenance.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    seen: list[tuple[int, int]] = []
    assert list(hashes_of(tmp_path, lambda done, total: seen.append((done, total)))) == ["b", "c/d"]
    assert seen[-1] == (4, 4)
